"""Decode with a model whose exits are complete and with its standard twin, interleaved in one run.

Both have the same width and depth, and are trained on the same tokens: WikiText-2 and the Python
files of the installed standard library. The standard model has no early exits. In the other one
every block above a layer takes its keys and values from the state after it, so that its exits are
complete; it is trained by the recipe (adapter heads, alpha from 0.9 to 0.1 along a cosine, ``gain``
gates). The price of its policy is the highest at which its PPL on held-out text is no worse than
the standard model's. Then both decode test text of which neither has seen anything; each token
leaves at the exit that its gate chooses. ``--static 1,2`` adds standard models of one and two
layers: whether exits pay is seen against these.

    python benchmarks/complete_exits.py --out RUNS --wikitext FOLDER --train --time
    python benchmarks/complete_exits.py --untrained 0.25,0.6 --time
    python benchmarks/complete_exits.py --out RUNS --wikitext FOLDER --train --time --device cuda \\
        --tokens 30_000_000 --batch-size 64 --seeds 3

``--train`` trains what OUT does not have yet; stopped, it continues. ``--train-steps 20`` stops
every run after 20 steps and says what a whole one costs. ``--untrained SHARES`` times random
parameters instead: of the tokens that reach the n-th exit, the n-th share leaves there.
"""

import argparse
import json
import math
import shutil
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.calibration.fitting import fit_exits
from offramp.data import batches, encode, make_tokenizer
from offramp.data.tokenizer import TOKENIZER_FILE, save_tokenizer
from offramp.environment import environment
from offramp.evaluation.cost import model_cost
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.exits.gate import FittedExits, Gate, GateConfig
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.files import file_sha256, write_json
from offramp.generation.decoding_time import DecodingTime, ReplayedExits, decoding_time
from offramp.generation.exit_rule import ExitRule
from offramp.models.fitted import load_fitted, save_fitted
from offramp.models.native.checkpoint import load_checkpoint, save_checkpoint
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig
from offramp.training.loop import Progress, new_model, train

STANDARD, RECIPE = "standard", "recipe"
RECIPE_LOSS = {
    "loss_weights": "asymmetric_exits:0.9",
    "alpha_end": 0.1,
    "alpha_schedule": "cosine",
}
PRICES = np.geomspace(1e-6, 1e-1, 61)
"""Nats for one percent of FLOPs that policies may weigh."""
GATE_TOKENS, EVALUATED_TOKENS = 262_144, 131_072


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    results = []
    for seed in range(1 if options.untrained else options.seeds):
        if options.train:
            for name in names(options):
                train_one(options, name, seed)
        if options.time and not options.train_steps:
            results.append(compared(options, seed))
            print(json.dumps(results[-1], indent=1))
    if results and options.out:
        about = {
            "options": {key: str(value) for key, value in vars(options).items() if value},
            "environment": environment(options.device),
        }
        write_json(options.out / "result.json", {"seeds": results, **about})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder of the runs")
    add("--wikitext", type=Path, help="folder with valid.txt (trained on) and test.txt")
    add("--train", action="store_true")
    add("--time", action="store_true")
    add("--train-steps", type=int, help="stop every run after this many steps; nothing is kept")
    add("--untrained", type=numbers, help="shares that leave at each exit, of those that reach it")
    add("--source", type=int, default=1, help="layer whose state gives keys and values")
    add("--upper-hidden", type=int, help="hidden units of the blocks without keys and values")
    add("--exits", type=numbers, default=(1.0, 2.0))
    add("--layers", type=int, default=8)
    add(
        "--static", type=numbers, default=(), help="layers of shallower standard models beside them"
    )
    add("--width", type=int, default=512)
    add("--vocabulary", type=int, default=4096)
    add("--tokens", type=int, default=2_000_000, help="training tokens of each model")
    add("--batch-size", type=int, default=4, help="windows in a training step")
    add("--lr", type=float, default=1e-3)
    add("--prompt", type=int, default=512, help="tokens of a prompt")
    add("--new", type=int, default=64, help="tokens that are decoded after it")
    add("--rounds", type=int, default=9)
    add("--batches", type=numbers, default=(1.0, 8.0), help="texts in a batch")
    add("--seeds", type=int, default=1)
    add("--device", default="cpu")
    add("--dtype", default="float32", help="precision of decoding")
    add("--threads", type=int, default=1)
    options = parser.parse_args()
    options.batches = tuple(int(batch) for batch in options.batches)
    if not options.untrained and not (options.out and options.wikitext):
        parser.error("expected --out and --wikitext, or --untrained")
    if min(options.exits) < options.source:
        parser.error("expected exits at or above --source: others are not complete")
    return options


