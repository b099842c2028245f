"""Decode on a GPU with transformers and with offramp, interleaved in one run.

Models: SmolLM2-135M (``pip install 'offramp[demo]'``) and a random Llama of about 1B parameters, in
bfloat16. Rows, for 1 and 8 texts at once:

- ``hf eager``, ``hf static + compile``: ``generate`` of transformers, with its static cache and
  ``torch.compile(mode="reduce-overhead")``, which it uses on a GPU by itself;
- ``ours eager``: full depth without CUDA graphs; ``ours full``: with them;
- ``exit 50%``, ``exit 65%``: confident exit by ``gain`` with so many of the layers, ``propagate``.
  The gates are random and are evaluated; the tokens that leave are drawn at random;
- ``speculative``: drafts of the first exit and of prompt lookup, verified.

    python benchmarks/gpu.py --out gpu.json                           # under 8 minutes on one H100
    python benchmarks/gpu.py --device cpu --small --out small.json    # tries the script, no figures

The first round only prepares: it compiles and captures. Figures are medians of the other rounds. A
row that fails says why, and the others go on. OUT is written after each round.
"""

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import offramp
from offramp.environment import environment
from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import ThresholdPolicy
from offramp.files import write_json
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.decoding_time import ReplayedExits, decoding_time
from offramp.generation.engine import Engine
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer

