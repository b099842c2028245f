"""Speculation and batches give the text of greedy decoding wherever they promise it."""

from functools import cache

import pytest
import torch

from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate, generate_batch
from offramp.generation.promise import batches_keep_the_text, drafts_keep_the_text, drafts_note
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.models.native.config import DecoderConfig
from offramp.models.native.fast import kernels
from offramp.training.loop import new_model

transformers = pytest.importorskip("transformers")

SIZE, NEW = 97, 24
SHAPE = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT = {"vocab_size": SIZE, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
FAMILIES = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, "head_dim": 16}),
    "phi": ("PhiConfig", SHAPE),
    "gpt2": ("GPT2Config", {**GPT, "bos_token_id": 0, "eos_token_id": 0}),
}
PROMPTS = [[(7 * n * n + 3 * i) % SIZE for n in range(length)] for i, length in enumerate((3, 30))]
PROMPTS.append([5, 6, 7, 8] * 6)  # so that prompt lookup drafts, too


def shaken(model, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@cache
def by_transformers(family, dtype=torch.float32):
    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**fields)
    torch.manual_seed(0)
    lm = shaken(transformers.AutoModelForCausalLM.from_config(config), dtype)
    model = HuggingFaceModel(lm, exit_layers=(1, 3))
    model.silence_untrained()
    return model


def native(dtype):
    fields = {name: value for name, value in SHAPE.items() if name != "pad_token_id"}
    return shaken(new_model(DecoderConfig(**fields, exit_layers=(1, 3)), seed=0), dtype)


def text(model, prompt, **options):
    """The new ids, whether they are promised to be those of greedy decoding, and the drafts."""
    generation = generate(model, prompt, GenerateConfig(max_new_tokens=NEW, **options))
    ids = [token.id for token in generation]
    return ids, generation.lossless, generation.accepted


DRAFTS = {"speculative": True, "draft_exit": 3, "draft_threshold": 0.0, "adaptive": False}


def check_speculation(model):
    accepted = 0
    for seed, prompt in enumerate(PROMPTS):
        for sampled in ({}, {"temperature": 0.8, "seed": seed}):
            ids, lossless, here = text(model, prompt, **DRAFTS, **sampled)
            assert lossless
            assert ids == text(model, prompt, **sampled)[0]
            accepted += here
    assert accepted > 5
    assert drafts_note(model) == ""


def check_batches(model):
    assert batches_keep_the_text(model)
    together, _ = generate_batch(model, PROMPTS, GenerateConfig(max_new_tokens=NEW))
    assert [row.ids for row in together] == [text(model, prompt)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_transformers_models_keep_the_promise(family):
    model = by_transformers(family)
    check_speculation(model)
    check_batches(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_native_decoder_keeps_it_with_and_without_kernels(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "_compiled", None)
    model = native(dtype)
    check_speculation(model)
    check_batches(model)


@pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")
def test_in_bfloat16_the_compiled_kernels_keep_it():
    model = native(torch.bfloat16)
    assert model.rounds_alike()
    check_speculation(model)
    check_batches(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["transformers", "native without kernels"])
def test_where_rounding_may_change_the_text_nothing_is_promised(dtype, kind, monkeypatch):
    if kind == "transformers":
        model = by_transformers("qwen3", dtype)
    else:
        monkeypatch.setattr(kernels, "_compiled", None)
        model = native(dtype)
    assert not drafts_keep_the_text(model)
    assert not batches_keep_the_text(model)
    _, lossless, _ = text(model, PROMPTS[0], **DRAFTS)
    assert not lossless
    assert text(model, PROMPTS[0])[1]  # without drafts
    assert not text(model, PROMPTS[0], threshold=0.5)[1]
    note = drafts_note(model)
    assert str(dtype).removeprefix("torch.") in note
    assert "may differ" in note


def test_bfloat16_through_transformers_really_changes_a_text():
    """The reason for the note; if this fails, PyTorch rounds alike and the promise may grow."""
    families = ("llama", "qwen3", "phi", "gpt2")
    models = (by_transformers(family, torch.bfloat16) for family in families)
    found = (
        text(model, prompt, **DRAFTS)[0] != text(model, prompt)[0]
        for model in models
        for prompt in [*PROMPTS, *([n, n + 1, n + 2] for n in range(12))]
    )
    assert any(found)
