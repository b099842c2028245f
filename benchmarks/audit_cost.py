"""Measure what an audit of exits costs, how right it is, and how soon it flags a new domain.

Texts that continue cuts of --text are written with exits by ``gain``, one at a time. Three parts:

cost      tokens/s without an audit and with --share, round after round, and their ratio; per
          second of processor time, so that other programs disturb them less. Use one thread.
agree     --tokens new tokens are audited one and all, and their losses are kept in --record, so
          that a run that was stopped goes on. The text is the same with any share, so the audits of
          a smaller share are replayed from these losses with the coins of --seeds seeds. The first
          texts are also written with --share itself, and the losses must be the same.
change    prompts of --text, then prompts of Python source (of the standard library): audited tokens
          until ``RiskWatch`` raises an alarm, as in ``generate --audit``, which learns the range
          before the change, and until ``ChangeDetector`` does, with a null from the risk before the
          change divided by --margin to that risk times --margin. Beside them is the same recursion
          with the likelihood ratio of both distributions of losses, which it knows: nearly the best
          possible at this rate of false alarms (Pollak 1985). Texts are drawn with replacement.

    python benchmarks/audit_cost.py MODEL --text test.txt --record audit.json
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.calibration.change import ChangeDetector, RiskWatch
from offramp.commands.audit import RISKS, AuditLog
from offramp.commands.text import read_text
from offramp.data import encode
from offramp.data.prompts import cut_prompts
from offramp.files import write_json
from offramp.generation.auditing import Auditor, Comparison
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.open import OpenedModel, open_model

Outcome = tuple[float, float] | None
"""The losses of a token that left, in the order of ``RISKS``; None for one that ran whole."""
EDGES = np.array([1e-9, 0.02, 0.1, 0.3, 0.6, 0.999])
"""Edges of the classes of a loss, for the likelihood ratio."""
BEFORE, MOST = 1000, 10_000
"""Audited tokens before a change, and after it at the most."""
SOURCE_CHARACTERS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="a text that the model was not trained on")
    parser.add_argument("--record", type=Path, required=True, help="keeps the losses (JSON)")
    parser.add_argument("--parts", nargs="+", default=["cost", "agree", "change"])
    parser.add_argument("--price", type=float, default=0.1, help="threshold of gain, in nats")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--tokens", type=int, default=20_000, help="audited one and all, a domain")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="of the part cost")
    parser.add_argument("--texts", type=int, default=4, help="texts in a round")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--streams", type=int, default=100, help="of the part change")
    parser.add_argument("--margin", type=float, default=1.25)
    parser.add_argument("--missing-kv", default="propagate")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = Bench(open_model(chosen.model, dtype=getattr(torch, chosen.dtype)), chosen)
    if "cost" in chosen.parts:
        bench.cost()
    if "agree" in chosen.parts:
        bench.agree()
    if "change" in chosen.parts:
        bench.change()


class Bench:
    """One model, its prompts by domain, and the losses that were found so far."""

    def __init__(self, opened: OpenedModel, chosen: argparse.Namespace) -> None:
        opened.require_exits()
        self.opened, self.chosen = opened, chosen
        self.config = GenerateConfig(
            max_new_tokens=chosen.max_new_tokens,
            threshold=(-chosen.price,) * (len(opened.model.exit_layers) - 1),
            confidence="gain",
            missing_kv=chosen.missing_kv,
        )
        count = -(-chosen.tokens // chosen.max_new_tokens)
        source = encode(opened.tokenizer, python_source())
        self.prompts = {
            name: cut_prompts(
                ids, tokens=chosen.prompt_tokens, first=opened.first_tokens, at_most=count
            )
            for name, ids in (("text", read_text(opened, chosen.text).ids), ("source", source))
        }
        self.record = self._open_record()

    def _open_record(self) -> dict[str, Any]:
        names = ("price", "prompt_tokens", "max_new_tokens", "missing_kv", "dtype", "tokens")
        settings = {name: getattr(self.chosen, name) for name in names}
        settings["model_sha256"] = self.opened.sha256
        path = self.chosen.record
        if not path.exists():
            return {"settings": settings, **{name: [] for name in self.prompts}}
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != settings:
            raise SystemExit(f"{path}: expected {settings}, got {record['settings']}")
        return record

    def write(self, prompt: Sequence[int], auditor: Auditor | None) -> tuple[list[int], float]:
        """Write a text; return its tokens, and the processor seconds of all but the first."""
        opened = self.opened
        tokens = generate(
            opened.model,
            prompt,
            self.config,
            tokenizer=opened.tokenizer,
            fitted=opened.fitted,
            auditor=auditor,
        )
        ids = [next(tokens).id]
        began = time.process_time()
        ids += [token.id for token in tokens]
        return ids, time.process_time() - began

    def cost(self) -> None:
        """Print tokens/s without and with the audit; each round runs both, in turns."""
        chosen, log = self.chosen, AuditLog(share=self.chosen.share)
        rates: dict[bool, list[float]] = {False: [], True: []}
        for number in range(-1, chosen.rounds):  # the first one warms up
            spent = dict.fromkeys(rates, 0.0)
            written = 0
            for at in range(chosen.texts):
                prompt = self.prompts["text"][(number + 1 + at) % len(self.prompts["text"])]
                for audited in (False, True) if (number + at) % 2 else (True, False):
                    ids, seconds = self.write(prompt, log.auditor() if audited else None)
                    spent[audited] += seconds
                written += len(ids) - 1
            if number >= 0:
                for audited, seconds in spent.items():
                    rates[audited].append(written / max(seconds, 1e-9))
        plain, with_audit = (np.array(rates[audited]) for audited in (False, True))
        ratios = with_audit / plain
        low, high = np.quantile(ratios, [0.25, 0.75])
        print(
            f"cost: {np.median(plain):.1f} tokens/s without an audit, {np.median(with_audit):.1f} "
            f"with {chosen.share:g}; ratio {np.median(ratios):.3f} (quartiles {low:.3f} to "
            f"{high:.3f}; {chosen.rounds} rounds of {chosen.texts} texts; "
            f"{log.audits[RISKS[0]].audited} tokens audited)",
            flush=True,
        )

    def measured(self, domain: str) -> list[list[Outcome]]:
        """Return the losses of all tokens of each text of a domain, all that left audited."""
        texts: list[Any] = self.record[domain]
        began, at_first, prompts = time.perf_counter(), len(texts), self.prompts[domain]
        for prompt in prompts[len(texts) :]:
            texts.append(self.outcomes(prompt, 1.0)[1])
            if len(texts) % 10 == 0 or len(texts) == len(prompts):
                write_json(self.chosen.record, self.record)
                each = (time.perf_counter() - began) / (len(texts) - at_first)
                left = each * (len(prompts) - len(texts)) / 60
                print(f"{domain}: {len(texts)} of {len(prompts)}; {left:.1f} minutes", flush=True)
        return texts

    def outcomes(self, prompt: Sequence[int], share: float) -> tuple[list[int], list[Any]]:
        """Write a text with an audit; return its tokens, and the losses of each of them.

        The losses of a token that left and was not audited are ().
        """
        found: list[Any] = []

        def record(left: bool, audit: Comparison | None) -> None:
            losses = None if audit is None else (float(audit.disagrees), min(audit.nll_gap, 1.0))
            found.append((losses or ()) if left else None)

        ids, _ = self.write(prompt, Auditor(share=share, record=record, seed=len(prompt)))
        return ids, found

    def agree(self) -> None:
        """Print the audit of a share beside the losses of all tokens."""
        chosen, texts = self.chosen, self.measured("text")
        checked = 0
        for prompt, whole in zip(self.prompts["text"][:20], texts, strict=False):
            for some, every in zip(self.outcomes(prompt, chosen.share)[1], whole, strict=True):
                if some == ():
                    continue
                same = None if every is None else tuple(every)
                if some != same:
                    raise SystemExit(f"agree: expected {same} of an audit, got {some}")
                checked += some is not None
        tokens = [token for text in texts for token in text]
        left = [token for token in tokens if token is not None]
        print(f"agree: {len(tokens):,} tokens, {len(left):,} left; {checked} audits are the same")
        for at, risk in enumerate(RISKS):
            exhaustive = float(np.mean([losses[at] for losses in left]))
            rows = [replay(tokens, at, chosen.share, seed) for seed in range(chosen.seeds)]
            estimate, lower, upper, held = np.array(rows).T
            print(
                f"  {risk}: {exhaustive:.4f} of the tokens that left; an audit of {chosen.share:g} "
                f"says {np.mean(estimate):.4f} (standard deviation {np.std(estimate):.4f}), "
                f"bounds {np.median(lower):.4f} to {np.median(upper):.4f} (medians); the upper "
                f"bound held at all times with {int(held.sum())} of {chosen.seeds} seeds",
                flush=True,
            )

    def change(self) -> None:
        """Print the audited tokens from a change of domain to the alarm."""
        domains = [self.measured(name) for name in ("text", "source")]
        share_left = [
            np.mean([token is not None for text in texts for token in text]) for texts in domains
        ]
        left = ", then ".join(f"{100 * share:.0f}%" for share in share_left)
        print(f"change: tokens that leave: {left}")
        for at, risk in enumerate(RISKS):
            lists = [
                [[token[at] for token in text if token is not None] for text in texts]
                for texts in domains
            ]
            before, after = (float(np.mean(np.concatenate(texts))) for texts in lists)
            print(f"  {risk}: {before:.4f}, then {after:.4f}: ", end="")
            print(self._delays(lists, before), flush=True)

    def _delays(self, lists: list[list[list[float]]], before: float) -> str:
        chosen = self.chosen
        ratios = class_ratios(*(np.concatenate(texts) for texts in lists))
        low, high = before / chosen.margin, min(before * chosen.margin, 0.99)
        delays, learned, best = [], [], []
        for seed in range(chosen.streams):
            random = np.random.default_rng(seed)
            stream = np.concatenate(
                [
                    audited(texts, count, chosen.share, random)
                    for texts, count in zip(lists, (BEFORE, MOST), strict=True)
                ]
            )
            detector = ChangeDetector(low=low, high=high)
            delays.append(delay(detector.observe, stream))
            learned.append(delay(watching(RiskWatch()), stream))
            best.append(delay(Known(ratios, detector.run_length).observe, stream))
        least = float(np.median(best))
        parts = []
        for name, counts in (("learned range", learned), ("given range", delays)):
            found, flagged = float(np.median(counts)), sum(count < MOST for count in counts)
            parts.append(
                f"{name}: flagged after {found:,.0f} audited tokens ({found / chosen.share:,.0f} "
                f"that left; {flagged} of {chosen.streams} streams within {MOST:,}), ratio "
                f"{found / least:.1f}"
            )
        return f"{'; '.join(parts)}; knowing both distributions: {least:,.0f}"


def python_source() -> str:
    """Return files of the standard library, one after the other."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
    return text[:SOURCE_CHARACTERS]


