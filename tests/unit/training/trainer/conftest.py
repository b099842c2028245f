"""A tokenizer and rows to train on."""

import sys
from pathlib import Path

import pytest

from offramp.data import encode, load_corpus
from offramp.models.open import open_model

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def ids(checkpoint):
    text = load_corpus(str(checkpoint / "text.txt")).whole
    return encode(open_model(checkpoint).tokenizer, text)


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"), pad_token=".", eos_token="."
    )


@pytest.fixture(scope="session")
def padded(ids):
    """Rows of several lengths with padding on the right, and prompts that are not learned."""
    rows = []
    for row, length in enumerate((12, 5, 9, 7, 12, 3, 8, 10)):
        tokens = ids[row * 13 : row * 13 + length].tolist()
        rest = 12 - length
        rows.append(
            {
                "input_ids": tokens + [0] * rest,
                "labels": [-100] * (row % 3 + 1) + tokens[row % 3 + 1 :] + [-100] * rest,
                "attention_mask": [1] * length + [0] * rest,
            }
        )
    return rows
