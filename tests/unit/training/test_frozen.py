"""Exits of any trainable model learn on its frozen backbone (Hugging Face: commands/test_tune)."""

import pytest
import torch

from offramp.data import batches
from offramp.errors import ConfigError
from offramp.evaluation.trace import collect_trace
from offramp.training.frozen import tune_exits
from offramp.training.frozen_config import FrozenConfig


@pytest.fixture
def ids(make_ids):
    """Half the tokens follow from the one before, half are drawn."""
    ids = make_ids(1, 2000)[0]
    ids[1::2] = (ids[::2] + 3) % 13
    return ids


def mean_kl(model, ids):
    """Of each early exit from the last layer, nats a token."""
    trace = collect_trace(model, batches(ids, seq_len=16, batch_size=8), kl=True)
    return trace.kl[:-1].mean(axis=1)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("exit_head", ["norm", "adapter", "full", "specialist"])
def test_the_exits_of_a_native_decoder_imitate_its_last_layer(make_model, ids, exit_head, norm):
    model = make_model(exit_layers=(1, 2), exit_head=exit_head, norm=norm, dtype=torch.float32)
    model.exits.trained = False
    model.silence_untrained()
    before, was = {k: v.clone() for k, v in model.state_dict().items()}, mean_kl(model, ids)
    config = FrozenConfig(
        seq_len=16, lr=1e-2, epochs=6, distill_temperature=1.0, precision="float32"
    )
    tune_exits(model, ids, config)
    assert (mean_kl(model, ids) < 0.98 * was).all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("exits."), name
    assert model.exits_trained
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"exits.{name}" for name, _ in model.exits.named_parameters()
    ]


def test_a_native_decoder_without_heads_of_its_own_is_refused(make_model, ids):
    with pytest.raises(ConfigError, match="exit_head: expected norm, adapter, full"):
        tune_exits(make_model(exit_layers=(1,)), ids, FrozenConfig())