SHARES = (0.5, 0.65)
EXITS = (0.27, 0.4, 0.54, 0.67)
"""Exits of every model, as shares of its layers."""
LLAMA_1B = {  # the shape of Llama 3.2 1B
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the texts (rows, prompt + new) that it decodes."""

    name: str
    model: Transformer
    texts: Tensor


def main() -> None:
    options = parsed()
    began = time.perf_counter()
    rows: dict[str, dict[str, Any]] = {}
    about = {"card": card(options.device), "environment": environment(options.device)}
    about |= {key: str(value) for key, value in vars(options).items()}
    for n, make in enumerate(models(options)):
        try:
            case = make()
        except Exception as error:
            print(f"left out: {reason(error)}", flush=True)
            rows[f"model {n + 1}"] = {"why": reason(error)}
            write_json(options.out, {"about": about, "rows": rows})
            continue
        until = began + 60 * options.minutes * (n + 1) / len(models(options))
        for round_ in range(-1, options.rounds):
            if round_ > 0 and time.perf_counter() > until:
                break
            one_round(options, case, rows, first=round_ < 0)
            write_json(options.out, {"about": about, "rows": rows})
        del case
        if options.device != "cpu":
            torch.cuda.empty_cache()
    print(f"{about['card']}, torch {torch.__version__}, {options.dtype}, medians")
    print(table(rows))
    print(f"{time.perf_counter() - began:.0f} s in all")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON file with every figure")
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--small", action="store_true", help="one tiny random model and few tokens")
    add("--prompt", type=int, default=128, help="tokens of a prompt")
    add("--new", type=int, default=128, help="tokens that are decoded after it")
    add("--rounds", type=int, default=3)
    add("--minutes", type=float, default=6.5, help="no round begins after this time")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"device {options.device} is not available; use --device cpu --small")
    options.batches = (1, 8)
    if options.small:
        options.prompt, options.new, options.rounds, options.batches = 12, 10, 1, (1, 3)
    return options


def models(options: argparse.Namespace) -> list[Callable[[], Case]]:
    if options.small:
        return [partial(random_model, options, "tiny random Llama", SMALL)]
    return [
        partial(smollm2, options),
        partial(random_model, options, "random Llama, 1.2B parameters", LLAMA_1B),
    ]


def random_model(options: argparse.Namespace, name: str, shape: dict[str, Any]) -> Case:
    config = DecoderConfig(
        **shape,
        max_position_embeddings=options.prompt + options.new,
        exit_layers=exits_of(shape["num_hidden_layers"]),
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Transformer(config)
    model = model.to(options.device, getattr(torch, options.dtype)).eval()
    size = (max(options.batches), options.prompt + options.new)
    texts = torch.randint(config.vocab_size, size, device=options.device)
    return Case(name=name, model=model, texts=texts)


def smollm2(options: argparse.Namespace) -> Case:
    """SmolLM2-135M, and stretches of Python source as its texts."""
    dtype = getattr(torch, options.dtype)
    lm = offramp.load("smollm2-135m", exits=exits_of(30), device=options.device, dtype=dtype)
    ids = lm.tokenizer.encode(inspect.getsource(argparse) + inspect.getsource(json)).ids
    length = options.prompt + options.new
    starts = np.linspace(0, len(ids) - length, max(options.batches)).astype(int)
    texts = torch.tensor([ids[start : start + length] for start in starts])
    return Case(name="SmolLM2-135M", model=lm.model, texts=texts.to(options.device))


def exits_of(layers: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(share * layers)) for share in EXITS}))


def one_round(
    options: argparse.Namespace, case: Case, rows: dict[str, dict[str, Any]], *, first: bool
) -> None:
    """Run every row once, and add its figures; the ``first`` round has none."""
    case.model.silence_untrained()
    for batch in options.batches:
        for name, run in ways(options, case, case.texts[:batch]).items():
            row = rows.setdefault(
                f"{case.name}, {batch} at once, {name}",
                {"model": case.name, "batch": batch, "way": name, "samples": []},
            )
            if "why" in row:
                continue
            try:
                found = run()
            except Exception as error:
                row["why"] = reason(error)
                print(f"{case.name}, {name}: {row['why']}", flush=True)
                continue
            if not first:
                row["samples"].append(found)
        print(".", end="", flush=True)
    print(flush=True)


def ways(
    options: argparse.Namespace, case: Case, texts: Tensor
) -> dict[str, Callable[[], dict[str, float]]]:
    on_cpu = options.device == "cpu"  # where the static steps run without graphs
    ours = partial(forced, options, case.model, texts)
    found = {
        "hf eager": partial(hf, options, case.model, texts, static=False),
        "hf static + compile": partial(hf, options, case.model, texts, static=True),
        "ours eager": partial(ours, use_static=False),
        "ours full": partial(ours, use_static=on_cpu or None),
    }
    for share in SHARES:
        found[f"exit {share:.0%}"] = partial(ours, use_static=on_cpu or None, share=share)
    found["speculative"] = partial(speculative, options, case.model, texts, on_cpu or None)
    return found


def hf(
    options: argparse.Namespace, model: Transformer, texts: Tensor, *, static: bool
) -> dict[str, float]:
    """``generate`` of transformers, whose model shares the parameters."""
    from transformers import LogitsProcessor

    class Clock(LogitsProcessor):
        """Notes when the logits of the first token are there."""

        first = 0.0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if not self.first:
                wait(options.device)
                self.first = time.perf_counter()
            return scores

    theirs = model.__dict__.get("theirs")  # not among the modules
    if theirs is None:
        theirs = model.__dict__["theirs"] = model.to_transformers().eval()
    ids, clock = texts[:, : options.prompt], Clock()
    wait(options.device)
    began = time.perf_counter()
    theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=options.new,
        min_new_tokens=options.new,
        logits_processor=[clock],
        pad_token_id=0,
        cache_implementation="static" if static else None,
    )
    wait(options.device)
    end = time.perf_counter()
    tokens = len(texts) * (options.new - 1)
    return {
        "tokens_per_s": tokens / (end - clock.first),
        "first_token_ms": 1000 * (clock.first - began),
    }


def forced(
    options: argparse.Namespace,
    model: Transformer,
    texts: Tensor,
    *,
    use_static: bool | None,
    share: float | None = None,
) -> dict[str, float]:
    """Decode the texts as they are given, with exits that run a share of the layers, or none."""
    model.few_tokens.use_static = use_static
    rule = None if share is None else leaving(options, model, len(texts), share)
    took = decoding_time(model, texts, prompt_tokens=options.prompt, rule=rule)
    return {
        "tokens_per_s": took.tokens_per_s,
        "first_token_ms": 1000 * took.first_seconds,
        "layers": took.mean_layers,
    }


def leaving(
    options: argparse.Namespace, model: Transformer, batch: int, share: float
) -> ReplayedExits:
    """Return the rule by which tokens leave at random, so that a share of the layers runs."""
    early = model.exit_layers[:-1]
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        left = [middle * (1 - middle) ** n for n in range(len(early))]
        mean = np.dot(left, early) + (1 - sum(left)) * model.num_layers
        low, high = (middle, high) if mean > share * model.num_layers else (low, middle)
    random = np.random.default_rng(0)
    exits = np.full((batch, options.new), len(early))
    for index in reversed(range(len(early))):
        exits = np.where(random.random(exits.shape) < low, index, exits)
    gates = {
        layer: Gate(model.hidden_size, outputs=len(early) - place).eval().to(options.device)
        for place, layer in enumerate(early)
    }
    return ReplayedExits(
        policy=ThresholdPolicy(thresholds=(0.0,) * len(early)),
        confidence="gain",
        fitted=FittedExits(gates={"gain": gates}),
        exits=exits,
    )


def speculative(
    options: argparse.Namespace, model: Transformer, texts: Tensor, use_static: bool | None
) -> dict[str, float]:
    """Decode each text's own continuation with drafts; the rows run one by one."""
    model.few_tokens.use_static = use_static
    slots = EngineConfig(
        slots=len(texts), capacity=options.prompt + options.new, prefill_tokens=None
    )
    config = GenerateConfig(max_new_tokens=options.new, speculative=True)
    began = time.perf_counter()
    engine = Engine(model, slots)
    requests = [engine.submit(text, config) for text in texts[:, : options.prompt].tolist()]
    engine.step()
    first = time.perf_counter()
    for _ in engine.run():
        pass
    end = time.perf_counter()
    drafted = sum(request.drafted for request in requests)
    accepted = sum(request.accepted for request in requests)
    return {
        "tokens_per_s": sum(len(each.completion.tokens) - 1 for each in requests) / (end - first),
        "first_token_ms": 1000 * (first - began),
        "acceptance": accepted / max(1, drafted),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return a table of the medians."""
    lines = [
        "| Model | at once | way | tokens/s | first token, ms | layers | acceptance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        if "samples" not in row:
            continue
        figures = [row["model"], str(row["batch"]), row["way"]]
        if "why" in row or not row["samples"]:
            figures += [row.get("why", "not measured"), "", "", ""]
        else:
            for name in ("tokens_per_s", "first_token_ms", "layers", "acceptance"):
                found = [sample[name] for sample in row["samples"] if name in sample]
                figures.append(f"{statistics.median(found):,.3g}" if found else "")
        lines.append("| " + " | ".join(figures) + " |")
    return "\n".join(lines)


def card(device: str) -> str:
    """Return the name of the device."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:200].replace("|", "/")


if __name__ == "__main__":
    main()
