"""A Hugging Face model behind the waist says what it says itself."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offramp.data import batches
from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.evaluation.trace import collect_trace
from offramp.models.base import EarlyExitModel, Step, whole_step
from offramp.models.exit_heads import UntrainedExitsWarning
from offramp.models.huggingface.model import HuggingFaceModel

transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS, WINDOW = 61, 4, 4
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {
    **{name: value for name, value in SHAPE.items() if "intermediate" not in name},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}
LOCAL_GLOBAL = ["sliding_attention", "full_attention"] * 2
GEMMA = {
    **SHAPE,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 6,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": LOCAL_GLOBAL,
    "num_kv_shared_layers": 2,
}
"The two last layers read the keys and values of the two first ones."
OF_TOKENS = ("embed_tokens_per_layer.weight", "per_layer_model_projection.weight")
FAMILIES = {
    "llama": ("LlamaConfig", SHAPE),
    "smollm2": ("LlamaConfig", {**SHAPE, "tie_word_embeddings": True, "rope_theta": 100_000.0}),
    "qwen2": ("Qwen2Config", SHAPE),
    "qwen2, windows above layer 2": (
        "Qwen2Config",
        {**SHAPE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 12}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {**SHAPE, "head_dim": 8, "sliding_window": WINDOW, "layer_types": LOCAL_GLOBAL},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**SHAPE, "head_dim": 8, "sliding_window": WINDOW, "layer_types": LOCAL_GLOBAL},
    ),
    "gemma3n": ("Gemma3nTextConfig", {**GEMMA, "laurel_rank": 5, "altup_num_inputs": 3}),
    "gemma4": ("Gemma4TextConfig", {**GEMMA, "global_head_dim": 16, "use_double_wide_mlp": True}),
    "gpt2": ("GPT2Config", GPT),
    "pythia": (
        "GPTNeoXConfig",
        {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"},
    ),
    "opt": ("OPTConfig", OPT),
    "opt, post-norm and projected": (
        "OPTConfig",
        {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "phi": ("PhiConfig", SHAPE),
    "olmo2": ("Olmo2Config", SHAPE),
    "granite": ("GraniteConfig", {**SHAPE, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "deepseek v3": (
        "DeepseekV3Config",
        {
            **SHAPE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
        },
    ),
}
if not hasattr(transformers, "Gemma4TextConfig"):  # before, Gemma 3n passed other things on
    FAMILIES = {name: of for name, of in FAMILIES.items() if name not in ("gemma3n", "gemma4")}
WHOLE_ONLY = {
    "bloom": ("BloomConfig", {**GPT, "hidden_size": 32}),
    "mamba": ("MambaConfig", {**SHAPE, "state_size": 8}),
}


def config_of(family):
    name, fields = {**FAMILIES, **WHOLE_ONLY}[family]
    return getattr(transformers, name)(**deepcopy(fields))


def random_model(config, dtype=torch.float32):
    """Every parameter random: a wrong norm, bias or scale would show."""
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm.to(dtype)


@cache
def wrapped(family, dtype=torch.float32):
    model = HuggingFaceModel(random_model(config_of(family), dtype), exit_layers=(1, 2))
    model.exits.trained = True
    return model


@pytest.fixture(params=FAMILIES)
def model(request):
    return wrapped(request.param)


@pytest.fixture(params=WHOLE_ONLY)
def whole_only(request):
    return wrapped(request.param)


def make_ids(batch, length, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.manual_seed(seed))


@torch.no_grad()
def own_logits(model, ids):
    return model.backbone(input_ids=ids).logits


@torch.no_grad()
def logits_at(model, ids, layer, real=None):
    [(_, h)] = model.states_at(ids, [layer], step=whole_step(ids, real=real))
    return model.unembed(h, layer)


@torch.no_grad()
def run(model, ids, step):
    h = model.run_layers(model.embed(ids, step=step), 0, model.num_layers, step=step)
    return model.unembed(h, model.num_layers)


def truncated(lm, layers):
    """A second model of this many layers with the first one's parameters."""
    config = deepcopy(lm.config)
    config.num_hidden_layers = layers
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = config.layer_types[:layers]
    stored = lm.state_dict()
    if "num_kv_shared_layers" in vars(config):
        config.num_kv_shared_layers = max(0, layers - 2)
        width = layers * config.hidden_size_per_layer_input
        for name in OF_TOKENS:
            value = stored[f"model.{name}"]
            stored[f"model.{name}"] = value[:, :width] if "embed" in name else value[:width]
    small = transformers.AutoModelForCausalLM.from_config(config).eval()
    own = small.state_dict()
    small.load_state_dict({n: value for n, value in stored.items() if n in own})
    return small


