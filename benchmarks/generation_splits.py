"""Test whether certificates on generated text hold, and what text certificates would have said.

Prompts are cut from --text. All of them are continued once at full depth and with every step of a
path of prices (thresholds of ``gain``), and the losses are kept in --record, so that a run that was
stopped goes on. Then the prompts are divided at random into two halves, 20 times: each promise is
certified on one half and checked on the other. A split fails if the lower bound on the risk of the
other half, at level 0.05 by the betting of ``calibrate --check``, is above epsilon.

Beside it is the certificate on the same text, read: as many windows of the same length, and the
promise with the same epsilon on their nll-gap (for nll-gap) or on their disagreement (for the
others). Its thresholds are of the same path, so what happens with them on generation is known.

Tokens/s are those of decoding a text alone, without its prompt: --timed prompts, full depth and all
steps one after the other for each prompt, and the median of the ratios to full depth. They are per
second of processor time, so that other programs disturb them less. Use one thread.

    python benchmarks/generation_splits.py MODEL --text test.txt --record losses.json
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.calibration.bounds import fixed_sequence, p_values
from offramp.calibration.check import risk_interval
from offramp.calibration.promise import Promise
from offramp.calibration.risk import ThresholdPath, sequence_losses, whole_sequences
from offramp.commands.on_generation.config import Prompts, WriteConfig
from offramp.commands.on_generation.writer import Writer, prompts_of_text
from offramp.commands.text import read_text
from offramp.data import batches
from offramp.evaluation.trace import collect_trace
from offramp.files import write_json
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.open import OpenedModel, open_model

Losses = NDArray[np.float64]
"""(n, steps) losses from 0 to 1."""
RISKS = {"nll-gap": (0.05, 0.1), "divergence": (0.1, 0.25, 0.5), "rouge-l": (0.1, 0.25, 0.5)}
ON_TEXT = {"nll-gap": "nll-gap", "divergence": "disagreement", "rouge-l": "disagreement"}
PRICES = (0.01, 0.016, 0.025, 0.04, 0.063, 0.1, 0.16, 0.25)
LEVEL = 0.05
CONFIDENCE = "gain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="a text that the model was not trained on")
    parser.add_argument("--record", type=Path, required=True, help="keeps the losses (JSON)")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--prices", type=float, nargs="+", default=PRICES, help="in nats")
    parser.add_argument("--missing-kv", default="propagate")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--windows", type=int, default=200, help="of the text certificate")
    parser.add_argument("--timed", type=int, default=8, help="prompts that are timed; 0: none")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    opened = open_model(chosen.model, dtype=getattr(torch, chosen.dtype))
    opened.require_exits()
    config = WriteConfig(
        max_prompts=chosen.prompts,
        prompt_tokens=chosen.prompt_tokens,
        max_new_tokens=chosen.max_new_tokens,
        missing_kv=chosen.missing_kv,
        rows=chosen.rows,
    )
    prompts = prompts_of_text(opened, chosen.text, config)
    path = tuple((-price,) * (len(opened.model.exit_layers) - 1) for price in chosen.prices)
    record = Record(chosen.record, about(opened, prompts, chosen))
    texts = (1 + len(path)) * len(prompts.ids)
    print(f"{texts:,} texts of {config.max_new_tokens} tokens after {prompts.about}", flush=True)
    write(opened, prompts, config, path, record)
    record.once("text", lambda: read(opened, chosen, path))
    if len(record.content.get("seconds", [])) < chosen.timed:
        record.content["seconds"] = timed(opened, prompts, config, path, chosen.timed)
        record.save()
    show(record, opened.model.num_layers, chosen.prices, chosen.splits)


class Record:
    """What was measured so far, in a file of JSON that belongs to one model and one setting."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.content = path, {"settings": settings, "batches": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        if self.content["settings"] != settings:
            raise SystemExit(f"{path}: expected {settings}, got {self.content['settings']}")

    def save(self) -> None:
        write_json(self.path, self.content)

    def once(self, name: str, measure: Any) -> None:
        """Measure something unless it is there."""
        if name not in self.content:
            self.content[name] = measure()
            self.save()

    def losses(self, risk: str) -> Losses:
        """Return the losses of all prompts at each step."""
        return np.concatenate([np.array(part[risk]) for part in self.content["batches"]])

    def layers_run(self) -> Losses:
        """Return (n, steps): the mean number of layers of each text's new tokens."""
        return np.concatenate([np.array(part["layers"]) for part in self.content["batches"]])


