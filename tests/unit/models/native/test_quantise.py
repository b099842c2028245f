"""A quantised model computes what a model with its dequantised weights computes, everywhere."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from offramp.evaluation.timer import measure_clock
from offramp.exits.gate import FittedExits, Gate, expected_kl, gate_of
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate, generate_batch
from offramp.models.base import EarlyExitModel, Step, whole_step
from offramp.models.exit_heads import ExitHead
from offramp.models.native.checkpoint import load_checkpoint, save_checkpoint
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.native.quantise import precision_beside, quantised
from offramp.models.native.quantised import QuantisedLinear
from offramp.models.native.schemes import SCHEMES
from offramp.models.weight_bytes import bytes_per_weight

SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "vocab_size": 53}
KINDS = {
    "plain": {},
    "tied and grouped": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "exits with norms": {"exit_head": "norm", "exit_layers": (1, 2)},
    "exits with LM heads": {"exit_head": "full", "exit_layers": (1, 2)},
    "exits with adapters": {"exit_head": "adapter", "exit_layers": (1,)},
    "specialists": {"exit_head": "specialist", "exit_layers": (2,)},
    "post-norm": {"norm": "post"},
    "shared keys and values": {"kv_source_layer": 1, "upper_intermediate_size": 96},
}
IDS = torch.randint(53, (2, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture
def make_pair(make_model, scheme):
    """A quantised model, and one of numbers: those of its weights."""

    def make(**fields) -> tuple[Transformer, Transformer]:
        model = make_model(dtype=torch.float32, **{**SHAPE, **fields})
        small = quantised(model, scheme)
        return small, dequantised(small)

    return make


def dequantised(model: Transformer) -> Transformer:
    whole = Transformer(replace(model.config, weight_format=None))
    state = {name: value for name, value in model.state_dict().items() if "." in name}
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            for name in module.state_dict():
                del state[f"{path}.{name}"]
            state[f"{path}.weight"] = module.weight.dequantised()
    whole.load_state_dict(state)
    return whole.eval()


def close(mine, theirs):
    """Alike, up to what the kernels round: states to int8."""
    assert float((mine - theirs).norm()) < 4e-2 * float(theirs.norm())


@torch.no_grad()
def decoded(model: EarlyExitModel, ids: torch.Tensor, *, few: int) -> torch.Tensor:
    """The logits of every exit for the last tokens, which are decoded ``few`` at a time."""
    begin = ids.shape[1] - 2 * few
    cache = model.make_cache(len(ids), ids.shape[1])
    found = []
    for start, stop in ((0, begin), (begin, begin + few), (begin + few, begin + 2 * few)):
        step = Step(positions=torch.arange(start, stop)[None], cache=cache)
        h, done = model.embed(ids[:, start:stop], step=step), 0
        for layer in model.exit_layers:
            h = model.run_layers(h, done, layer, step=step)
            done = layer
            if start:
                found.append(model.unembed(h, layer))
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_weights_as_numbers(make_pair, kind):
    small, whole = make_pair(**KINDS[kind])
    with torch.no_grad():
        for mine, theirs in zip(
            small.forward_all_layers(IDS), whole.forward_all_layers(IDS), strict=True
        ):
            close(mine, theirs)
    for few in (1, 5):
        close(decoded(small, IDS, few=few), decoded(whole, IDS, few=few))
    vocab = torch.tensor([3, 50, 7])
    h = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in small.exit_layers:
            logits = small.unembed(h, layer)[..., vocab]
            close(small.unembed(h, layer, vocab=vocab), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_near_the_model(make_model, kind):
    model = make_model(dtype=torch.float32, **{**SHAPE, **KINDS[kind]})
    for scheme, most in (("int8", 0.05), ("int4", 0.5)):
        small = quantised(model, scheme)
        with torch.no_grad():
            expected = model(IDS)
            assert float((small(IDS) - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised(make_model, scheme, kind):
    """Projections and LM heads; embeddings, norms and adapters stay, and are shared."""
    model = make_model(dtype=torch.float32, **{**SHAPE, **KINDS[kind]})
    small = quantised(model, scheme)
    inside = [*small.model.layers.modules(), small.lm_head]
    inside += [head.lm_head for head in small.exits.values() if isinstance(head, ExitHead)]
    assert not [each for each in inside if isinstance(each, torch.nn.Linear)]
    assert small.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert small.config == replace(model.config, weight_format=scheme, tie_word_embeddings=False)
    assert isinstance(small.lm_head, QuantisedLinear)
    assert model.config.weight_format is None
    for layer, head in small.exits.items():
        adapter = getattr(head, "adapter", None)
        if adapter is not None:
            assert torch.equal(adapter.up_proj.weight, model.exits[layer].adapter.up_proj.weight)


def test_exits_keep_whether_they_were_trained(make_model, scheme):
    model = make_model(dtype=torch.float32, **SHAPE)
    model.exits.trained = False
    assert not quantised(model, scheme).exits_trained


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("plain", torch.bfloat16),
        ("exits with LM heads", torch.float32),
        ("shared keys and values", torch.float32),
    ],
)
def test_speculation_is_greedy_decoding(make_pair, kind, dtype):
    small = make_pair(**KINDS[kind])[0]
    for parameter in small.parameters():
        parameter.data = parameter.data.to(dtype)
    for seed in range(2):
        prompt = torch.randint(53, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        greedy, drafted = (
            list(
                generate(small, prompt, GenerateConfig(max_new_tokens=12, speculative=speculative))
            )
            for speculative in (False, True)
        )
        assert [token.id for token in drafted] == [token.id for token in greedy]


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize("kind", ["exits with norms", "shared keys and values"])
def test_exits_are_those_of_the_weights_as_numbers(make_pair, kind, missing_kv):
    """Texts need not be equal, as rounding decides near ties; all but a few tokens are."""
    small, whole = make_pair(**KINDS[kind])
    config = GenerateConfig(max_new_tokens=16, threshold=0.03, missing_kv=missing_kv)
    alike = []
    for seed in range(3):
        prompt = torch.randint(53, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        mine, theirs = (list(generate(each, prompt, config)) for each in (small, whole))
        same = [
            (a.id, a.exit_layer) == (b.id, b.exit_layer) for a, b in zip(mine, theirs, strict=True)
        ]
        alike.append(same.index(False) if False in same else len(same))
    assert sorted(alike)[1] == 16, alike
    assert len({token.exit_layer for token in mine}) > 1


@pytest.mark.parametrize("exit_head", ["shared", "full", "adapter"])
def test_gates_read_the_states_of_a_quantised_model(make_pair, exit_head):
    """Those at exit 1 send half of the tokens on: the sign of one direction of the state."""
    small, whole = make_pair(exit_head=exit_head, exit_layers=(1,))
    torch.manual_seed(0)
    gate = gate_of(Gate(48, outputs=1).state_dict())
    with torch.no_grad():
        gate.out_proj.weight *= 40
        states = small.run_layers(
            small.embed(IDS, step=whole_step(IDS)), 0, 1, step=whole_step(IDS)
        )
        middle = -float(expected_kl(gate(states)).median())
    fitted = FittedExits(gates={"gain": {1: gate}})
    config = GenerateConfig(max_new_tokens=16, threshold=middle, confidence="gain")
    alike, left = [], set()
    for seed in range(3):
        prompt = torch.randint(53, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        mine, theirs = (
            list(generate(each, prompt, config, fitted=fitted)) for each in (small, whole)
        )
        left |= {token.exit_layer for token in mine}
        same = [
            (a.id, a.exit_layer) == (b.id, b.exit_layer) for a, b in zip(mine, theirs, strict=True)
        ]
        alike.append(same.index(False) if False in same else len(same))
    assert left == {1, 3}
    assert max(alike) == 16, alike


def test_a_row_of_a_batch_is_the_row_alone(make_pair):
    small = make_pair(num_key_value_heads=2)[0]
    prompts = [[3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [9]]
    config = GenerateConfig(max_new_tokens=12, threshold=0.03)
    rows, _ = generate_batch(small, prompts, config)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.ids == [token.id for token in generate(small, prompt, config)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_the_model_bit_for_bit(make_pair, tmp_path, kind, dtype):
    small = make_pair(**KINDS[kind])[0]
    for parameter in small.parameters():
        parameter.data = parameter.data.to(dtype)
    save_checkpoint(small, tmp_path, about={}, weights_about={})
    back, _ = load_checkpoint(tmp_path)
    assert back.config == small.config
    expected = small.state_dict()
    assert list(back.state_dict()) == list(expected)
    for name, value in back.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert torch.equal(back(IDS), small(IDS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_precision_beside_the_weights_is_chosen_when_they_are_loaded(make_pair, tmp_path):
    small = make_pair()[0]
    save_checkpoint(small, tmp_path, about={}, weights_about={})
    back, _ = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    assert back.make_cache(1, 1).keys.dtype == torch.bfloat16
    expected = dict(small.named_buffers())
    for name, value in back.named_buffers():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_precision_that_no_kernel_has_is_refused(scheme, dtype):
    with pytest.raises(ConfigError, match=f"dtype: expected float32 or bfloat16 with {scheme}"):
        precision_beside(scheme, dtype)
    assert precision_beside(scheme, None, dtype) == torch.float32
    assert precision_beside(scheme, None, torch.bfloat16) == torch.bfloat16


def test_a_quantised_model_is_not_quantised_again(make_pair):
    small = make_pair()[0]
    with pytest.raises(ConfigError, match="weights: expected a model whose weights are not"):
        quantised(small, "int8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(make_model, scheme, bad):
    model = make_model(dtype=torch.float32, **SHAPE)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 40] = bad
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj: .*finite"):
        quantised(model, scheme)


@pytest.mark.parametrize(
    ("weights", "size"),
    [(None, 4), ("int8", 17 / 16), ("int4", (21 * 5 / 8 + 2 * 17 / 16) / 23)],  # 21 parts, head 2
)
def test_the_clock_counts_the_bytes_of_the_format(make_model, weights, size):
    shape = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}
    model = make_model(dtype=torch.float32, **shape, exit_layers=())
    if weights is not None:
        model = quantised(model, weights)
    assert bytes_per_weight(model) == pytest.approx(size)
    clock = measure_clock(model, context=8, bandwidth=1e9, rounds=1)
    attention, mlp, head = 4 * 64 * 64, 3 * 64 * 64, 128 * 64
    assert clock.weights == pytest.approx(size * (3 * (attention + mlp) + head), rel=0.01)


def test_transformers_has_no_such_weights(make_pair):
    with pytest.raises(UnsupportedArchitectureError, match="weights: expected numbers"):
        make_pair()[0].to_transformers()


def test_a_quantised_head_is_not_tied():
    with pytest.raises(ConfigError, match="tie_word_embeddings: expected false with int8 weights"):
        DecoderConfig(weight_format="int8", tie_word_embeddings=True)


def change(folder, **parts):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["model"] |= parts
    path.write_text(json.dumps(content))


def edit(folder, name, change):
    """Change a tensor, or remove it where the change gives None."""
    state = load_file(folder / "model.safetensors")
    found = [key for key in state if key.endswith(name)]
    new = change(state.pop(found[0]))
    if new is not None:
        state[found[0]] = new
    save_file(state, folder / "model.safetensors")


HARMS = {
    "an unknown scheme": (lambda f: change(f, weight_format="int3"), "weight_format"),
    "another scheme": (lambda f: change(f, weight_format="int4"), "the weights do not fit"),
    "no scheme": (lambda f: change(f, weight_format=None), "the weights do not fit"),
    "a tied head": (lambda f: change(f, tie_word_embeddings=True), "tie_word_embeddings"),
    "no scales": (lambda f: edit(f, "o_proj.scales", lambda x: None), "o_proj.scales"),
    "no values": (lambda f: edit(f, "lm_head.values", lambda x: None), "lm_head.values"),
    "scales of another shape": (
        lambda f: edit(f, "q_proj.scales", lambda x: x[:1].clone()),
        "q_proj.scales",
    ),
    "scales of another type": (
        lambda f: edit(f, "q_proj.scales", lambda x: x.double()),
        "q_proj.scales: expected torch.float16",
    ),
    "values of another type": (
        lambda f: edit(f, "k_proj.values", lambda x: x.view(torch.int8)),
        "k_proj.values: expected torch.uint8",
    ),
    "values that are numbers": (
        lambda f: edit(f, "k_proj.values", lambda x: x.float()),
        "k_proj.values: expected torch.uint8",
    ),
    "scales that are not finite": (
        lambda f: edit(f, "down_proj.scales", lambda x: x / 0),
        "down_proj.scales: expected finite numbers",
    ),
    "NaN": (
        lambda f: edit(f, "lm_head.scales", lambda x: x * float("nan")),
        "lm_head.scales: expected finite numbers",
    ),
    "an embedding of integers": (
        lambda f: edit(f, "embed_tokens.weight", lambda x: x.int()),
        "model.safetensors",
    ),
    "a huge vocabulary": (lambda f: change(f, vocab_size=1 << 40), ""),
    "a huge width": (lambda f: change(f, intermediate_size=1 << 45), ""),
    "a huge model": (lambda f: change(f, intermediate_size=(1 << 63) - 1), ""),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_folder_is_one_sentence_that_names_the_file(make_model, tmp_path, harm):
    small = quantised(make_model(dtype=torch.float32, **SHAPE), "int8")
    save_checkpoint(small, tmp_path, about={}, weights_about={})
    damage, said = HARMS[harm]
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