def close(actual, expected):
    assert_close(actual, expected, rtol=0, atol=1e-4)


def test_it_is_an_early_exit_model_whose_blocks_run_one_by_one(model):
    assert isinstance(model, EarlyExitModel)
    assert model.why_no_blocks == ""
    assert (model.num_layers, model.exit_layers) == (LAYERS, (1, 2, LAYERS))
    stacked = getattr(model.backbone.config, "altup_num_inputs", 1)
    assert (model.vocab_size, model.hidden_size) == (VOCABULARY, 32 * stacked)


def test_no_weight_is_copied(model):
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.backbone.parameters()}


def test_the_last_exit_is_the_model_itself(model):
    ids = make_ids(2, 13)
    close(logits_at(model, ids, LAYERS), own_logits(model, ids))
    close(run(model, ids, whole_step(ids)), own_logits(model, ids))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_an_exit_is_the_model_truncated_there(model, layer):
    ids = make_ids(2, 13)
    expected = truncated(model.backbone, layer)(input_ids=ids).logits
    close(logits_at(model, ids, layer), expected.detach())


def test_a_vocabulary_slice_is_a_slice_of_the_logits(model):
    [(_, h)] = model.states_at(ids := make_ids(1, 3), [2], step=whole_step(ids))
    some = torch.tensor([7, 0, 60])
    close(model.unembed(h, 2, vocab=some), model.unembed(h, 2)[..., some])


def test_cached_equals_uncached(model):
    ids = make_ids(2, 14)
    expected = own_logits(model, ids)
    kv_cache = model.make_cache(2, capacity=14)
    for start, stop in ((0, 5), (5, 8), *((t, t + 1) for t in range(8, 14))):
        step = Step(positions=torch.arange(start, stop)[None], cache=kv_cache)
        close(run(model, ids[:, start:stop], step), expected[:, start:stop])
    assert (kv_cache.lengths == 14).all()


def test_layers_may_be_filled_at_different_times(model):
    ids = make_ids(1, 8)
    kv_cache = model.make_cache(1, capacity=8)
    run(model, ids[:, :5], Step(positions=torch.arange(5)[None], cache=kv_cache))
    waiting = []
    for t in (5, 6, 7):
        step = Step(positions=torch.tensor([[t]]), cache=kv_cache)
        h = model.embed(ids[:, t : t + 1], step=step)
        waiting.append(model.run_layers(h, 0, 1, step=step))
    step = Step(positions=torch.arange(5, 8)[None], cache=kv_cache)
    h = model.run_layers(torch.cat(waiting, dim=1), 1, LAYERS, step=step)
    close(model.unembed(h, LAYERS), own_logits(model, ids)[:, 5:])


LENGTHS = (9, 6, 2)