def about(opened: OpenedModel, prompts: Prompts, chosen: argparse.Namespace) -> dict[str, Any]:
    names = ("prompt_tokens", "max_new_tokens", "missing_kv", "rows", "windows", "dtype")
    return {
        "model_sha256": opened.sha256,
        "prompts": prompts.about,
        "text_sha256": prompts.sha256,
        "prices": [*chosen.prices],
        **{name: getattr(chosen, name) for name in names},
    }


def write(
    opened: OpenedModel, prompts: Prompts, config: WriteConfig, path: ThresholdPath, record: Record
) -> None:
    """Write all texts and keep their losses, a batch of prompts after the other."""
    parts = record.content["batches"]
    began, at_first = time.perf_counter(), len(parts)
    count = -(-len(prompts.ids) // config.rows)
    for batch in range(len(parts), count):
        ids = prompts.ids[batch * config.rows : (batch + 1) * config.rows]
        some = Prompts(ids=ids, sha256=prompts.sha256, about=prompts.about)
        parts.append(losses_of(Writer(opened, some, config, confidence=CONFIDENCE), path))
        record.save()
        left = (time.perf_counter() - began) / (len(parts) - at_first) * (count - len(parts))
        print(f"batch {len(parts)} of {count}; {left / 60:.1f} minutes left", flush=True)


def losses_of(writer: Writer, path: ThresholdPath) -> dict[str, list[list[float]]]:
    """Return (n, steps) losses by risk, and the mean layers of each text."""
    columns: dict[str, list[Any]] = {name: [] for name in (*RISKS, "layers")}
    for thresholds in path:
        early = writer.write(thresholds)
        for risk in RISKS:
            columns[risk].append(writer.losses(early, risk))
        left = [[token.exit_layer for token in text.tokens] for text in early.texts]
        columns["layers"].append([np.mean(layers) for layers in left])
    return {name: np.round(np.transpose(found), 6).tolist() for name, found in columns.items()}


def read(opened: OpenedModel, chosen: argparse.Namespace, path: ThresholdPath) -> dict[str, Any]:
    """Return (n, steps) losses of windows of the same text, read, by risk."""
    ids = read_text(opened, chosen.text).ids
    order = torch.Generator().manual_seed(0)
    length = chosen.prompt_tokens + chosen.max_new_tokens
    cut = batches(ids, seq_len=length, batch_size=8, order=order, first=opened.first_tokens)
    trace = whole_sequences(
        collect_trace(
            opened.model,
            islice(cut, -(-chosen.windows // 8)),
            measures=(CONFIDENCE,),
            fitted=opened.fitted,
        )
    )
    found = {}
    for risk in sorted(set(ON_TEXT.values())):
        losses = sequence_losses(trace, path, confidence=CONFIDENCE, risk=risk)
        found[risk] = np.round(losses[: chosen.windows], 6).tolist()
    return found


def timed(
    opened: OpenedModel, prompts: Prompts, config: WriteConfig, path: ThresholdPath, count: int
) -> list[list[float]]:
    """Return the seconds per new token of some prompts, at full depth and at each step."""
    found = []
    step = max(1, len(prompts.ids) // max(1, count))
    for ids in islice(prompts.ids[::step], count):
        found.append([_seconds(opened, ids, config, at) for at in (None, *path)])
        print(f"timed {len(found)} of {count}", flush=True)
    return found


def _seconds(
    opened: OpenedModel, ids: list[int], config: WriteConfig, thresholds: tuple[float, ...] | None
) -> float:
    options = GenerateConfig(
        max_new_tokens=config.max_new_tokens,
        threshold=thresholds,
        confidence=CONFIDENCE if thresholds else None,
        missing_kv=config.missing_kv,
    )
    tokens = generate(opened.model, ids, options, tokenizer=opened.tokenizer, fitted=opened.fitted)
    next(tokens)  # the prompt
    began = time.process_time()
    count = sum(1 for _ in tokens)
    return (time.process_time() - began) / max(1, count)


def show(record: Record, num_layers: int, prices: Any, splits: int) -> None:
    """Print the losses of each step, and then a line for each promise."""
    speed = speeds(record)
    for line in steps_table(record, prices, speed):
        print(line)
    print(
        "\n| On generation | splits that fail | other half's mean above epsilon | full depth "
        "| risk on the other half | mean layers | tokens/s | text certificate: price, risk there "
        "| its risk on generation |\n|---|---|---|---|---|---|---|---|---|"
    )
    for risk, epsilons in RISKS.items():
        for epsilon in epsilons:
            print(promise_row(record, risk, epsilon, num_layers, prices, splits, speed))


def speeds(record: Record) -> list[float]:
    """Return tokens/s relative to full depth, of full depth and of each step; NaN if untimed."""
    seconds = np.array(record.content.get("seconds", []))
    if not seconds.size:
        return [float("nan")] * (1 + len(record.content["settings"]["prices"]))
    return [float(ratio) for ratio in np.median(seconds[:, :1] / seconds, axis=0)]


def steps_table(record: Record, prices: Any, speed: list[float]) -> Iterator[str]:
    seconds = np.array(record.content.get("seconds", []))
    if seconds.size:
        yield f"full depth: {np.median(1 / seconds[:, 0]):.1f} tokens/s, median, one text"
    text = record.content["text"]
    columns = [record.losses(risk).mean(axis=0) for risk in RISKS]
    columns += [np.mean(text[risk], axis=0) for risk in sorted(text)]
    columns += [record.layers_run().mean(axis=0), np.array(speed[1:])]
    names = [*RISKS, *(f"{risk}, read" for risk in sorted(text)), "mean layers", "tokens/s"]
    yield f"\n| Price | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}"
    for step, price in enumerate(prices):
        values = " | ".join(f"{column[step]:.3f}" for column in columns)
        yield f"| {price:g} | {values} |"


def promise_row(
    record: Record,
    risk: str,
    epsilon: float,
    num_layers: int,
    prices: Any,
    splits: int,
    speed: list[float],
) -> str:
    losses, layers = record.losses(risk), record.layers_run()
    promise = Promise(on="generation", risk=risk, epsilon=epsilon, delta=LEVEL)
    failed = above = 0
    kept, risks, ran = [], [], []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(losses))
        own, other = np.array_split(order, 2)
        step = certified(losses[own], promise)
        kept.append(step)
        found = losses[other, step - 1] if step else np.zeros(len(other))
        low, _ = risk_interval(found, LEVEL)
        failed += low > promise.scaled_epsilon
        above += found.mean() > promise.scaled_epsilon
        risks.append(found.mean())
        ran.append(layers[other, step - 1].mean() if step else num_layers)
    on_text = Promise(risk=ON_TEXT[risk], epsilon=epsilon, delta=LEVEL)
    text = np.array(record.content["text"][on_text.risk])
    step = certified(text, on_text)
    claimed = f"{prices[step - 1]:g}, {text[:, step - 1].mean():.3f}" if step else "full depth"
    happened = f"{losses[:, step - 1].mean():.3f}" if step else "0"
    return (
        f"| {risk} <= {epsilon:g} | {failed} of {splits} | {above} | {kept.count(0)} | "
        f"{np.mean(risks):.3f} | {np.mean(ran):.2f} of {num_layers} | "
        f"{np.mean([speed[step] for step in kept]):.2f} x | {claimed} | {happened} |"
    )


def certified(losses: Losses, promise: Promise) -> int:
    """Return how many steps of the path are certified, as ``calibrate`` does."""
    test = promise.test_for(len(losses))
    found = p_values(losses, promise.scaled_epsilon, delta=promise.delta, test=test)
    return int(fixed_sequence(found, promise.delta))


if __name__ == "__main__":
    main()
