"""The cost of a request's new tokens: layers, and estimated FLOPs."""

import math

from offramp.evaluation.cost import model_cost
from offramp.exits.policy import ThresholdPolicy
from offramp.generation.blocks_run import layers_run
from offramp.generation.requests import Request
from offramp.models.missing_kv import MissingKV
from offramp.models.open import OpenedModel


class Costs:
    """Costs of the requests of one model, whose FLOPs are counted once.

    A token is taken to attend to half a window of the model's training.
    """

    def __init__(self, opened: OpenedModel) -> None:
        self._layers, self._cache_layers = opened.model.num_layers, opened.model.cache_layers
        self._exits = tuple(opened.model.exit_layers)
        context = (opened.window + 1) / 2
        self._cost = model_cost(opened.model, context=context, fitted=opened.fitted)

    def by_exit(self, confidence: str, missing_kv: str = "propagate") -> dict[int, float]:
        """Return the FLOPs of a token that leaves at each exit, in percent of full depth."""
        found = self._cost.flops_pct_by_exit(confidence, missing_kv=missing_kv)
        return dict(zip(self._exits, found, strict=True))

    def mean_layers(self, request: Request) -> float:
        """Return the mean number of layers per new token, as ``generate`` does.

        The first token ran all layers. Drafts that were rejected count, and so do layers that run
        later for missing keys and values (``recompute``).
        """
        tokens = request.completion.tokens
        if request.config.speculative:
            run = request.draft_work.layers_run + self._layers
        else:
            run = sum(self._run(request))
        return run / max(1, len(tokens))

    def flops_pct(self, request: Request) -> float:
        """Return the estimated FLOPs of the new tokens, in percent of full depth."""
        tokens = request.completion.tokens
        if request.config.speculative:
            return self._drafted(request) / max(1, len(tokens))
        if request.rule is None or not tokens:
            return 100.0
        policy = request.rule.policy
        evaluated = None
        if isinstance(policy, ThresholdPolicy):
            evaluated = [threshold < math.inf for threshold in policy.thresholds]
        found = self._cost.flops_pct_by_exit(
            request.rule.confidence,
            evaluated=evaluated,
            missing_kv=_way(request),
        )
        pct = dict(zip(self._exits, found, strict=True))
        total = sum(pct[token.exit_layer] for token in tokens)
        for token, ran in zip(tokens, self._run(request), strict=True):
            total += 100.0 * sum(self._cost.layers[token.exit_layer : ran]) / self._cost.full
        return total / len(tokens)

    def _run(self, request: Request) -> list[int]:
        """Return the number of blocks that ran for each new token of a request without drafts."""
        exits = [token.exit_layer for token in request.completion.tokens]
        return layers_run(exits, _way(request), cache_layers=self._cache_layers)

    def _drafted(self, request: Request) -> float:
        """Return the FLOPs of all new tokens of a request with drafts, in percent of one token."""
        work, heads = request.draft_work, self._cost.heads
        flops = work.layers_run * sum(self._cost.layers) / self._layers
        for counted in (work.heads, work.drafts):
            flops += sum(count * of * heads[layer] for (layer, of), count in counted.items())
        return 100.0 + 100.0 * flops / self._cost.full


def _way(request: Request) -> MissingKV:
    return "recompute" if request.missing_kv == "recompute" else "propagate"
