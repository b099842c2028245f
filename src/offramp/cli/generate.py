"""offramp generate."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from offramp.calibration.thresholds import load_thresholds
from offramp.cli.base import Device, Dtype, Threads, open_for, output, say, use
from offramp.errors import ConfigError
from offramp.generation.config import GenerateConfig, MissingKV, SamplingConfig

if TYPE_CHECKING:
    from offramp.generation.generate import Generation
    from offramp.generation.rows import Token
    from offramp.models.open import OpenedModel

GREEDY = SamplingConfig()
SHALLOW, DEEP = (70, 170, 240), (240, 150, 60)


def generate(
    model: Path,
    prompt: str,
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = GREEDY,
    *,
    max_new_tokens: int = 128,
    threshold: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    decay: float | None = None,
    confidence: str = "max_prob",
    certificate: Path | None = None,
    missing_kv: MissingKV | None = None,
    speculative: bool = False,
    draft_exit: int | None = None,
    draft_threshold: float | None = None,
    lookup: int | None = None,
    stop: list[str] | None = None,
    stop_token: list[str] | None = None,
    chat: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype | None = None,
) -> None:
    """Continue a text; each token is coloured by the exit where it left.

    Parameters
    ----------
    model
        A folder that ``offramp train`` or ``offramp tune`` wrote, a Hugging Face checkpoint (a
        folder, or a name on the hub), or smollm2-135m.
    prompt
        The text to continue.
    max_new_tokens
        New tokens at most.
    threshold
        Let tokens leave at this confidence; one for each exit but the last is written 0.9:0.8.
        Without it every token runs to the end.
    decay
        With --threshold: let the threshold fall along the text (CALM). At new token t, counted
        from 0, of N it is 0.9 THRESHOLD + 0.1 exp(-DECAY t / N), where N is --max-new-tokens.
    confidence
        The measure: max_prob, margin, entropy, saturation, patience, gate or gain.
    certificate
        Take the thresholds of a certificate that ``offramp calibrate`` wrote for this model.
    missing_kv
        Keys and values above an exit: propagate the exit's state (default), or recompute them
        when a later token needs them.
    speculative
        Draft with the first layers and verify with the rest: the output of full depth, sooner.
    draft_exit
        The exit that drafts (default: the first).
    draft_threshold
        A draft ends where its confidence falls below this (default: 0.3).
    lookup
        With --speculative: so many tokens that stood in the text before are followed by a draft
        of what followed them there (default: 2; 0: only the exit drafts).
    stop
        A string that ends the text; give the flag again for another.
    stop_token
        A token that ends the text, by its text or number; give the flag again for another.
    chat
        Put the prompt into the model's chat template.
    json_
        Print one JSON object at the end instead of the text as it comes.
    dtype
        Precision of the model (default: that of its file).
    """
    given: dict[str, Any] = {"confidence": confidence, "speculative": speculative}
    given |= {
        "max_new_tokens": max_new_tokens,
        "draft_exit": draft_exit,
        "stop_strings": tuple(stop or ()),
    }
    given |= {"missing_kv": missing_kv or "propagate", **vars(sampling)}
    drafting = {"draft_threshold": draft_threshold, "lookup": lookup, "decay": decay}
    given |= {name: value for name, value in drafting.items() if value is not None}
    if threshold is not None:
        given["threshold"] = _threshold(threshold)
    config = GenerateConfig(**given)
    stored = None
    if certificate is not None:
        if threshold is not None:
            raise ConfigError("threshold: expected none with --certificate, which has its own")
        stored = load_thresholds(certificate)

    from offramp.commands.generate import generate as run_generate
    from offramp.commands.generate import token_id, with_thresholds

    use(device, threads)
    if stored is not None:
        config = with_thresholds(config, stored, missing_kv=missing_kv)
    loaded = open_for(model, device=device, dtype=dtype, stored=stored)
    stops = tuple(token_id(loaded.tokenizer, written) for written in stop_token or ())
    config = GenerateConfig(**{**vars(config), "stop_tokens": stops})
    if not loaded.exits_trained and (config.threshold is not None or speculative):
        say(f"{model}: its exits were never trained.")
    began = time.perf_counter()
    generation = run_generate(loaded, prompt, config, chat=chat)
    first: float | None = None
    for token in generation:
        first = first or time.perf_counter()
        if not json_:
            output().print(_coloured(token, loaded), end="", soft_wrap=True)
    ended = time.perf_counter()
    count = len(generation.completion.tokens)
    seconds = ended - (first or began)
    rate = (count - 1) / seconds if count > 1 and seconds > 0 else None
    if json_:
        print(json.dumps(_content(generation, rate)))
        return
    print()
    _say_summary(generation, loaded, rate=rate, prefill=(first or ended) - began)


def _threshold(written: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in written.split(":"))
    except ValueError:
        raise ConfigError(
            f"threshold: expected a number, or one for each exit such as 0.9:0.8, got {written!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _coloured(token: "Token", loaded: "OpenedModel") -> Text:
    share = (token.exit_layer - 1) / max(1, loaded.model.num_layers - 1)
    mixed = [round(a + share * (b - a)) for a, b in zip(SHALLOW, DEEP, strict=True)]
    early = token.exit_layer < loaded.model.num_layers
    return Text(token.text, style=f"rgb({mixed[0]},{mixed[1]},{mixed[2]})" if early else "")


def _content(generation: "Generation", rate: float | None) -> dict[str, Any]:
    completion = generation.completion
    return {
        "text": completion.text,
        "tokens": [
            {"id": token.id, "exit_layer": token.exit_layer, "confidence": token.confidence}
            for token in completion.tokens
        ],
        "tokens_per_s": rate,
        "mean_layers": generation.mean_layers,
        "acceptance_rate": generation.acceptance_rate,
    }


def _say_summary(
    generation: "Generation", loaded: "OpenedModel", *, rate: float | None, prefill: float
) -> None:
    parts = [f"{len(generation.completion.tokens)} tokens"]
    if rate is not None:
        parts.append(f"{rate:.1f} tokens/s after {prefill:.2f} s to the first")
    parts.append(f"mean layers {generation.mean_layers:.1f} of {loaded.model.num_layers}")
    if generation.acceptance_rate is not None:
        parts.append(f"acceptance rate {100 * generation.acceptance_rate:.0f}%")
    say("; ".join(parts))
