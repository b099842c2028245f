"""Bytes of weights that decoding reads, by part of the model."""

from collections.abc import Mapping
from dataclasses import dataclass

from offramp.commands.bench.task import Task
from offramp.evaluation.cost import model_cost
from offramp.exits.confidence import confidence_named
from offramp.models.weight_bytes import bytes_per_weight
from offramp.models.work import Work

_GATE_ITEM = 4  # gates are in float32 in a model of any precision


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes that one call of each part of a model reads, with any number of tokens.

    Keys and values of earlier tokens are not counted.
    """

    blocks: float
    "All blocks together."
    num_layers: int
    heads: Mapping[int, float]
    "The head of an exit, by exit layer."
    evaluations: Mapping[str, Mapping[int, float]]
    "The confidence of an exit, by measure and exit layer."
    drafts: Mapping[int, float]
    "The head of an exit for the draft vocabulary, by exit layer."

    @classmethod
    def of(cls, task: Task) -> "WeightBytes":
        """Return the bytes of a task's model, from the sizes of its matrices."""
        model, vocab = task.model, task.fitted.draft_vocab
        item = bytes_per_weight(model)
        cost = model_cost(model, context=1.0, fitted=task.fitted)
        heads = {layer: flops / 2 * item for layer, flops in cost.heads.items()}
        share = 1.0 if vocab is None else len(vocab) / model.vocab_size
        evaluations = {
            name: {
                layer: cost.gate(name, layer) / 2 * _GATE_ITEM
                if confidence_named(name).needs_gate
                else heads[layer] * confidence_named(name).needs_head
                for layer in task.early_exits
            }
            for name in task.confidences
        }
        return cls(
            blocks=sum(cost.layers) / 2 * item,
            num_layers=model.num_layers,
            heads=heads,
            evaluations=evaluations,
            drafts={layer: heads[layer] * share for layer in task.early_exits},
        )

    @property
    def full_depth(self) -> float:
        """Bytes that a step at full depth reads: all blocks and the last head."""
        return self.blocks + self.heads[max(self.heads)]

    def read_by(self, work: Work, confidence: str | None) -> float:
        """Return the bytes that the calls of ``work`` read.

        Missing keys and values are projected beside other tokens, and read no weights of their own.
        """
        read = self.blocks / self.num_layers * sum(work.blocks.values())
        evaluations = {} if confidence is None else self.evaluations[confidence]
        for parts, calls in (
            (self.heads, work.heads),
            (evaluations, work.evaluations),
            (self.drafts, work.drafts),
        ):
            read += sum(parts[layer] * count for (layer, _), count in calls.items())
        return read
