"""offramp generate."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.text import Text

from offramp.calibration.thresholds import StoredThresholds, load_thresholds
from offramp.cli.base import (
    Base,
    Bos,
    Device,
    Model,
    Precision,
    Threads,
    Weights,
    console,
    open_for,
    output,
    say,
    use,
)
from offramp.cli.plain_text import standard_input, write_text
from offramp.cli.streams import utf8
from offramp.errors import ConfigError
from offramp.generation.config import GenerateConfig, MissingKVChoice
from offramp.models.missing_kv import EXACT

if TYPE_CHECKING:
    from offramp.generation.generate import Generation
    from offramp.models.open import OpenedModel

FULL_DEPTH = GenerateConfig()
SHALLOW, DEEP = (70, 170, 240), (240, 150, 60)
"""Colours of the first and of the last exit before full depth."""
SET_HERE = re.compile("^(?!(threshold|decay|confidence|missing_kv|stop_strings|stop_tokens)$)")
"""The fields of the config that the command's own flags set."""
Thresholds = Annotated[
    str | None,
    Parameter(
        name="--threshold",
        allow_leading_hyphen=True,
        help="Confidence at which tokens exit; one for each exit but the last is written 0.9:0.8. "
        "Without it every token runs through all layers.",
    ),
]
Decay = Annotated[
    float | None,
    Parameter(
        name="--decay",
        help="With --threshold: let the threshold fall along the text (CALM). At new token t, "
        "counted from 0, of N it is 0.9 THRESHOLD + 0.1 exp(-DECAY t / N), where N is "
        "--max-new-tokens.",
    ),
]
Measure = Annotated[
    str | None,
    Parameter(
        name="--confidence",
        help="The confidence measure, for exits and drafts (default: that of the certificate, or "
        "gain where it was fitted, else max_prob; drafts: max_prob). Without it, a threshold from "
        "0 to 1 on gain is the share of the last layer's probability that an exit must keep.",
    ),
]
KeysValues = Annotated[
    MissingKVChoice | None,
    Parameter(
        name="--missing-kv",
        help="Keys and values that a later token needs above an exit: propagate computes them "
        "from the state at the exit (default), recompute runs the layers. Complete exits (those "
        "of a model of train --kv-source) need no choice, since both are the same; exact refuses "
        "a model whose exits are not complete.",
    ),
]


def generate(
    model: Model,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    config: Annotated[GenerateConfig, Parameter(name="*", parse=SET_HERE)] = FULL_DEPTH,
    *,
    thresholds: Thresholds = None,
    falling: Decay = None,
    certificate: Path | None = None,
    measure: Measure = None,
    keys_values: KeysValues = None,
    stop: list[str] | None = None,
    stop_token: list[str] | None = None,
    chat: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
    base: Base = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Precision | None = None,
    weights: Weights = None,
) -> None:
    """Continue a text; in a terminal each token has the colour of its exit.

    Parameters
    ----------
    prompt
        The text to continue; - reads it from standard input.
    certificate
        Take the thresholds in a file that ``offramp calibrate`` wrote for this model.
    stop
        A string that ends the text; give the flag again for another.
    stop_token
        A token that ends the text: its id, such as 2, or its text, such as "\\n" or "<|im_end|>"
        (text:2 is the digit 2); give the flag again for another.
    chat
        Put the prompt into the model's chat template.
    json_
        Print one JSON object at the end instead of the text as it comes.
    dtype
        Precision of the model (default: that of the certificate, or of the model's files).
    """
    stored = None if certificate is None else load_thresholds(certificate)
    if stored is not None:
        _check_alone({"threshold": thresholds, "decay": falling, "confidence": measure})
    config = replace(
        config,
        threshold=None if thresholds is None else parse_threshold(thresholds),
        decay=falling,
        confidence=config.confidence if measure is None else measure,
        missing_kv=keys_values or config.missing_kv,
        stop_strings=tuple(utf8(each) or "" for each in stop or ()),
    )
    text = standard_input() if prompt == "-" else utf8(prompt) or ""
    use(device, threads)
    opened = open_for(
        model,
        base=base,
        bos=bos,
        device=device,
        dtype=dtype,
        weights=weights,
        stored=stored,
    )
    if stored is not None:
        config = _with_thresholds(config, stored, keys_values, opened)
    stops = [utf8(each) or "" for each in stop_token or ()]
    _run(opened, config, prompt=text, stops=stops, chat=chat, as_json=json_)


def _check_alone(given: Mapping[str, Any]) -> None:
    """Raise a ConfigError for options that a certificate already contains."""
    for name, value in given.items():
        if value is not None:
            own = "which has its own" if name == "confidence" else "whose thresholds hold"
            raise ConfigError(f"{name}: expected none with --certificate, {own}")


