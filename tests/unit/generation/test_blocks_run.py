"""How many blocks decoding runs for each token of a text."""

from offramp.generation.blocks_run import layers_run


def test_under_recompute_a_token_runs_as_deep_as_a_later_one():
    exits = [4, 1, 2, 1, 3, 1]
    assert layers_run(exits, "propagate", cache_layers=4) == exits
    assert layers_run(exits, "recompute", cache_layers=4) == [4, 3, 3, 3, 3, 1]
    assert layers_run(exits, "recompute", cache_layers=2) == [4, 2, 2, 2, 3, 1]
    assert layers_run([], "recompute", cache_layers=4) == []
