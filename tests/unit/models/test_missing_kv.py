"""Where exits are complete, figures state "exact", and no choice makes a difference."""

from types import SimpleNamespace

import pytest

from offramp.models.missing_kv import complete, missing_kv_of


def like(complete_from, *exits, layers=6):
    return SimpleNamespace(
        num_layers=layers, exit_layers=(*exits, layers), complete_from=complete_from
    )


@pytest.mark.parametrize(
    ("complete_from", "exits", "meaning"),
    [
        (1, (1, 2, 3), "exact"),
        (2, (2,), "exact"),
        (2, (4, 5), "exact"),
        (2, (1, 2), "recompute"),
        (3, (1, 2), "recompute"),
        (5, (4,), "recompute"),
        (6, (5,), "recompute"),
        (2, (), "exact"),
        (6, (), "recompute"),
    ],
)
def test_a_set_of_exits_is_exact_if_all_are_complete(complete_from, exits, meaning):
    model = like(complete_from, *exits)
    assert complete(model) == (meaning == "exact")
    assert missing_kv_of(model, "recompute") == meaning
    assert missing_kv_of(model, "propagate") == meaning.replace("recompute", "propagate")


def test_only_the_exits_that_may_be_used_count():
    model = like(2, 1, 2, 4)
    assert not complete(model)
    assert complete(model, [2, 4])
    assert complete(model, [4, 6])
    assert not complete(model, [1, 4])
    assert complete(model, [])