def _with_thresholds(
    config: GenerateConfig,
    stored: StoredThresholds,
    missing_kv: MissingKVChoice | None,
    opened: "OpenedModel",
) -> GenerateConfig:
    from offramp.commands.generate import with_thresholds

    return with_thresholds(config, stored, missing_kv=missing_kv, model=opened.model)


def _run(
    opened: "OpenedModel",
    config: GenerateConfig,
    *,
    prompt: str,
    stops: Sequence[str],
    chat: bool,
    as_json: bool,
) -> None:
    from offramp.commands.generate import confidence_note, generate
    from offramp.data.token_names import token_id
    from offramp.generation.promise import drafts_note

    size = opened.model.vocab_size
    ids = tuple(token_id(opened.tokenizer, written, size) for written in stops)
    exits = config.threshold is not None or config.speculative
    if exits and not opened.exits_trained:
        say(f"{opened.name}: its exits were never trained.")
    if config.speculative and (note := drafts_note(opened.model)):
        say(note)
    generation = generate(opened, prompt, replace(config, stop_tokens=ids), chat=chat)
    if config.threshold is not None and config.confidence is None:
        say(confidence_note(opened, generation.rule))
    if as_json:
        _, rate = _timed(generation, show=None)
        print(json.dumps(_content(generation, rate)))
        return
    _print_text(generation, opened, prompt=f"{prompt}\n" if chat else prompt, exits=exits)


def _print_text(
    generation: "Generation", opened: "OpenedModel", *, prompt: str, exits: bool
) -> None:
    """The prompt, then the tokens as they come; a legend and figures on standard error."""
    shown = output()
    write_text(shown, prompt, "dim")

    def show(text: str, exit_layer: int) -> None:
        write_text(shown, text, _colour(exit_layer, opened))

    seconds, rate = _timed(generation, show=show)
    write_text(shown, "\n")
    if exits and shown.is_terminal and shown.color_system and not shown.no_color:
        console.print(_legend(opened))
    _say_summary(generation, opened, rate=rate, prefill=seconds)


def _timed(generation: "Generation", *, show: Any) -> tuple[float, float | None]:
    """Run to the end: seconds to the first token, and tokens per second after it."""
    began = time.perf_counter()
    first: float | None = None
    for token in generation:
        first = first or time.perf_counter()
        if show:
            show(token.text, token.exit_layer)
    ended = time.perf_counter()
    count, seconds = len(generation.completion.tokens), ended - (first or began)
    rate = (count - 1) / seconds if count > 1 and seconds > 0 else None
    return (first or ended) - began, rate


def parse_threshold(written: str) -> float | tuple[float, ...]:
    """A threshold from its written form; 0.9:0.8 is one for each exit but the last."""
    try:
        numbers = tuple(float(part) for part in written.split(":"))
    except ValueError:
        raise ConfigError(
            f"threshold: expected a number, or one for each exit such as 0.9:0.8, got {written!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _colour(exit_layer: int, opened: "OpenedModel") -> str:
    """The style of a token's exit; tokens of full depth are plain."""
    last = opened.model.num_layers
    if exit_layer == last:
        return ""
    share = (exit_layer - 1) / max(1, last - 1)
    mixed = [round(a + share * (b - a)) for a, b in zip(SHALLOW, DEEP, strict=True)]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"


def _legend(opened: "OpenedModel") -> Text:
    legend = Text("exit layer: ")
    for layer in opened.model.exit_layers:
        name = f"{layer} (full depth)" if layer == opened.model.num_layers else f"{layer}  "
        legend.append(f"\u25a0 {name}", style=_colour(layer, opened))
    return legend


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
        "missing_kv": generation.missing_kv,
        "confidence": None if generation.rule is None else generation.rule.confidence,
        "acceptance_rate": generation.acceptance_rate,
        "lossless": generation.lossless,
    }


def _say_summary(
    generation: "Generation", opened: "OpenedModel", *, rate: float | None, prefill: float
) -> None:
    parts = [f"{len(generation.completion.tokens)} tokens"]
    if rate is not None:
        parts.append(f"{rate:.1f} tokens/s after {prefill:.2f} s to the first")
    parts.append(f"mean layers {generation.mean_layers:.1f} of {opened.model.num_layers}")
    if generation.acceptance_rate is not None:
        parts[-1] += " (rejected drafts included)"
        parts.append(f"acceptance rate {100 * generation.acceptance_rate:.0f}%")
    if generation.missing_kv == EXACT:
        parts.append(f'missing_kv="{EXACT}"')
    say("; ".join(parts))
