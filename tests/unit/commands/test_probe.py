"""The exits that ``offramp probe`` calls complete."""

import pytest

from offramp.commands.probe import complete_exits
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer


@pytest.mark.parametrize(
    ("source", "exits", "found"),
    [(None, (1, 2, 3), []), (2, (1, 2, 3), [2, 3]), (1, (1, 3), [1, 3]), (3, (1, 2), [])],
)
def test_exits_at_or_above_the_last_block_that_writes_are_complete(source, exits, found):
    model = Transformer(
        DecoderConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            exit_layers=(*exits, 4),
            kv_source_layer=source,
        )
    )
    assert complete_exits(model) == found
