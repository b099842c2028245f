"""Log probabilities of requests that ask for them; the tokens are the same without."""

import pytest
import torch

from offramp.errors import ConfigError
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.logprobs import logprobs_of

MODES = [{}, {"threshold": 0.2}, {"speculative": True, "draft_threshold": -1.0}]


def tokens(model, logprobs, mode):
    engine = Engine(model, EngineConfig(slots=1, capacity=40))
    config = GenerateConfig(max_new_tokens=12, **mode)
    request = engine.submit([1, 2, 3], config, logprobs=logprobs)
    list(engine.run())
    return request.completion.tokens


def about(found):
    return [(token.id, token.exit_layer, token.confidence) for token in found]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_greedy_token_is_the_likeliest_where_it_left(make_model, mode):
    model = make_model(exit_layers=(1, 2), dtype=torch.float32)
    found = tokens(model, 3, mode)
    for token in found:
        (first, logprob), *others = token.top_logprobs
        assert (first, logprob) == (token.id, token.logprob)
        assert len(others) == 2
        assert all(other <= logprob < 0 for _, other in others)
    if "speculative" not in mode:  # whose drafts pause as time passes
        assert about(found) == about(tokens(model, None, mode))
    assert {token.logprob for token in tokens(model, None, mode)} == {None}
    assert all(token.logprob < 0 and not token.top_logprobs for token in tokens(model, 0, mode))


def test_they_are_the_softmax_of_the_logits():
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0], dtype=torch.bfloat16)
    own, top = logprobs_of(logits, 0, 9)
    expected = logits.float().log_softmax(0).tolist()
    assert own == expected[0]
    assert sorted(top) == list(enumerate(expected))
    assert [value for _, value in top] == sorted(expected, reverse=True)


def test_a_negative_number_is_refused(make_model):
    with pytest.raises(ConfigError, match="logprobs: expected at least 0, got -1"):
        Engine(make_model()).submit([1], logprobs=-1)