def names(options: argparse.Namespace) -> tuple[str, ...]:
    return (STANDARD, RECIPE, *static(options))


def static(options: argparse.Namespace) -> dict[str, int]:
    """The names of the shallower standard models, and their layers."""
    return {f"static{layers:.0f}": int(layers) for layers in options.static}


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def config_of(options: argparse.Namespace, name: str) -> DecoderConfig:
    shape = DecoderConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        intermediate_size=options.width * 21 // 8,
        max_position_embeddings=options.prompt + options.new,
        exit_layers=(),
    )
    if name in (shallow := static(options)):
        return replace(shape, num_hidden_layers=shallow[name], exit_layers=())
    if name == STANDARD:
        return shape
    exits = tuple(int(layer) for layer in options.exits)
    return replace(
        shape,
        exit_layers=exits,
        exit_head="adapter",
        kv_source_layer=options.source,
        upper_intermediate_size=options.upper_hidden,
    )


class Corpus:
    """The texts in tokens: to train on, to choose the policy on (held out), and to report on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        folder = Path(sysconfig.get_paths()["stdlib"])
        inner = ("site-packages", "test", "idlelib", "lib2to3")
        files = [
            path
            for path in sorted(folder.rglob("*.py"))
            if not any(part in inner for part in path.relative_to(folder).parts)
        ]
        python = [path.read_text(encoding="utf-8", errors="replace") for path in files]
        wiki = [(options.wikitext / f"{split}.txt").read_text() for split in ("valid", "test")]
        cut = len(wiki[0]) * 19 // 20
        code = {part: "\n".join(python[start::20]) for part, start in (("held", 9), ("test", 19))}
        rest = [text for place, text in enumerate(python) if place % 20 not in (9, 19)]
        self.texts = {
            "train": wiki[0][:cut] + "\n".join(rest),
            "held": (wiki[0][cut:], code["held"]),
            "test": (wiki[1], code["test"]),
        }

    @cached_property
    def tokenizer(self) -> Any:
        path = self.options.out / TOKENIZER_FILE
        if not path.exists():
            self.options.out.mkdir(parents=True, exist_ok=True)
            made = make_tokenizer(f"bpe:{self.options.vocabulary}", [self.texts["train"]])
            save_tokenizer(made, self.options.out)
        return make_tokenizer(str(path), [])

    @cached_property
    def train(self) -> Tensor:
        return encode(self.tokenizer, self.texts["train"])

    def evaluated(self, part: str) -> Tensor:
        """The first tokens of the prose and of the code, of each as many."""
        each = EVALUATED_TOKENS // 2
        return torch.cat([encode(self.tokenizer, text)[:each] for text in self.texts[part]])

    def windows(self, ids: Tensor, *, seed: int | None = None) -> Any:
        order = None if seed is None else torch.Generator().manual_seed(seed)
        length = self.options.prompt + self.options.new
        return batches(ids, seq_len=length, batch_size=8, order=order)


def train_one(options: argparse.Namespace, name: str, seed: int) -> None:
    """Train a model and fit its gates, unless its folder is there."""
    folder = options.out / f"{name}-{seed}"
    if folder.exists():
        return
    corpus = Corpus(options)
    tokens, held = corpus.train.to(options.device), corpus.evaluated("held").to(options.device)
    length = options.prompt + options.new
    steps = math.ceil(options.tokens / (options.batch_size * length))
    config = TrainConfig(
        **(RECIPE_LOSS if name == RECIPE else {"loss_weights": "standard"}),
        steps=steps,
        seq_len=length,
        batch_size=options.batch_size,
        lr=options.lr,
        warmup_steps=max(1, steps // 20),
        schedule="cosine",
        precision="bfloat16",
        eval_every=steps,
        checkpoint_every=max(1, steps // 20),
        seed=seed,
    )
    model = new_model(config_of(options, name), seed=seed).to(options.device)
    began, cpu, seen = time.perf_counter(), time.process_time(), []

    def on_step(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step % max(1, steps // 20) == 0 or progress.step == options.train_steps:
            each = (
                (time.perf_counter() - began) / len(seen),
                (time.process_time() - cpu) / len(seen),
            )
            print(
                f"{name} {seed}: step {progress.step} of {steps}, loss {float(progress.loss):.3f}, "
                f"{each[0]:.2f} s a step ({each[1]:.2f} s of processor time); a whole run takes "
                f"{steps * each[0] / 60:.0f} min ({steps * each[1] / 60:.0f})",
                flush=True,
            )

    part = options.out / f"{name}-{seed}.part"
    dry = options.train_steps is not None
    result = train(
        model,
        tokens,
        held[: 8 * length + 1],
        config,
        on_step=on_step,
        should_stop=lambda: dry and seen[-1] >= options.train_steps,
        checkpoints=None if dry else Checkpoints(folder=part),
    )
    if not result.finished:
        return
    model.eval()
    if name == RECIPE:
        fitted = fit_exits(
            model,
            corpus.windows(corpus.train, seed=seed),
            kinds=["gain"],
            max_tokens=GATE_TOKENS,
            config=GateConfig(seed=seed, steps=5000),
        )
    about = {"training": {"tokens": options.tokens, "seconds": time.perf_counter() - began}}
    done = options.out / f"{name}-{seed}.tmp"
    done.mkdir(exist_ok=True)
    save_checkpoint(model, done, about=about, weights_about={})
    if name == RECIPE:
        save_fitted(fitted, done, exits=file_sha256(done / "model.safetensors"))
    done.rename(folder)
    shutil.rmtree(part)


def compared(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The figures of one seed: PPL, policy and the interleaved times."""
    if options.untrained:
        models = {name: new_model(config_of(options, name), seed=0) for name in names(options)}
        length = options.prompt + options.new
        random = torch.Generator().manual_seed(0)
        shape = (max(options.batches) * options.rounds, length)
        texts = torch.randint(options.vocabulary, shape, generator=random)
        rules, found = forced(options, models[RECIPE]), {"shares": options.untrained}
    else:
        corpus = Corpus(options)
        models = {
            name: load_checkpoint(options.out / f"{name}-{seed}", device=options.device)[0]
            for name in names(options)
        }
        fitted = load_fitted(options.out / f"{RECIPE}-{seed}", device=options.device)
        policy, found = chosen(corpus, models, fitted, options)
        rule = ExitRule(policy=policy, confidence="gain", fitted=fitted)

        def rules(batch: int) -> ExitRule:
            return rule

        test = corpus.evaluated("test")
        length = options.prompt + options.new
        starts = np.linspace(0, len(test) - length, max(options.batches) * options.rounds).astype(
            int
        )
        texts = torch.stack([test[start : start + length] for start in starts.tolist()])
    for model in models.values():
        model.eval().to(options.device, getattr(torch, options.dtype)).silence_untrained()
    cases = {
        STANDARD: (models[STANDARD], lambda batch: None),
        f"{RECIPE}, full depth": (models[RECIPE], lambda batch: None),
        f"{RECIPE}, exits": (models[RECIPE], rules),
    }
    for name in static(options):
        cases[name] = (models[name], lambda batch: None)
    return {**found, **measured(options, cases, texts)}