def replay(
    tokens: Sequence[Outcome], at: int, share: float, seed: int
) -> tuple[float, float, float, bool]:
    """Audit a share of the tokens; return the estimate, both bounds, and whether the upper held.

    The bound is compared with the mean of what really happened, at every token that left. Between
    two audits it falls and the mean rises or falls, so all tokens are looked at.
    """
    log = AuditLog(share=share)
    audit = log.audits[RISKS[at]]
    coins = np.random.default_rng(seed).random(len(tokens)) < share
    lost, held = 0.0, True
    for token, audited_too in zip(tokens, coins, strict=True):
        if token is None:
            audit.ran_whole()
            continue
        lost += token[at]
        if audited_too:
            audit.audited_loss(token[at])
        else:
            audit.left()
        held = held and lost <= audit.most_lost + 1e-9
    return audit.estimate or 0.0, audit.lower_left, audit.upper_left, held


def audited(
    texts: list[list[float]], count: int, share: float, random: np.random.Generator
) -> np.ndarray:
    """Return the first ``count`` audited losses of a stream of texts, drawn with replacement."""
    found: list[float] = []
    while len(found) < count:
        text = np.array(texts[random.integers(len(texts))])
        found += text[random.random(len(text)) < share].tolist()
    return np.array(found[:count])


