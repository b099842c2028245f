"""Whether exits pay on a model: ``offramp probe``."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.commands.text import OnTokens, read_text
from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import ExitTrace
from offramp.generation.promise import drafts_keep_the_text
from offramp.models.base import EarlyExitModel
from offramp.models.open import OpenedModel

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95)
DISAGREEMENT = 0.02
"""Share of tokens that may differ from the full model's in what is called a gain."""
MOST_DRAFTS = 5
"""Drafts of a round at the most, as in ``offramp generate``."""
PAYS_FROM = 1.03
"""Expected speed-ups below this are called none."""


def probe(
    opened: OpenedModel,
    corpus: str,
    *,
    tokens: int | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """What ``offramp probe`` writes, from one pass over the text or its first ``tokens``.

    ``agreement`` is the share of tokens where an exit's first choice is the last layer's,
    ``coverage`` the share whose max_prob there is at least a level, and ``agreement_at`` the
    agreement of those. ``oracle_layers`` is the mean layer of the first exit that agrees: what a
    perfect predictor would need. ``complete_exits`` are those at which a token leaves all keys and
    values that later tokens read.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"tokens: expected at least 1, got {tokens}")
    opened.require_exits()
    text = read_text(opened, corpus)
    if tokens is not None:
        text = text.first(tokens)
    trace = text.trace(("max_prob",), on_tokens=on_tokens)
    cost = text.cost()
    agree = trace.argmax == trace.argmax[-1]
    speedup, how = _expected_speedup(trace, agree, cost)
    drafting = _expected_drafting(trace, agree, cost)
    oracle = float(np.asarray(trace.exit_layers)[agree.argmax(axis=0)].mean())
    untrained = not opened.exits_trained
    complete = complete_exits(opened.model)
    return {
        **text.about(),
        "exits": [_exit(trace, agree, index, cost) for index in range(len(trace.exit_layers))],
        "oracle_layers": oracle,
        "complete_exits": complete,
        "expected_speedup": speedup,
        "expected_speculative_speedup": None if drafting is None else drafting[0],
        "verdict": _verdict(
            trace,
            oracle,
            speedup,
            how,
            drafting,
            same=", with the same tokens" if drafts_keep_the_text(opened.model) else "",
            untrained=untrained,
        )
        + _complete(complete),
    }


def complete_exits(model: EarlyExitModel) -> list[int]:
    """Return the exits below the last layer where no block above writes keys and values."""
    return [n for n in model.exit_layers[:-1] if n >= model.complete_from]


def _complete(exits: list[int]) -> str:
    """Return a sentence about complete exits, after the verdict; empty if there are none."""
    if not exits:
        return ""
    which = f"Exits {', '.join(map(str, exits))} are" if len(exits) > 1 else f"Exit {exits[0]} is"
    return f" {which} complete: a token that leaves there leaves all keys and values exactly."


def _exit(
    trace: ExitTrace, agree: NDArray[np.bool_], index: int, cost: ModelCost | None
) -> dict[str, Any]:
    layer = trace.exit_layers[index]
    sure = {level: trace.confidence["max_prob"][index] >= level for level in CONFIDENCES}
    return {
        "exit_layer": layer,
        "agreement": float(agree[index].mean()),
        "ppl": trace.ppl(layer),
        "coverage": {str(level): float(here.mean()) for level, here in sure.items()},
        "agreement_at": {
            str(level): float(agree[index][here].mean()) if here.any() else None
            for level, here in sure.items()
        },
        "head_cost_layers": None
        if cost is None
        else cost.heads[layer] / float(np.mean(cost.layers)),
    }


def _expected_speedup(
    trace: ExitTrace, agree: NDArray[np.bool_], cost: ModelCost | None
) -> tuple[float | None, str]:
    """The least FLOPs of a policy by max_prob that few tokens notice, and that policy in words.

    A policy uses one exit, or all with a common threshold.
    """
    if cost is None:
        return None, ""
    early = trace.exit_layers[:-1]
    uses: list[tuple[int, ...]] = [(layer, trace.exit_layers[-1]) for layer in early]
    if len(early) > 1:
        uses.append(trace.exit_layers)
    best, how = 1.0, ""
    for layers in uses:
        part, part_cost = trace.at(layers), cost.at(layers)
        rows = [trace.exit_layers.index(layer) for layer in layers]
        scores = part.confidence["max_prob"][:-1]
        grid = np.unique(np.quantile(scores.max(axis=0), np.linspace(0, 1, 101)))
        for threshold, row in zip(grid, sweep(part, grid.tolist(), cost=part_cost), strict=True):
            leaving = scores >= threshold
            first = np.where(leaving.any(axis=0), leaving.argmax(axis=0), len(scores))
            right = agree[rows][first, np.arange(part.num_tokens)].mean()
            assert row.flops_pct is not None
            if 1 - right <= DISAGREEMENT and 100.0 / row.flops_pct > best:
                best = 100.0 / row.flops_pct
                where = ", ".join(map(str, layers[:-1]))
                how = f"exit {where} at max_prob {threshold:.3f}"
    return best, how


def _expected_drafting(
    trace: ExitTrace, agree: NDArray[np.bool_], cost: ModelCost | None
) -> tuple[float, int] | None:
    """The best speed-up of self-speculative decoding, and the exit that drafts.

    Decoding one row reads each weight once a call, for one token or several, and a block's
    FLOPs are in proportion to its weights. With k drafts, each accepted with probability a, a
    round gives (1 - a^(k+1)) / (1 - a) tokens (Leviathan et al. 2023) and reads the blocks up to
    the exit k + 1 times, its head k times, and the rest of the model once.
    """
    if cost is None:
        return None
    best = (1.0, trace.exit_layers[0])
    for index, layer in enumerate(trace.exit_layers[:-1]):
        accepted = min(float(agree[index].mean()), 1 - 1e-9)
        below = sum(cost.layers[:layer])
        for drafts in range(1, MOST_DRAFTS + 1):
            tokens = (1 - accepted ** (drafts + 1)) / (1 - accepted)
            read = drafts * (below + cost.heads[layer]) + cost.full
            best = max(best, (tokens * cost.full / read, layer))
    return best


def _verdict(
    trace: ExitTrace,
    oracle: float,
    speedup: float | None,
    how: str,
    drafting: tuple[float, int] | None,
    *,
    same: str,
    untrained: bool,
) -> str:
    least = f"a perfect predictor would need {oracle:.1f} of {trace.num_layers} layers"
    tune = "; its exits were never trained: tune them first" if untrained else ""
    if speedup is None or drafting is None:
        return f"The FLOPs of this model cannot be counted; {least}{tune}."
    share = f"{100 * DISAGREEMENT:g}% of the tokens"
    times, layer = drafting
    speculation = (
        f" Speculative decoding will pay: drafts by exit {layer} are accepted often enough for "
        f"about {times:.2f} times the speed of full depth{same}."
        if times >= PAYS_FROM
        else " Speculative decoding with drafts by an exit will not pay either."
        if speedup < PAYS_FROM
        else ""
    )
    if speedup < PAYS_FROM:
        return (
            f"Exits will not pay as they are: no threshold on max_prob saves FLOPs (heads "
            f"counted) while at most {share} differ, though {least}{tune}.{speculation}"
        )
    return (
        f"Exits will pay: {how} needs {100 / speedup:.0f}% of the FLOPs (heads counted), "
        f"{speedup:.2f} times fewer, while at most {share} differ; {least}{tune}.{speculation}"
    )