def forced(options: argparse.Namespace, model: Transformer) -> Any:
    """Return what makes a rule by which tokens leave at random with the given shares."""
    early = model.exit_layers[:-1]
    gates = {
        layer: Gate(model.hidden_size, outputs=len(early) - place).eval().to(options.device)
        for place, layer in enumerate(early)
    }
    random = np.random.default_rng(0)

    def rule(batch: int) -> ReplayedExits:
        exits = np.full((batch, options.new), len(early))
        for index in reversed(range(len(early))):
            leaves = random.random(exits.shape) < options.untrained[index]
            exits = np.where(leaves, index, exits)
        return ReplayedExits(
            policy=ThresholdPolicy(thresholds=(0.0,) * len(early)),
            confidence="gain",
            fitted=FittedExits(gates={"gain": gates}),
            exits=exits,
        )

    return rule


def chosen(
    corpus: Corpus, models: dict[str, Transformer], fitted: FittedExits, options: Any
) -> tuple[GainPolicy, dict[str, Any]]:
    """The policy of the highest price that is no worse than the standard model on held-out text."""
    length = options.prompt + options.new
    cost = model_cost(models[RECIPE], context=(length + 1) / 2, fitted=fitted)
    standard = model_cost(models[STANDARD], context=(length + 1) / 2)
    costs = cost.flops_pct_by_exit("gain")
    policies = [GainPolicy(price=float(price), costs=costs) for price in PRICES]
    traces: dict[tuple[str, str], ExitTrace] = {}
    for part in ("held", "test"):
        ids = corpus.evaluated(part)
        for name, model in models.items():
            measures = ("gain",) if name == RECIPE else ()
            traces[name, part] = collect_trace(
                model, corpus.windows(ids), measures=measures, fitted=fitted
            )
    bar = traces[STANDARD, "held"].ppl(options.layers)
    kept = [each for each in policies if routed(traces[RECIPE, "held"], each)[0] <= bar]
    policy = kept[-1] if kept else policies[0]
    ppl, shares = routed(traces[RECIPE, "test"], policy)
    frontier = [routed(traces[RECIPE, "test"], each) for each in policies[::4]]
    return policy, {
        "price": policy.price,
        "ppl": {
            STANDARD: traces[STANDARD, "test"].ppl(options.layers),
            f"{RECIPE}, full depth": traces[RECIPE, "test"].ppl(options.layers),
            f"{RECIPE}, exits": ppl,
            **{name: traces[name, "test"].ppl(at) for name, at in static(options).items()},
        },
        "exit_ppl": {layer: traces[RECIPE, "test"].ppl(layer) for layer in cost.exit_layers},
        "shares": shares,
        "flops_pct": float(np.dot(shares, costs)) * cost.full / standard.full,
        "static_flops_pct": {
            name: 100 * model_cost(models[name], context=(length + 1) / 2).full / standard.full
            for name in static(options)
        },
        "frontier": [
            {"ppl": each, "flops_pct": float(np.dot(at, costs)) * cost.full / standard.full}
            for each, at in frontier
        ],
    }