def class_ratios(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the likelihood ratio of each class of losses, from all losses of both domains."""
    counts = [
        np.bincount(np.searchsorted(EDGES, losses, side="right"), minlength=len(EDGES) + 1) + 0.5
        for losses in (before, after)
    ]
    shares = [count / count.sum() for count in counts]
    ratios: np.ndarray = shares[1] / shares[0]
    return ratios


class Known:
    """The recursion of Shiryaev and Roberts, with the true likelihood ratios."""

    def __init__(self, ratios: np.ndarray, run_length: float) -> None:
        self.ratios, self.run_length, self.state = ratios, run_length, 0.0

    def observe(self, loss: float) -> bool:
        self.state = (self.state + 1) * self.ratios[np.searchsorted(EDGES, loss, side="right")]
        if self.state < self.run_length:
            return False
        self.state = 0.0
        return True


def watching(watch: RiskWatch) -> Callable[[float], bool]:
    """Return a function that takes a loss and says whether it raises an alarm."""

    def observe(loss: float) -> bool:
        before = watch.alarms
        watch.observe(loss, tokens=0)
        return watch.alarms > before

    return observe


def delay(observe: Callable[[float], bool], losses: np.ndarray) -> int:
    """Return the number of audited tokens from the change to the next alarm."""
    alarms: Iterator[int] = (
        count for count, loss in enumerate(losses.tolist(), 1) if observe(loss) and count > BEFORE
    )
    return next(alarms, BEFORE + MOST) - BEFORE


if __name__ == "__main__":
    main()
