"""What a model cannot do is refused with a sentence, before any work."""

import pytest
import torch
import transformers

from offramp.errors import ConfigError
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.training.checks import check_model
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss
from offramp.training.loop import train

TEXT = torch.arange(300) * 7 % 31
SMALL = {"seq_len": 8, "batch_size": 4, "steps": 2, "loss_weights": "1=0.5,3=0.5"}
FIELDS = {
    "layer_dropout": {"layer_dropout": 0.1},
    "detach_exits": {"detach_exits": True},
    "gradient_equilibrium": {"gradient_equilibrium": True},
    "recompute_activations": {"recompute_activations": True},
    "compile": {"compile": True},
    "sharding fsdp": {"sharding": "fsdp"},
}
NEED_OWN_MODULES = ("compile", "sharding fsdp")


def model_of(config):
    torch.manual_seed(0)
    return HuggingFaceModel(
        transformers.AutoModelForCausalLM.from_config(config), exit_layers=(1,)
    ).train()


@pytest.fixture
def whole_only():
    """A model whose blocks need something (ALiBi) that nobody knows how to make."""
    return model_of(transformers.BloomConfig(vocab_size=31, hidden_size=16, n_layer=3, n_head=2))


@pytest.fixture
def block_by_block():
    return model_of(
        transformers.GPT2Config(
            vocab_size=31, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=0
        )
    )


@pytest.mark.parametrize("name", FIELDS)
def test_a_model_that_runs_only_whole_is_refused_what_it_cannot_do(whole_only, name):
    before = {key: value.clone() for key, value in whole_only.state_dict().items()}
    steps = []
    with pytest.raises(ConfigError, match=f"^{name}: expected a model whose blocks"):
        train(
            whole_only,
            TEXT,
            TEXT[:40],
            TrainConfig(**SMALL, **FIELDS[name]),
            on_step=steps.append,
        )
    assert not steps
    assert all(torch.equal(value, before[key]) for key, value in whole_only.state_dict().items())


def test_the_reason_is_in_the_sentence(whole_only):
    with pytest.raises(ConfigError, match="run as a whole, since its blocks need alibi"):
        check_model(whole_only, TrainConfig(layer_dropout=0.5))


def test_a_model_that_runs_only_whole_is_trained_all_the_same(whole_only):
    result = train(whole_only, TEXT, TEXT[:40], TrainConfig(**SMALL, layer_lr="decay:0.5"))
    assert result.finished
    assert all(parameter.isfinite().all() for parameter in whole_only.parameters())


@pytest.mark.parametrize("name", FIELDS)
def test_a_hugging_face_model_whose_blocks_run_one_by_one_is_refused_less(block_by_block, name):
    config = TrainConfig(**SMALL, **FIELDS[name])
    if name in NEED_OWN_MODULES:
        with pytest.raises(ConfigError, match=f"^{name}: .*run by transformers"):
            check_model(block_by_block, config)
        return
    check_model(block_by_block, config)
    assert train(block_by_block, TEXT, TEXT[:40], config).finished


@pytest.mark.parametrize("name", FIELDS)
def test_a_native_decoder_can_do_all(make_model, name):
    check_model(make_model(), TrainConfig(**SMALL, **FIELDS[name], layer_lr="decay:0.9"))


def test_unknown_layers_are_refused_a_learning_rate_of_their_own(block_by_block):
    block_by_block.backbone.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"^layer_lr: .*gpt2: .*backbone\.scale"):
        train(block_by_block, TEXT, TEXT[:40], TrainConfig(**SMALL, layer_lr="decay:0.9"))
    check_model(block_by_block, TrainConfig(**SMALL))


def test_detached_exits_and_gradient_equilibrium_reach_a_hugging_face_models_trunk(block_by_block):
    """Not only accepted: the gradients of the first block differ from those of the plain loss."""
    inputs, targets = TEXT[:32].view(4, 8), TEXT[1:33].view(4, 8)
    found = []
    for fields in ({}, FIELDS["detach_exits"], FIELDS["gradient_equilibrium"]):
        block_by_block.zero_grad()
        config = TrainConfig(**SMALL, **fields)
        loss, _ = ExitLoss(block_by_block, config, total_steps=2)(inputs, targets, step=1)
        loss.backward()
        found.append(block_by_block.backbone.transformer.h[0].mlp.c_fc.weight.grad.clone())
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