def padded(side):
    """Rows, and the same in one batch with junk where there is padding."""
    rows = [make_ids(1, n + 3, seed=n)[0] for n in LENGTHS]
    ids = torch.full((3, max(LENGTHS)), 11)
    real = torch.zeros(3, max(LENGTHS), dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        columns = slice(0, n) if side == "right" else slice(max(LENGTHS) - n, None)
        ids[i, columns], real[i, columns] = rows[i][:n], True
    return rows, ids, real


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_rows(model, side):
    rows, ids, real = padded(side)
    logits = logits_at(model, ids, LAYERS, real)
    assert logits.isfinite().all()
    for i, n in enumerate(LENGTHS):
        close(logits[i, real[i]], own_logits(model, rows[i][None, :n])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_then_some_of_the_rows_equal_single_rows(model, side):
    rows, ids, real = padded(side)
    kv_cache = model.make_cache(3, capacity=12)
    whole = whole_step(ids, real=real)
    run(model, ids, Step(positions=whole.positions, real=real, cache=kv_cache))
    chosen = [2, 0]
    for t in range(3):
        step = Step(
            positions=torch.tensor([[LENGTHS[i] + t] for i in chosen]),
            cache=kv_cache,
            rows=torch.tensor(chosen),
        )
        token = torch.stack([rows[i][LENGTHS[i] + t, None] for i in chosen])
        logits = run(model, token, step)
        for at, i in enumerate(chosen):
            close(logits[at, 0], own_logits(model, rows[i][None])[0, LENGTHS[i] + t])


@torch.no_grad()
def test_tokens_not_active_keep_their_state_and_write_keys_and_values(model):
    ids = make_ids(2, 7)
    active = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 1, 1, 1]], dtype=torch.bool)
    caches = [model.make_cache(2, capacity=7) for _ in range(2)]
    step, other = (Step(positions=torch.arange(7)[None], cache=cache) for cache in caches)
    cut = min(2, model.complete_from - 1)
    h, _ = model.embed(ids, step=step), model.embed(ids, step=other)
    out = model.run_layers(h, 0, cut, step=step, active=active)
    assert torch.equal(out[~active], h[~active])
    expected, whole = h, whole_step(ids)
    model.embed(ids, step=whole)
    for layer in range(cut):
        expected = torch.where(
            active[..., None],
            model.run_layers(expected, layer, layer + 1, step=whole),
            expected,
        )
    close(out, expected)
    model.run_layers(out, cut, LAYERS, step=step, active=torch.zeros_like(active))
    model.project_kv(out, cut, LAYERS, step=other)
    assert caches[0].keys[cut:].abs().sum() > 0
    close(caches[1].keys[cut:], caches[0].keys[cut:])
    close(caches[1].values[cut:], caches[0].values[cut:])
    assert not caches[1].keys[:cut].any()


def test_gradients_reach_every_unfrozen_block_and_no_other(model):
    model = HuggingFaceModel(deepcopy(model.backbone), exit_layers=(1,)).train()
    blocks = next(
        part
        for part in model.backbone.modules()
        if isinstance(part, nn.ModuleList) and len(part) == LAYERS
    )
    blocks[1].requires_grad_(False)
    ids = make_ids(2, 9)
    loss = sum(
        model.unembed(h, layer).logsumexp(-1).square().mean()
        for layer, h in model.states_at(ids, [1, LAYERS], step=whole_step(ids))
    )
    loss.backward()
    for i, block in enumerate(blocks):
        taken = [p.grad for p in block.parameters() if p.grad is not None and p.grad.any()]
        assert bool(taken) == (i != 1)
    last = [p for p in blocks[LAYERS - 1].parameters() if p.grad is None]
    assert not last


def test_bfloat16_works(request, model):
    family = request.node.callspec.params["model"]
    half = wrapped(family, torch.bfloat16)
    assert half.why_no_blocks == ""
    ids = make_ids(2, 9)
    expected = own_logits(half, ids)
    assert logits_at(half, ids, 2).dtype == expected.dtype == torch.bfloat16
    spread = float(expected.float().std())
    assert_close(logits_at(half, ids, LAYERS), expected, rtol=0, atol=0.05 * spread)
    kv_cache = half.make_cache(2, capacity=9)
    run(half, ids[:, :8], Step(positions=torch.arange(8)[None], cache=kv_cache))
    token = run(half, ids[:, 8:], Step(positions=torch.tensor([[8]]), cache=kv_cache))
    assert_close(token, expected[:, 8:], rtol=0, atol=0.2 * spread)


