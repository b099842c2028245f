"""Compare the ``gain`` gate with ``max_prob`` at equal FLOPs.

A model of 6 layers with an exit after 2 is trained on the characters of WikiText-2's valid.txt,
with weight 0.5 for both exits, and then frozen. The gates are fitted on the same text. Then each
measure decides where tokens of the first 131,072 characters of test.txt leave, at the same
flops_pct, which includes the cost of heads and gates. Figures are PPL under
missing_kv="recompute".

    python benchmarks/gain_gate.py FOLDER                     # FOLDER holds valid.txt and test.txt
    python benchmarks/gain_gate.py FOLDER --models runs/gain  # keeps and reuses the models
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from offramp.calibration.budget import keep_budget
from offramp.calibration.fitting import fit_exits
from offramp.data import batches, character_tokenizer, encode
from offramp.evaluation.cost import model_cost
from offramp.evaluation.trace import collect_trace
from offramp.exits.gate import GateConfig
from offramp.models.native.checkpoint import load_checkpoint, save_checkpoint
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.training.config import TrainConfig
from offramp.training.loop import new_model, train

MODEL = DecoderConfig(
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=336,
    exit_layers=(2,),
    exit_head="norm",
)
TRAINING = TrainConfig(
    loss_weights="2=0.5,6=0.5",
    steps=900,
    eval_every=900,
    seq_len=128,
    batch_size=32,
    lr=2e-3,
    warmup_steps=50,
    schedule="cosine",
)
TEST_CHARACTERS = 131_072
MEASURES = ("max_prob", "margin", "entropy", "saturation", "gate", "gain")
BUDGETS = (80.0, 70.0, 65.0, 60.0, 50.0)
TARGET_BUDGET, TARGET_RATIO = 65.0, 0.975


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="with WikiText-2's valid.txt and test.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--models", type=Path, help="keep trained models in this folder, and reuse them"
    )
    parser.add_argument("--gate-steps", type=int, default=GateConfig().steps)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train_text = (arguments.folder / "valid.txt").read_text(encoding="utf-8")
    test_text = (arguments.folder / "test.txt").read_text(encoding="utf-8")[:TEST_CHARACTERS]
    tokenizer = character_tokenizer(train_text)
    train_ids, test_ids = encode(tokenizer, train_text), encode(tokenizer, test_text)
    ratios = []
    for seed in arguments.seeds:
        config = replace(MODEL, vocab_size=tokenizer.get_vocab_size())
        model = trained(config, train_ids, seed, arguments.models)
        ppl = compare(model, train_ids, test_ids, GateConfig(steps=arguments.gate_steps, seed=seed))
        ratios.append(ppl["gain"] / ppl["max_prob"])
        print(f"seed {seed}: gain / max_prob at {TARGET_BUDGET:g}% FLOPs: {ratios[-1]:.4f}\n")
    verdict = "met" if max(ratios) <= TARGET_RATIO else "missed"
    print(
        f"gain / max_prob at {TARGET_BUDGET:g}% FLOPs, {len(ratios)} seeds: mean "
        f"{mean(ratios):.4f}, worst {max(ratios):.4f}; target at most {TARGET_RATIO}: {verdict}"
    )


def trained(config: DecoderConfig, ids: Tensor, seed: int, models: Path | None) -> Transformer:
    folder = models / f"seed{seed}" if models else None
    if folder and (folder / "config.json").exists():
        return load_checkpoint(folder)[0]
    start = time.perf_counter()
    model = new_model(config, seed=seed)
    validation = ids[: 64 * TRAINING.seq_len + 1]  # not used: the model of the last step counts
    train(model, ids, validation, replace(TRAINING, seed=seed))
    print(f"seed {seed}: trained in {time.perf_counter() - start:.0f} s")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, folder, about={}, weights_about={})
    return model.eval()


def compare(
    model: Transformer, train_ids: Tensor, test_ids: Tensor, config: GateConfig
) -> dict[str, float]:
    def windows(ids: Tensor, order: torch.Generator | None = None):  # type: ignore[no-untyped-def]
        return batches(ids, seq_len=TRAINING.seq_len, batch_size=32, order=order)

    start = time.perf_counter()
    order = torch.Generator().manual_seed(config.seed)
    fitted = fit_exits(model, windows(train_ids, order), config=config)
    fitting = time.perf_counter() - start
    start = time.perf_counter()
    trace = collect_trace(model, windows(test_ids), measures=MEASURES, fitted=fitted)
    tracing = time.perf_counter() - start
    cost = model_cost(model, context=(TRAINING.seq_len + 1) / 2, fitted=fitted)
    gate_share = 100 * cost.gates["gain"][2] / cost.layers[0]
    print(
        f"PPL at layer 2: {trace.ppl(2):.3f}, at layer 6: {trace.ppl(6):.3f}; both gates fitted in "
        f"{fitting:.0f} s, trace {tracing:.0f} s; a gate costs {gate_share:.1f}% of a layer"
    )
    print("FLOPs%".rjust(8) + "".join(name.rjust(12) for name in MEASURES))
    at_target = {}
    for budget in BUDGETS:
        rows = [keep_budget(trace, budget, cost=cost, confidence=name) for name in MEASURES]
        print(f"{budget:8.0f}" + "".join(f"{row.ppl:12.3f}" for row in rows))
        if budget == TARGET_BUDGET:
            at_target = {name: row.ppl for name, row in zip(MEASURES, rows, strict=True)}
    return at_target


if __name__ == "__main__":
    main()
