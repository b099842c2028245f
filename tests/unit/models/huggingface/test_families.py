"""Windows, rotary factors that change, unequal rows, positions with an offset: what a family of
``transformers`` computes otherwise than block by block is refused by name, never silently wrong.

``tests/families`` tries every family; these are the kinds of faults that it found.
"""

from functools import wraps

import pytest
import torch

from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.base import Step, whole_step
from offramp.models.huggingface.exits_file import from_pretrained
from offramp.models.huggingface.small import WINDOW, small_config

transformers = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 4.4, 4.8, 5.2],
    "original_max_position_embeddings": 16,
}


def made(config):
    torch.manual_seed(0)
    with torch.no_grad():
        lm = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm


def opened(kind, **fields):
    return from_pretrained(made(getattr(transformers, kind)(**{**SIZE, **fields})))


def ids_of(length, rows=1):
    return torch.randint(1, 61, (rows, length), generator=torch.manual_seed(1))


def test_longrope_decodes_up_to_the_length_where_its_factors_change_and_refuses_more():
    change = {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}
    model = opened("Phi3Config", bos_token_id=1, eos_token_id=2, **change)
    assert model.why_no_blocks == ""
    assert model.max_length == 16
    prompt = ids_of(10)[0].tolist()
    tokens = list(generate(model, prompt, GenerateConfig(max_new_tokens=40)))
    assert len(tokens) == 7  # the last of them has no position
    ids = list(prompt)
    for token in tokens:
        logits = model.backbone(input_ids=torch.tensor([ids])).logits[0, -1]
        assert token.id == logits.argmax()
        ids.append(token.id)
    with pytest.raises(ConfigError, match=r"expected at most 16 .*original_max_position.*got 17"):
        model(ids_of(17))


def test_gpt_neo_has_no_cache_since_its_window_does_not_know_the_rows_positions():
    model = from_pretrained(
        made(
            transformers.GPTNeoConfig(
                vocab_size=61,
                hidden_size=32,
                num_layers=4,
                num_heads=4,
                window_size=16,
                max_position_embeddings=64,
                attention_types=[[["global", "local"], 2]],
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    )
    with pytest.raises(UnsupportedArchitectureError, match="other states with a cache; training"):
        model.make_cache(1, 8)


def test_moshi_runs_only_whole_since_its_window_is_not_one():
    config = transformers.CONFIG_MAPPING["moshi"]()
    model = from_pretrained(made(small_config(config)))
    assert "in a sequence of 36 tokens" in model.why_no_blocks
    ids = ids_of(40)
    assert torch.equal(model(ids), model.backbone(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["RobertaConfig", "XLMRobertaConfig"])
def test_roberta_is_refused_since_its_head_computes_between_modules(kind):
    with pytest.raises(UnsupportedArchitectureError, match="unknown computation between"):
        opened(kind, is_decoder=True)


@pytest.mark.parametrize("kind", ["BertConfig", "RobertaConfig", "ElectraConfig"])
def test_an_encoder_opened_as_a_causal_model_is_refused(kind):
    with pytest.raises(UnsupportedArchitectureError, match="first token attends to later ones"):
        opened(kind, is_decoder=False)


@pytest.mark.parametrize("kind", ["xlnet", "blt", "xlm", "prophetnet", "reformer", "minicpm3"])
def test_a_family_that_cannot_be_used_is_refused_in_one_sentence(kind):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("is not in this version")
    fields = {"is_decoder": True, "axial_pos_embds": False} if kind == "reformer" else {}
    lm = made(small_config(transformers.CONFIG_MAPPING[kind](**fields)))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        from_pretrained(lm)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(kind)


@pytest.mark.parametrize("kind", ["MambaConfig", "BloomConfig"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_rows_of_a_model_that_runs_only_whole_run_without_padding(kind, left):
    model = opened(kind, n_layer=4, n_head=4, state_size=8)
    assert model.why_no_blocks
    row = ids_of(7)
    ids, real = torch.full((2, 10), 5), torch.ones(2, 10, dtype=torch.bool)
    here = slice(3, None) if left else slice(0, 7)
    real[1] = False
    ids[1, here], real[1, here] = row[0], True
    [(_, h)] = model.states_at(ids, [2], step=whole_step(ids, real=real))
    [(_, alone)] = model.states_at(row, [2], step=whole_step(row))
    assert torch.equal(h[1, here], alone[0])
    assert not h[1, ~real[1]].any()


def test_a_window_that_only_a_long_sequence_shows_is_checked_when_a_model_is_opened():
    """A block that ignores the window of its config equals the model on 6 tokens."""
    mistral = made(transformers.MistralConfig(**{**SIZE, "num_key_value_heads": 2}))
    forward = wraps(type(mistral).forward)(_without_window)
    wrong = type("Blind", (type(mistral),), {"forward": forward})
    for kind, why in ((type(mistral), ""), (wrong, "in a sequence of 36 tokens")):
        mistral.__class__ = kind
        assert why in (found := from_pretrained(mistral).why_no_blocks)
        assert bool(found) == bool(why)


def _without_window(self, input_ids=None, **options):
    own, self.model.config.sliding_window = self.model.config.sliding_window, None
    try:
        return super(type(self), self).forward(input_ids=input_ids, **options)
    finally:
        self.model.config.sliding_window = own


def test_a_small_config_has_every_kind_of_layer_and_short_windows():
    config = transformers.Gemma3TextConfig(num_hidden_layers=12, sliding_window=512)
    small = small_config(config)
    assert small.sliding_window == WINDOW
    assert small.num_hidden_layers == len(small.layer_types) == 4
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert small.max_position_embeddings > 36


def test_opening_a_model_leaves_the_random_numbers_alone():
    lm = made(transformers.LlamaConfig(**SIZE))
    state = torch.random.get_rng_state()
    from_pretrained(lm)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_cache_of_a_window_model_passes_the_window():
    model = opened("MistralConfig", num_key_value_heads=2, sliding_window=5)
    ids = ids_of(20)
    cache = model.make_cache(1, 20)
    for t in range(20):
        step = Step(positions=torch.tensor([[t]]), cache=cache)
        h = model.run_layers(model.embed(ids[:, t : t + 1], step=step), 0, 4, step=step)
    expected = model.backbone(input_ids=ids).logits[:, -1]
    assert torch.allclose(model.unembed(h, 4)[:, 0], expected, atol=1e-4)


def test_a_special_token_gets_the_embedding_that_the_model_gives_it():
    """Gemma 4 replaces the embeddings of its image, video and sound tokens."""
    if "gemma4_unified" not in transformers.CONFIG_MAPPING:
        pytest.skip("is not in this version")
    model = from_pretrained(made(small_config(transformers.CONFIG_MAPPING["gemma4_unified"]())))
    ids = ids_of(9)
    ids[0, 4] = model.backbone.config.video_token_id
    expected = model.backbone(input_ids=ids).logits
    assert torch.allclose(model(ids), expected, atol=1e-4)
    plain = model._layout.embedding(ids)
    assert not torch.equal(model.embed(ids, step=whole_step(ids))[0, 4], plain[0, 4])
