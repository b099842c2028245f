"""A promise that is kept on texts that a model really writes, with exits as bad as can be."""

import numpy as np
import pytest
import torch

from offramp.calibration.keep_promise import tokens_until_trust
from offramp.commands.audit import AuditLog
from offramp.generation.auditing import Auditor
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine

SHAPE = {"exit_layers": (1, 2), "max_position_embeddings": 200, "exit_head": "norm"}
LENGTH, TEXTS = 75, 4
MANY = GenerateConfig(max_new_tokens=LENGTH, threshold=-1.0, confidence="max_prob", temperature=1.0)
"""By these thresholds every token would leave at the first exit."""


class Witness(Auditor):
    """An auditor that compares every token that left, and records those that its coin chooses."""

    truth: list[float]

    def see(self, decoder, exits):
        for row, layer, logits in zip(exits.rows, exits.exit_layers, exits.logits, strict=True):
            left = layer < decoder.model.num_layers
            found = self._compare(decoder, row, layer, logits) if left else None
            self.truth.append(float(found is not None and found.disagrees))
            self.record(left, found if self._coins.random() < self.share else None)


def risks(model, log, seed, *, slots=3):
    """The mean risk of the first T tokens of some texts, for every T, and whether each left."""
    found, left = [], []
    plain = log.auditor(seed=seed)

    def record(early, comparison):
        left.append(early)
        log.record(early, comparison)
        if len(found) < len(left):  # a first token, which the prompt gave at full depth
            found.append(0.0)

    witness = Witness(share=plain.share, record=record, seed=plain.seed, rung=plain.rung)
    witness.truth = found
    engine = Engine(model, EngineConfig(slots=slots, capacity=100), auditor=witness)
    for prompt in range(TEXTS):
        engine.submit([1 + prompt, seed % 7], MANY)
    list(engine.run())
    assert len(found) == len(left) == log.promised.tokens == TEXTS * LENGTH
    return np.cumsum(found) / np.arange(1, len(found) + 1), np.array(left)


def random_model(make_model, seed):
    """A model whose later blocks change nearly every prediction."""
    model = make_model(dtype=torch.float32, seed=seed, **SHAPE)
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.mul_(100)
            block.mlp.down_proj.weight.mul_(100)
    return model


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_realised_risk_never_exceeds_the_promise_though_exits_are_random(make_model, share):
    broken = 0
    for seed in range(2):
        model = random_model(make_model, seed)
        log = AuditLog(share=share, keep_promise=0.2)
        realised, left = risks(model, log, seed)
        assert left.any()
        assert log.promised.estimate > 0.2  # the exits alone would break the promise
        assert not left[: int(1 / 0.2) - 1].any()  # no credit
        broken += (realised > 0.2).any()
        assert realised[-1] <= log.promised.upper <= 0.2 + 1e-9
    assert broken == 0  # each may, with probability 0.05 at most


def test_tokens_leave_as_soon_as_the_evidence_allows_it(make_model):
    """The blocks above the exits add nothing, so no exit ever disagrees."""
    model = make_model(dtype=torch.float32, **{**SHAPE, "exit_head": "shared"})
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    log = AuditLog(share=0.5, keep_promise=0.2)
    realised, left = risks(model, log, 0)
    trust = tokens_until_trust(0.2, 0.5, 0.05)
    assert realised.max() == 0
    assert left[:trust].mean() <= 0.2
    assert left[-150:].mean() > 0.95  # all but the first tokens of texts
    assert log.rung == log.content()["promise"]["rungs"]


def test_without_a_promise_the_same_exits_break_it(make_model):
    realised, left = risks(random_model(make_model, 0), AuditLog(share=1.0), 0)
    assert realised[-1] > 0.3
    assert left.mean() > 0.9