def routed(trace: ExitTrace, policy: GainPolicy) -> tuple[float, list[float]]:
    """(PPL, share of the tokens at each exit); exact, because the exits are complete."""
    assert trace.expected_kl is not None
    here = policy.leaving([losses[place:] for place, losses in enumerate(trace.expected_kl)])
    return math.exp((here * trace.nll).sum(0).mean()), here.mean(1).tolist()


def measured(options: argparse.Namespace, cases: dict[str, Any], texts: Tensor) -> dict[str, Any]:
    """Decode with every model in turns; ratios are medians over the rounds."""
    times: dict[tuple[str, int], list[DecodingTime]] = {}
    for round_, batch in rounds(options):
        first = round_ * batch if round_ >= 0 else 0
        for name, (model, rule) in cases.items():
            found = decoding_time(
                model,
                texts[first : first + batch].to(options.device),
                prompt_tokens=options.prompt,
                rule=rule(batch),
            )
            if round_ >= 0:  # the first round only prepares
                times.setdefault((name, batch), []).append(found)
    rows = {}
    for (name, batch), mine in times.items():
        theirs = times[STANDARD, batch]
        rows[f"{name}, batch {batch}"] = {
            "tokens_per_s": statistics.median(each.tokens_per_s for each in mine),
            "to_standard": middle(
                [a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, theirs, strict=True)]
            ),
            "first_token_ms": 1000 * statistics.median(each.first_seconds for each in mine),
            "first_to_standard": middle(
                [a.first_seconds / b.first_seconds for a, b in zip(mine, theirs, strict=True)]
            ),
            "mean_layers": statistics.fmean(each.mean_layers for each in mine),
        }
    return {"measured": rows, "first_bar": (options.source + 1) / options.layers + 0.1}


def middle(ratios: Sequence[float]) -> list[float]:
    """Median, least and largest."""
    return [statistics.median(ratios), min(ratios), max(ratios)]


def rounds(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    for round_ in range(-1, options.rounds):
        for batch in options.batches:
            yield round_, batch


if __name__ == "__main__":
    main()
