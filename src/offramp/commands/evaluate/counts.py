"""What the requests of one task cost: tokens, layers and seconds."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from offramp.errors import UnsupportedArchitectureError
from offramp.evaluation.cost import ModelCost, model_cost
from offramp.exits.policy import ThresholdPolicy
from offramp.generation.blocks_run import layers_run
from offramp.generation.exit_rule import ExitRule
from offramp.models.base import EarlyExitModel
from offramp.models.missing_kv import MissingKV
from offramp.models.open import OpenedModel


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The cost of a task. A task without a scored or generated token has no figures."""

    mean_layers: float | None
    "Mean number of blocks that ran for a scored or generated token, deferred ones included."
    flops_pct: float | None
    "FLOPs of these tokens in percent of full depth; None too if blocks cannot run one by one."
    tokens_per_s: float | None
    "Scored or generated tokens divided by the seconds of the model, which include the contexts."
    tokens: int
    "Number of scored or generated tokens."
    context_tokens: int
    "Number of tokens of the contexts, which run at full depth."


@dataclass(kw_only=True)
class TaskCounts:
    """The requests of one task so far."""

    missing_kv: MissingKV
    texts: int = 0
    "Texts with at least one token; a prompt at full depth predicts the first one."
    routed: Counter[tuple[int, int]] = field(default_factory=Counter)
    "The other tokens, by (layer of the exit that predicts them, blocks that ran)."
    keys: int = 0
    "Keys that the tokens attend to, in all."
    context_tokens: int = 0
    seconds: float = 0.0
    truncated: int = 0
    "Requests that lost tokens at their start, because they were too long."

    @property
    def tokens(self) -> int:
        """Number of scored or generated tokens."""
        return self.texts + self.routed.total()

    def add(self, exit_layers: Sequence[int], context: int, model: EarlyExitModel) -> None:
        """Count one text after ``context`` tokens; its tokens come from these layers."""
        if not exit_layers:
            return
        run = layers_run(exit_layers, self.missing_kv, cache_layers=model.cache_layers)
        self.texts += 1
        self.routed.update(zip(exit_layers[1:], run[1:], strict=True))
        self.keys += sum(range(context, context + len(exit_layers)))
        self.context_tokens += context

    def merged(self, others: Iterable["TaskCounts"]) -> "TaskCounts":
        """Return the counts of this task and of others together, as those of a group."""
        parts = [self, *others]
        return TaskCounts(
            missing_kv=self.missing_kv,
            texts=sum(part.texts for part in parts),
            routed=sum((part.routed for part in parts), Counter()),
            keys=sum(part.keys for part in parts),
            context_tokens=sum(part.context_tokens for part in parts),
            seconds=sum(part.seconds for part in parts),
            truncated=sum(part.truncated for part in parts),
        )

    def figures(
        self, opened: OpenedModel, rule: ExitRule | None, *, depth: int | None = None
    ) -> Figures:
        """Return what the tokens cost; ``rule`` decided where they left.

        ``depth`` is the number of layers that were there, if it is a static model of the first
        layers of ``opened`` that ran; full depth is still that of ``opened``.
        """
        tokens, layers = self.tokens, depth or opened.model.num_layers
        run = layers * self.texts + sum(ran * n for (_, ran), n in self.routed.items())
        return Figures(
            mean_layers=run / tokens if tokens else None,
            flops_pct=self._flops_pct(opened, rule, layers) if tokens else None,
            tokens_per_s=tokens / self.seconds if tokens and self.seconds > 0 else None,
            tokens=tokens,
            context_tokens=self.context_tokens,
        )

    def _flops_pct(self, opened: OpenedModel, rule: ExitRule | None, depth: int) -> float | None:
        try:
            cost = model_cost(
                opened.model, context=max(1.0, self.keys / self.tokens), fitted=opened.fitted
            )
        except UnsupportedArchitectureError:
            return None
        by_exit = dict(zip(cost.exit_layers, _by_exit(cost, rule, self.missing_kv), strict=True))
        static = dict(zip(cost.exit_layers, _by_exit(cost, None, "recompute"), strict=True))
        total = static[depth] * self.texts
        for (layer, ran), n in self.routed.items():
            if rule is None:
                total += n * static[layer]
            else:
                total += n * (by_exit[layer] + 100.0 * sum(cost.layers[layer:ran]) / cost.full)
        return total / self.tokens


def _by_exit(cost: ModelCost, rule: ExitRule | None, missing_kv: MissingKV) -> Sequence[float]:
    if rule is None:
        early = len(cost.exit_layers) - 1
        return cost.flops_pct_by_exit("max_prob", evaluated=[False] * early, missing_kv=missing_kv)
    evaluated = None
    if isinstance(rule.policy, ThresholdPolicy):
        evaluated = [math.isfinite(bound) for bound in rule.policy.thresholds]
    return cost.flops_pct_by_exit(rule.confidence, evaluated=evaluated, missing_kv=missing_kv)
