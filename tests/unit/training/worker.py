"""Trains in one of several processes, as torchrun starts it, or alone, as a test calls ``run``:
``torchrun --nproc-per-node 2 worker.py CASES.json OUT.json``.
"""

import faulthandler
import json
import sys
from pathlib import Path

import torch

from offramp.errors import OfframpError
from offramp.models.native.config import DecoderConfig
from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig
from offramp.training.distributed import Processes, join, whole
from offramp.training.loop import new_model, train

TEXT = (torch.arange(4000) * 7 + torch.arange(4000) ** 2) % 11


def run(case, processes=Processes(device=torch.device("cpu"))):  # noqa: B008
    """What came of a case: {"model": fields, "training": fields, and what is to happen}."""
    model = new_model(DecoderConfig(vocab_size=11, **_fields(case["model"])), seed=5)
    curve, validations = [], []

    def on_step(progress):
        layers = {str(layer): float(part) for layer, part in progress.losses.items()}
        curve.append({"loss": float(progress.loss), **layers})
        if progress.step == case.get("nan_after") and processes.rank == processes.size - 1:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)

    def should_stop():  # the last process alone says so
        return len(curve) == case.get("stop_after") and processes.rank == processes.size - 1

    checkpoints, finished, error = None, None, None
    if "checkpoints" in case:
        own = str(processes.rank) if case.get("folders_differ") else ""
        checkpoints = Checkpoints(folder=Path(case["checkpoints"]) / own)
    try:
        finished = train(
            model,
            TEXT,
            TEXT[:90],
            TrainConfig(**_fields(case["training"])),
            on_step=on_step,
            on_validation=lambda found: validations.append([found.score, *found.exit_ppl.values()]),
            should_stop=should_stop,
            checkpoints=checkpoints,
        ).finished
    except OfframpError as raised:
        error = str(raised)
    parameters = whole(dict(model.named_parameters()), processes)
    return {
        "curve": curve,
        "validations": validations,
        "finished": finished,
        "error": error,
        "sharded": sum(type(value).__name__ == "DTensor" for value in model.parameters()),
        "parameters": {name: value.detach().tolist() for name, value in parameters.items()},
    }


def _fields(stored):
    """JSON has lists where configs have tuples."""
    return {key: tuple(at) if isinstance(at, list) else at for key, at in stored.items()}


def main(cases, out):
    faulthandler.dump_traceback_later(150, exit=True)  # where one waits for the other for ever
    processes = join("cpu")
    outcomes = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        outcomes[name] = [None] * processes.size
        torch.distributed.all_gather_object(outcomes[name], run(case, processes))
    if processes.is_main:
        Path(out).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
