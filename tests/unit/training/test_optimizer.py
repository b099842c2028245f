"""The optimizer's groups: a learning rate for each layer of any model."""

import pytest
import torch
import transformers

from offramp.errors import UnsupportedArchitectureError
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.training.config import TrainConfig
from offramp.training.optimizer import make_optimizer, set_learning_rate

LAYERS = 3
LLAMA = transformers.LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    intermediate_size=24,
    tie_word_embeddings=False,
)
GPT2 = transformers.GPT2Config(
    vocab_size=31, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32, bos_token_id=0
)
BLOOM = transformers.BloomConfig(vocab_size=31, hidden_size=16, n_layer=LAYERS, n_head=2)
LAYER_OF = {
    "native": {
        "model.embed_tokens.weight": 0,
        "model.layers.0.self_attn.q_proj.weight": 1,
        "model.layers.2.mlp.down_proj.weight": 3,
        "model.norm.weight": 4,
        "lm_head.weight": 4,
        "exits.1.norm.weight": 4,
    },
    "llama": {
        "backbone.model.embed_tokens.weight": 0,
        "backbone.model.layers.0.self_attn.q_proj.weight": 1,
        "backbone.model.layers.2.mlp.down_proj.weight": 3,
        "backbone.model.norm.weight": 4,
        "backbone.lm_head.weight": 4,
        "exits.1.norm.weight": 4,
    },
    "gpt2": {
        "backbone.transformer.wte.weight": 0,  # tied: the LM head, too
        "backbone.transformer.wpe.weight": 0,
        "backbone.transformer.h.0.attn.c_attn.weight": 1,
        "backbone.transformer.h.2.mlp.c_proj.bias": 3,
        "backbone.transformer.ln_f.weight": 4,
        "exits.1.norm.bias": 4,
    },
    "bloom": {  # its blocks run only whole, but which they are is known
        "backbone.transformer.word_embeddings.weight": 0,
        "backbone.transformer.word_embeddings_layernorm.weight": 0,
        "backbone.transformer.h.1.self_attention.dense.weight": 2,
        "backbone.transformer.ln_f.bias": 4,
        "exits.1.norm.weight": 4,
    },
}


def hugging_face(config, **fields):
    torch.manual_seed(0)
    backbone = transformers.AutoModelForCausalLM.from_config(config)
    return HuggingFaceModel(backbone, exit_layers=(1,), **fields)


@pytest.fixture(params=LAYER_OF)
def named(request, make_model):
    if request.param == "native":
        return "native", make_model(exit_layers=(1,), exit_head="norm", dtype=torch.float32)
    config = {"llama": LLAMA, "gpt2": GPT2, "bloom": BLOOM}[request.param]
    return request.param, hugging_face(config, exit_head="norm")


def test_a_model_says_which_layer_each_parameter_belongs_to(named):
    name, model = named
    layers = model.layers_of_parameters()
    assert layers.keys() == {name for name, _ in model.named_parameters()}
    assert {part: layers[part] for part in LAYER_OF[name]} == LAYER_OF[name]
    assert set(layers.values()) == set(range(LAYERS + 2))


@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_is_in_one_group_with_its_layers_factor(named, frozen):
    _, model = named
    layers = model.layers_of_parameters()
    trainable = dict(model.named_parameters())
    if frozen:
        for name in [name for name, layer in layers.items() if layer == 1]:
            trainable.pop(name).requires_grad_(False)
    optimizer = make_optimizer(model, TrainConfig(layer_lr="decay:0.5"))
    set_learning_rate(optimizer, 1, 10, TrainConfig(lr=0.1))
    rates = [(p, group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(rates) == len(trainable)
    rate_of = {id(parameter): rate for parameter, rate in rates}
    for name, parameter in trainable.items():
        factor = 0.5 ** max(0, LAYERS - layers[name])  # what is above the blocks has 1, too
        assert rate_of[id(parameter)] == pytest.approx(0.1 * factor), name


def test_the_embedding_alone_can_be_frozen_by_its_factor():
    model = hugging_face(GPT2)
    optimizer = make_optimizer(model, TrainConfig(layer_lr="0=0"))
    factors = {group["factor"]: len(group["params"]) for group in optimizer.param_groups}
    assert factors[0.0] == 2  # wte and wpe


def test_without_layer_lr_there_is_one_group(named):
    _, model = named
    [group] = make_optimizer(model, TrainConfig()).param_groups
    expected = [parameter for _, parameter in model.named_parameters()]
    assert all(a is b for a, b in zip(group["params"], expected, strict=True))


def test_a_parameter_of_no_known_layer_is_refused():
    backbone = transformers.AutoModelForCausalLM.from_config(GPT2)
    backbone.transformer.scale = torch.nn.Parameter(torch.ones(3))
    model = HuggingFaceModel(backbone, exit_layers=(1,))
    with pytest.raises(UnsupportedArchitectureError, match=r"gpt2: .*transformer\.scale"):
        model.layers_of_parameters()
