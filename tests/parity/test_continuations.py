"""Scored continuations: what decoding chooses, alone and in a batch, under both missing caches."""

import math

import pytest
import torch

from offramp.errors import CheckpointError, ConfigError
from offramp.evaluation.continuations import Continuation, score_continuations
from offramp.exits.gate import NOTHING_FITTED
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.generation.options import exit_rule, missing_kv_for
from offramp.models.base import whole_step
from offramp.models.huggingface.exits_file import from_pretrained

PROMPTS = ([3], [1, 2, 3, 4, 5, 6, 7], [9, 9, 2])
OPTIONS = [
    {"threshold": None},
    {"threshold": 0.17, "confidence": "max_prob"},
    {"threshold": (0.1, 0.5), "confidence": "margin"},
    {"threshold": 0.7, "confidence": "saturation"},
    {"threshold": 2.0, "confidence": "patience"},
    {"threshold": -math.inf, "confidence": "max_prob"},
]


@pytest.fixture(params=["plain", "complete"])
def model(request, make_model):
    shared = {"kv_source_layer": 2} if request.param == "complete" else {}
    return make_model(exit_layers=(1, 2), num_hidden_layers=4, **shared)


def scored(model, options, texts):
    config = GenerateConfig(**options)
    rule = exit_rule(model, config, policy=None, fitted=NOTHING_FITTED)
    way, _ = missing_kv_for(model, config, rule)
    return score_continuations(model, texts, rule=rule, missing_kv=way)


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options.get("confidence")))
def test_a_greedy_text_is_scored_as_it_was_decoded(model, options, missing_kv):
    options = {**options, "missing_kv": missing_kv, "max_new_tokens": 9}
    decoded = [generate(model, prompt, GenerateConfig(**options)) for prompt in PROMPTS]
    tokens = [list(each) for each in decoded]
    texts = [
        Continuation(context=tuple(prompt), tokens=tuple(token.id for token in row))
        for prompt, row in zip(PROMPTS, tokens, strict=True)
    ]
    for score, row in zip(scored(model, options, texts), tokens, strict=True):
        assert score.greedy
        assert list(score.exit_layers) == [token.exit_layer for token in row]
        assert len(row) == 9
        if options.get("confidence", "max_prob") == "max_prob":
            chosen = [math.exp(value) for value in score.log_probs]
            assert chosen == pytest.approx([token.confidence for token in row], rel=1e-6)


def test_thresholds_let_tokens_leave_at_every_exit(model):
    """Without this the other tests compare nothing."""
    texts = [Continuation(context=(1,), tokens=tuple(range(13)) * 4)]
    for options in OPTIONS[1:4]:
        [score] = scored(model, options, texts)
        assert len(set(score.exit_layers[1:])) > 1, options


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
def test_a_batch_gives_each_text_the_score_that_it_gets_alone(model, missing_kv):
    options = {**OPTIONS[1], "missing_kv": missing_kv}
    texts = [
        Continuation(context=context, tokens=tokens)
        for context in ((1,), (4, 5, 6, 7, 8, 9))
        for tokens in ((2,), (7,), (3, 3, 3, 3, 3, 3, 3), (2, 11))
    ]
    together = scored(model, options, texts)
    for text, score in zip(texts, together, strict=True):
        [alone] = scored(model, options, [text])
        assert score.log_probs == pytest.approx(alone.log_probs, abs=1e-9)
        assert (score.greedy, score.exit_layers) == (alone.greedy, alone.exit_layers)


def test_the_probabilities_of_all_next_tokens_sum_to_one(model):
    texts = [Continuation(context=(1, 2), tokens=(5, 6, last)) for last in range(model.vocab_size)]
    scores = scored(model, OPTIONS[1], texts)
    assert sum(math.exp(score.log_probs[-1]) for score in scores) == pytest.approx(1)
    assert sum(score.greedy for score in scores) <= 1
    assert len({score.log_probs[:2] for score in scores}) == 1


def test_logits_that_are_no_numbers_are_an_error(make_model):
    model = make_model(exit_layers=(1,))
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(CheckpointError, match="expected finite numbers, got nan"):
        score_continuations(model, [Continuation(context=(1,), tokens=(2,))])


@pytest.mark.parametrize(("context", "tokens"), [((), (1,)), ((1,), ())])
def test_a_continuation_has_a_context_and_tokens(context, tokens):
    with pytest.raises(ConfigError, match="expected at least 1 token, got none"):
        Continuation(context=context, tokens=tokens)


@pytest.fixture(scope="module")
def whole_only():
    """A model whose blocks cannot be run one by one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=3, state_size=8
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return from_pretrained(model, exit_layers=(1, 2))


def test_a_model_that_runs_only_whole_is_scored_under_recompute(whole_only):
    whole_only.silence_untrained()
    texts = [
        Continuation(context=(1, 2, 3), tokens=(4, 5, 6, 7)),
        Continuation(context=(3,), tokens=(9,)),
    ]
    options = {"threshold": 0.09, "confidence": "max_prob"}
    scores = scored(whole_only, {**options, "missing_kv": "recompute"}, texts)
    assert set(scores[0].exit_layers[1:]) < {1, 2, 3}
    for text, score in zip(texts, scores, strict=True):
        ids = torch.tensor([text.inputs])
        reached = dict(whole_only.states_at(ids, [1, 2, 3], step=whole_step(ids)))
        start = len(text.context) - 1
        for place, (token, layer) in enumerate(zip(text.tokens, score.exit_layers, strict=True)):
            logits = whole_only.unembed(reached[layer], layer)[0, start + place]
            expected = logits.log_softmax(dim=-1)[token].item()
            assert score.log_probs[place] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="missing_kv: expected a model whose blocks"):
        scored(whole_only, {**options, "missing_kv": "propagate"}, texts)