@pytest.mark.parametrize("exit_head", ["norm", "adapter", "full"])
def test_own_heads_begin_as_the_final_one_and_learn_apart(model, exit_head):
    if "post-norm" in str(model.backbone.config) or model.backbone.config.model_type == "opt":
        pytest.skip("has no final norm to begin from") if not model._layout.norm else None
    own = HuggingFaceModel(model.backbone, exit_layers=(1, 2), exit_head=exit_head)
    own.exits.trained = True
    ids = make_ids(2, 6)
    close(logits_at(own, ids, 2), logits_at(model, ids, 2))
    kept = own_logits(own, ids)
    with torch.no_grad():
        for parameter in own.exits["2"].parameters():
            parameter.add_(0.3)
    assert (logits_at(own, ids, 2) - logits_at(model, ids, 2)).abs().max() > 0.01
    close(logits_at(own, ids, 1), logits_at(model, ids, 1))
    assert torch.equal(own_logits(own, ids), kept)


def test_a_model_of_unknown_blocks_gives_its_states_all_the_same(whole_only):
    ids = make_ids(2, 9)
    assert whole_only.why_no_blocks
    close(logits_at(whole_only, ids, LAYERS), own_logits(whole_only, ids))
    for layer in (1, 2, 3):
        expected = truncated(whole_only.backbone, layer)(input_ids=ids).logits
        close(logits_at(whole_only, ids, layer), expected.detach())
    trace = collect_trace(whole_only, batches(make_ids(1, 40)[0], seq_len=8, batch_size=2))
    assert trace.nll.shape == (3, 39)


def test_a_model_of_unknown_blocks_says_what_works(whole_only):
    ids = make_ids(1, 4)
    step = whole_step(ids)
    for call in (
        lambda: whole_only.embed(ids, step=step),
        lambda: whole_only.run_layers(torch.zeros(1, 4, 32), 0, 1, step=step),
        lambda: whole_only.make_cache(1, 8),
    ):
        with pytest.raises(UnsupportedArchitectureError, match=r"traces and sweeps work") as caught:
            call()
        assert whole_only.model_type in str(caught.value)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_whole_passes(side):
    model = wrapped("bloom")
    rows, ids, real = padded(side)
    logits = logits_at(model, ids, LAYERS, real)
    for i, n in enumerate(LENGTHS):
        close(logits[i, real[i]], own_logits(model, rows[i][None, :n])[0])


def test_untrained_exits_are_said_once(recwarn):
    model = HuggingFaceModel(random_model(config_of("llama")), exit_layers=(1,))
    h = torch.zeros(1, 1, 32)
    model.unembed(h, LAYERS)
    model.train()
    model.unembed(h, 1)
    assert not recwarn.list
    model.eval()
    with pytest.warns(UntrainedExitsWarning, match="layer 1 was never trained"):
        model.unembed(h, 1)
    model.unembed(h, 1)


@pytest.mark.parametrize("layers", [(0,), (5,), (-1,)])
def test_exits_out_of_range_are_refused(layers):
    with pytest.raises(ConfigError, match=r"exit_layers: expected layers from 1 to 4"):
        HuggingFaceModel(random_model(config_of("llama")), exit_layers=layers)


def test_exits_stand_at_each_quarter_of_the_depth_by_default():
    assert HuggingFaceModel(random_model(config_of("llama"))).exit_layers == (1, 2, 3, 4)


def test_a_sequence_too_long_is_refused(model):
    ids = make_ids(1, 33)
    with pytest.raises(ConfigError, match="at most 32"):
        model.embed(ids, step=whole_step(ids))


def test_an_encoder_is_refused():
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(UnsupportedArchitectureError, match=r"bert: expected a decoder-only"):
        HuggingFaceModel(random_model(config))
