"""Both runners open one set of weights: the same files, ties, names, precision and numbers.

Unexpected and missing tensors are refused by name.
"""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from offramp.commands.export import export_exit
from offramp.errors import CheckpointError, UnsupportedArchitectureError
from offramp.models.loading import load_weights
from offramp.models.model_files import find_model
from offramp.models.open import open_model
from offramp.models.save import save_model

IDS = torch.arange(40)[None] % 30
RUNNERS = ("native", "transformers")


@pytest.fixture
def plain(checkpoint, tmp_path):
    """A copy of a tiny Llama with a tied LM head, which a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "plain")


def change(folder, edit, name="model.safetensors"):
    state = load_file(folder / name)
    save_file(edit(dict(state)) or state, folder / name, {"format": "pt"})


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@torch.no_grad()
def expected_logits(folder, dtype="auto"):
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return lm.eval()(IDS).logits


@torch.no_grad()
def check_runners(folder, *, dtype=None, atol=1e-5):
    """Every runner gives the logits of AutoModelForCausalLM."""
    expected = expected_logits(folder, dtype or "auto")
    for runner in RUNNERS:
        model = load_weights(find_model(folder), runner=runner, dtype=dtype)
        assert model.dtype == expected.dtype
        assert {each.dtype for each in model.parameters()} == {expected.dtype}
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=atol)


def own_head(state):
    state["lm_head.weight"] = torch.randn(
        state["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(5)
    )
    return state


def test_an_own_lm_head_is_used_although_the_config_ties_it(plain):
    before = expected_logits(plain)
    change(plain, own_head)
    assert not torch.allclose(expected_logits(plain), before, atol=0.1)
    check_runners(plain)


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_own_lm_head_survives_saving_and_is_in_the_hash(plain, tmp_path, runner):
    first = open_model(plain).sha256
    change(plain, own_head)
    opened = open_model(plain, runner=runner)
    assert opened.sha256 != first
    save_model(opened, tmp_path / "exits")
    assert not (tmp_path / "exits" / "model.safetensors").exists()  # the same backbone
    norm = opened.model.model.norm if runner == "native" else opened.model.final_norm
    with torch.no_grad():
        norm.weight.mul_(2)
        expected = opened.model(IDS)
        save_model(opened, tmp_path / "whole")
        again = open_model(tmp_path / "whole").model(IDS)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
    assert not json.loads((tmp_path / "whole" / "config.json").read_text())["tie_word_embeddings"]


def test_export_of_a_tied_config_keeps_the_own_lm_head(plain, tmp_path):
    change(plain, own_head)
    export_exit(plain, 4, tmp_path / "out")
    torch.testing.assert_close(
        expected_logits(tmp_path / "out"), expected_logits(plain), rtol=0, atol=1e-5
    )
    check_runners(tmp_path / "out")


def test_a_tied_model_may_store_only_its_lm_head(plain):
    name = "model.embed_tokens.weight"
    before = expected_logits(plain)
    change(plain, lambda state: {**state, "lm_head.weight": state[name].clone()})
    check_runners(plain)  # both, alike
    change(plain, lambda state: {key: state[key] for key in state if key != name})
    check_runners(plain)
    assert torch.equal(expected_logits(plain), before)


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_an_untied_model_without_an_lm_head_is_refused(plain, runner):
    configure(plain, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"they lack lm_head\.weight"):
        open_model(plain, runner=runner)


def test_a_stale_index_is_ignored_beside_whole_weights(plain):
    first = open_model(plain).sha256
    stale = {name: value + 1 for name, value in load_file(plain / "model.safetensors").items()}
    save_file(stale, plain / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    check_runners(plain)
    opened = open_model(plain)
    assert opened.sha256 == first
    assert opened.files.backbone.weights == (plain / "model.safetensors",)


@pytest.fixture
def sharded(plain):
    """The checkpoint in two files and an index."""
    state = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    where = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {key: state[key] for key in sorted(state)[number - 1 :: 2]}
        save_file(part, plain / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    (plain / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return plain


def test_shards_that_the_index_names_are_read_and_others_are_not(sharded, tmp_path):
    check_runners(sharded)
    shutil.copy(
        sharded / "model-00001-of-00002.safetensors", sharded / "model-00003-of-00003.safetensors"
    )
    index = sharded / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    where.pop(next(iter(where)))  # the file holds it all the same
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    check_runners(sharded)
    left = {name: file for name, file in where.items() if "00001" in file}
    index.write_text(json.dumps({"metadata": {}, "weight_map": left}))
    for runner in (None, *RUNNERS):
        with pytest.raises(CheckpointError, match="they lack model"):
            open_model(sharded, runner=runner)


def test_a_tensor_in_two_shards_is_refused(sharded):
    name = "model.norm.weight"
    files = sorted(sharded.glob("model-*.safetensors"))
    stored = {key: value for file in files for key, value in load_file(file).items()}
    for file in files:
        save_file({**load_file(file), name: stored[name]}, file, {"format": "pt"})
    for runner in (None, *RUNNERS):
        with pytest.raises(CheckpointError, match=f"got {name} in two"):
            open_model(sharded, runner=runner)


def test_a_config_that_names_other_weights_is_refused(plain):
    (plain / "other.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    configure(plain, transformers_weights="other.safetensors")
    for runner in (None, *RUNNERS):
        with pytest.raises(CheckpointError, match="transformers_weights: expected none"):
            open_model(plain, runner=runner)


@pytest.mark.parametrize("part", ["norm", "embed_tokens", "mlp", "down_proj"])
@pytest.mark.parametrize("stated", ["bfloat16", "float32", None])
def test_all_weights_have_one_precision(plain, part, stated):
    def mix(state):
        return {name: t if part in name else t.bfloat16() for name, t in state.items()}

    change(plain, mix)
    configure(plain, dtype=stated, torch_dtype=None)
    low = (stated or str(next(iter(load_file(plain / "model.safetensors").values())).dtype)) != (
        "float32"
    )
    check_runners(plain, atol=0.2 if low else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_chosen_precision_leaves_the_rotary_positions_exact(plain, dtype):
    expected = expected_logits(plain, dtype)
    with torch.no_grad():
        model = load_weights(find_model(plain), runner="transformers", dtype=dtype)
        assert torch.equal(model(IDS), expected)


def test_a_checkpoint_of_the_base_model_has_no_prefix(plain):
    expected = expected_logits(plain)
    transformers.AutoModel.from_pretrained(plain).save_pretrained(plain)
    assert "embed_tokens.weight" in load_file(plain / "model.safetensors")
    check_runners(plain)
    assert torch.equal(expected_logits(plain), expected)


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_another_prefix_is_refused_or_gives_the_same_logits(plain, runner):
    change(
        plain, lambda s: {name.replace("model.", "language_model.model."): s[name] for name in s}
    )
    with pytest.raises(CheckpointError, match=r"they lack .*model\.embed_tokens\.weight"):
        open_model(plain, runner=runner)


def add(name, shape=(4,), dtype=torch.float32):
    return lambda state: {**state, name: torch.ones(shape, dtype=dtype)}


UNEXPECTED = {
    "a bias": (add("model.layers.0.self_attn.q_proj.bias", (32,)), r"q_proj\.bias"),
    "a bias of the LM head": (add("lm_head.bias"), r"lm_head\.bias"),
    "a layer more": (add("model.layers.4.mlp.up_proj.weight", (48, 32)), r"layers\.4\.mlp"),
    "GPTQ": (add("model.layers.0.mlp.up_proj.qweight", (4, 48), torch.int32), "qweight"),
    "a name of nothing": (add("unheard.of"), r"unheard\.of"),
    "a bias called attention": (add("model.layers.0.attention.bias", (1, 1, 2, 3)), "attention"),
}


@pytest.mark.parametrize("runner", [None, *RUNNERS])
@pytest.mark.parametrize("which", UNEXPECTED)
def test_unexpected_tensors_are_refused_by_name(plain, which, runner):
    edit, name = UNEXPECTED[which]
    change(plain, edit)
    with pytest.raises(CheckpointError, match=f"they have an unknown .*{name}"):
        open_model(plain, runner=runner)


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_missing_tensors_and_wrong_sizes_are_refused_by_name(plain, runner):
    whole = load_file(plain / "model.safetensors")
    change(plain, lambda state: state.pop("model.layers.2.mlp.up_proj.weight") is None or state)
    with pytest.raises(CheckpointError, match=r"they lack model\.layers\.2\.mlp\.up_proj\.weight"):
        open_model(plain, runner=runner)
    save_file(
        {**whole, "model.norm.weight": torch.ones(31)},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        open_model(plain, runner=runner)


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_an_own_lm_head_of_another_size_is_refused_by_name(plain, runner):
    change(plain, lambda state: {**state, "lm_head.weight": torch.ones(9, 32)})
    with pytest.raises(CheckpointError, match=r"do not fit config\.json: .*lm_head\.weight"):
        open_model(plain, runner=runner)


@pytest.mark.parametrize("runner", [None, *RUNNERS])
def test_weights_of_whole_numbers_are_refused(plain, runner):
    change(plain, lambda s: {**s, "model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected .* got I8"):
        open_model(plain, runner=runner)


@pytest.mark.parametrize("runner", [None, *RUNNERS])
@pytest.mark.parametrize(
    "method",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
    ids=lambda method: method["quant_method"],
)
def test_quantised_checkpoints_are_refused_in_a_sentence(plain, method, runner):
    configure(plain, quantization_config=method)
    change(plain, add("model.layers.0.mlp.up_proj.qweight", (4, 48), torch.int32))
    kind = UnsupportedArchitectureError if runner == "native" else CheckpointError
    with pytest.raises(kind, match="quantization_config" if runner == "native" else str(plain)):
        open_model(plain, runner=runner)


BUFFERS = {
    "llama": add("model.layers.0.self_attn.rotary_emb.inv_freq"),
    "gpt2": add("transformer.h.0.attn.bias", (1, 1, 64, 64), torch.uint8),
    "gpt_neox": add("gpt_neox.layers.0.attention.masked_bias", ()),
    "gpt_neo": add("transformer.h.0.attn.attention.bias", (1, 1, 64, 64), torch.bool),
}
SHAPE = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_that_old_checkpoints_hold_are_no_unexpected_tensors(family, tmp_path):
    more = {"intermediate_size": 24} if family != "gpt2" else {}
    if family == "gpt_neo":
        more |= {"attention_types": [[["global"], 2]], "num_layers": 2}
    config = transformers.AutoConfig.for_model(family, **SHAPE, **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    change(tmp_path, BUFFERS[family])
    load_weights(find_model(tmp_path))
    name = next(iter(load_file(tmp_path / "model.safetensors"))).split(".")[0]
    change(tmp_path, add(f"{name}.surplus.bias"))
    with pytest.raises(CheckpointError, match=r"surplus\.bias"):
        load_weights(find_model(tmp_path))


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_other_families_resolve_ties_alike(family, tmp_path):
    config = transformers.AutoConfig.for_model(
        family,
        **SHAPE,
        intermediate_size=24,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    change(tmp_path, own_head)
    expected = expected_logits(tmp_path)
    with torch.no_grad():
        found = load_weights(find_model(tmp_path))
        torch.testing.assert_close(found(IDS), expected, rtol=0, atol=1e-5)


def test_an_index_that_transformers_cannot_read_is_refused_in_a_sentence(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    for runner in (None, *RUNNERS):
        with pytest.raises(CheckpointError, match=r"index\.json: metadata: expected"):
            open_model(sharded, runner=runner)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_precision_that_is_none_is_named(plain, field):
    configure(plain, **{"dtype": None, field: "auto"})
    for runner in (None, *RUNNERS):
        with pytest.raises(CheckpointError, match=r"expected one of float64, .*got 'auto'"):
            open_model(plain, runner=runner)


def test_both_sizes_of_a_tensor_that_does_not_fit_are_named(plain):
    change(plain, lambda state: {**state, "model.norm.weight": torch.ones(31)})
    with pytest.raises(CheckpointError, match=r"\(expected \(32,\), got \(31,\)\)"):
        open_model(plain)
