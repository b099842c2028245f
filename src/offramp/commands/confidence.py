"""How good each confidence measure is on a text: ``offramp confidence``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.calibration.fitting import fit_gates, fit_temperatures, save_fitted
from offramp.commands.reading import OnTokens, Reading, open_reading
from offramp.data import encode
from offramp.errors import ConfigError, CorpusError
from offramp.evaluation.quality import Quality, Reliability, frontier, quality
from offramp.evaluation.sample import collect_sample
from offramp.exits.confidence import CONFIDENCE, confidence_named
from offramp.exits.gate import GATE_KINDS, FittedExits, GateConfig
from offramp.models.open import load_tokenizer

CURVE_POINTS = 101


def usable_measures(reading: Reading) -> tuple[str, ...]:
    """The measures that this model can have: without gates those of gates are left out.

    ``patience`` says nothing with one exit before the last.
    """
    early = reading.model.exit_layers[:-1]
    return tuple(
        name
        for name, measure in CONFIDENCE.items()
        if not (measure.needs_gate and not set(early) <= set(reading.fitted.gates.get(name, ())))
        and not (name == "patience" and len(early) < 2)
    )


def measure_confidence(
    folder: Path,
    corpus_name: str,
    *,
    measures: Sequence[str] = (),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """What ``offramp confidence`` writes: each measure's quality and frontier, from one pass.

    ``measures``: all that the model can have, unless some are named.
    """
    reading = open_reading(folder, corpus_name, device=device, dtype=dtype)
    if len(reading.model.exit_layers) < 2:
        raise ConfigError("exit layers: expected at least one before the last, got none")
    names = tuple(measures) or usable_measures(reading)
    for name in names:
        confidence_named(name)
    trace = reading.trace(names, on_tokens=on_tokens)
    cost = reading.cost()
    return {
        **reading.about(),
        "untrained": reading.untrained,
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
        "temperatures": dict(reading.fitted.temperatures),
        "measures": [
            {
                "confidence": name,
                "exits": [_quality(part) for part in quality(trace, name)],
                "frontier": [
                    {
                        "threshold": row.threshold,
                        "ppl": row.ppl,
                        "compute_pct": row.compute_pct,
                        "flops_pct": row.flops_pct,
                    }
                    for row in frontier(trace, name, cost=cost)
                ],
            }
            for name in names
        ],
    }


def fit_folder(
    folder: Path,
    corpus_name: str,
    *,
    max_tokens: int = 131_072,
    config: GateConfig | None = None,
    device: str = "cpu",
) -> FittedExits:
    """Fit gates to a corpus's training text and temperatures to its validation text; keep them.

    They go into the folder's ``exits.safetensors``; the model stays as it is.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected the folder of a model, to keep its gates in")
    reading = open_reading(folder, corpus_name, device=device)
    if len(reading.model.exit_layers) < 2:
        raise ConfigError("exit layers: expected at least one before the last, got none")
    config = config or GateConfig()
    tokenizer = load_tokenizer(folder)
    train_ids, validation_ids = (
        encode(tokenizer, text) for text in (reading.corpus.train, reading.corpus.validation)
    )
    if len(train_ids) < 2 or len(validation_ids) < 2:
        raise CorpusError(f"{corpus_name}: expected at least 2 tokens to train and to validate")
    order = torch.Generator().manual_seed(config.seed)
    gates = collect_sample(reading.model, reading.windows(train_ids, order), max_tokens=max_tokens)
    order.manual_seed(config.seed)
    held_out = collect_sample(
        reading.model, reading.windows(validation_ids, order), max_tokens=max_tokens
    )
    fitted = FittedExits(
        gates={kind: fit_gates(kind, gates, config) for kind in GATE_KINDS},
        temperatures=fit_temperatures(reading.model, held_out),
        draft_vocab=reading.fitted.draft_vocab,
    )
    save_fitted(fitted, folder)
    return fitted


def _quality(part: Quality) -> dict[str, Any]:
    shown = np.unique(np.linspace(0, len(part.curve.risk) - 1, CURVE_POINTS).astype(int))
    return {
        "exit_layer": part.exit_layer,
        "agreement": part.agreement,
        "aurc": part.aurc,
        "auroc": _number(part.auroc),
        "ece": None if part.reliability is None else part.reliability.ece,
        "ece_target": None if part.reliability_target is None else part.reliability_target.ece,
        "risk_coverage": {
            "coverage": part.curve.coverage[shown].tolist(),
            "risk": part.curve.risk[shown].tolist(),
        },
        "reliability": None if part.reliability is None else _bins(part.reliability),
    }


def _bins(said: Reliability) -> dict[str, Any]:
    return {
        "count": said.count.tolist(),
        "confidence": _numbers(said.confidence),
        "accuracy": _numbers(said.accuracy),
    }


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [_number(float(value)) for value in values]


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
