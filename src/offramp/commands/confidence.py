"""How good each confidence measure is on a text: ``offramp confidence``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.calibration.fitting import fit_gates, fit_temperatures
from offramp.commands.text import OnTokens, read_text, training_ids, windows
from offramp.data.corpus import load_corpus
from offramp.errors import ConfigError
from offramp.evaluation.quality import Quality, Reliability, frontier, quality
from offramp.evaluation.sample import collect_sample
from offramp.exits.confidence import CONFIDENCE, confidence_named
from offramp.exits.gate import GATE_KINDS, FittedExits, GateConfig
from offramp.models.fitted import save_fitted
from offramp.models.open import OpenedModel

CURVE_POINTS = 101
OnGate = Callable[[int, int], None]
"""Called after each gate with (gates fitted, gates in all)."""


def usable_measures(opened: OpenedModel) -> tuple[str, ...]:
    """Names of the measures that this model can use.

    Those that need a gate are left out if no gate was fitted, and ``patience``, which counts
    exits that agree, if the model has one early exit only.
    """
    early = opened.model.exit_layers[:-1]
    return tuple(
        name
        for name, measure in CONFIDENCE.items()
        if not (measure.needs_gate and not set(early) <= set(opened.fitted.gates.get(name, ())))
        and not (name == "patience" and len(early) < 2)
    )


def measure_confidence(
    opened: OpenedModel,
    corpus: str,
    *,
    measures: Sequence[str] = (),
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """What ``offramp confidence`` writes: each measure's quality and frontier, from one pass.

    ``measures`` are their names; by default all that the model can use.
    """
    opened.require_exits()
    names = tuple(measures) or usable_measures(opened)
    for name in names:
        confidence_named(name)
    text = read_text(opened, corpus)
    trace = text.trace(names, on_tokens=on_tokens)
    cost = text.cost()
    return {
        **text.about(),
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
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


def fit(
    opened: OpenedModel,
    corpus: str,
    *,
    max_tokens: int = 131_072,
    config: GateConfig | None = None,
    on_gate: OnGate = lambda done, total: None,
) -> OpenedModel:
    """Fit gates to a corpus's training text and temperatures to its validation text.

    They are kept in the ``fitted.safetensors`` of the model's folder; the model stays as it is.
    Returns the model with them. Raises ConfigError for a model that has no folder.
    """
    files = opened.files
    if files is None or files.own is None or files.cached:
        raise ConfigError(f"{opened.name}: expected the folder of a model, to keep its gates in")
    fitted = fit_to(opened, corpus, max_tokens=max_tokens, config=config, on_gate=on_gate)
    save_fitted(fitted, files.own, exits=files.exits_sha256)
    return replace(opened, fitted=fitted)


def fit_to(
    opened: OpenedModel,
    corpus: str,
    *,
    max_tokens: int = 131_072,
    config: GateConfig | None = None,
    on_gate: OnGate = lambda done, total: None,
) -> FittedExits:
    """Fit the gates and temperatures that ``fit`` keeps."""
    opened.require_exits()
    ids = training_ids(opened, load_corpus(corpus))
    return fit_to_ids(opened, *ids, max_tokens=max_tokens, config=config, on_gate=on_gate)


def fit_to_ids(
    opened: OpenedModel,
    train_ids: Int[Tensor, " N"],
    validation_ids: Int[Tensor, " M"],
    *,
    max_tokens: int = 131_072,
    config: GateConfig | None = None,
    on_gate: OnGate = lambda done, total: None,
) -> FittedExits:
    """Fit gates to the training ids and temperatures to the validation ids of a text."""
    config = config or GateConfig()
    total = len(GATE_KINDS) * (len(opened.model.exit_layers) - 1)
    done = count(1)
    order = torch.Generator().manual_seed(config.seed)
    gates = collect_sample(opened.model, windows(opened, train_ids, order), max_tokens=max_tokens)
    order.manual_seed(config.seed)
    held_out = collect_sample(
        opened.model, windows(opened, validation_ids, order), max_tokens=max_tokens
    )
    return FittedExits(
        gates={
            kind: fit_gates(kind, gates, config, on_gate=lambda: on_gate(next(done), total))
            for kind in GATE_KINDS
        },
        temperatures=fit_temperatures(opened.model, held_out),
        draft_vocab=opened.fitted.draft_vocab,
        bos=bool(opened.first_tokens),
    )


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
