"""What tasks cost: layers, FLOPs and seconds."""

import pytest

from offramp.commands.evaluate.counts import TaskCounts
from offramp.data import make_tokenizer
from offramp.models.open import open_in_memory


@pytest.fixture
def opened(make_model):
    model = make_model(exit_layers=(1, 2), vocab_size=20)
    return open_in_memory(model, make_tokenizer("characters", ["abcdefghijklmnopqrs"]))


def test_the_first_token_of_a_text_counts_with_all_layers(opened):
    counts = TaskCounts(missing_kv="propagate", seconds=2.0)
    counts.add([3], 5, opened.model)
    full = counts.figures(opened, None)
    assert (full.mean_layers, full.flops_pct) == (3, pytest.approx(100))
    assert (full.tokens, full.context_tokens, full.tokens_per_s) == (1, 5, 0.5)
    counts.add([3, 1, 1], 5, opened.model)
    assert counts.figures(opened, None).mean_layers == (3 + 3 + 1 + 1) / 4


def test_a_static_model_costs_less_than_the_whole(opened):
    counts = TaskCounts(missing_kv="propagate")
    counts.add([2, 2, 2], 5, opened.model)
    figures = counts.figures(opened, None, depth=2)
    assert figures.mean_layers == 2
    assert 50 < figures.flops_pct < 100


def test_no_token_has_no_cost(opened):
    counts = TaskCounts(missing_kv="propagate")
    counts.add([], 5, opened.model)
    figures = counts.figures(opened, None)
    assert (figures.mean_layers, figures.flops_pct, figures.tokens_per_s) == (None, None, None)


def test_a_group_adds_up_its_tasks(opened):
    parts = [TaskCounts(missing_kv="recompute", seconds=1.0, truncated=1) for _ in range(2)]
    for part in parts:
        part.add([3, 1], 4, opened.model)
    whole = TaskCounts(missing_kv="recompute").merged(parts)
    assert (whole.tokens, whole.texts, whole.truncated, whole.seconds) == (4, 2, 2, 2.0)
    assert whole.context_tokens == 8
