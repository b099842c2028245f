"""Corpora, their tokens, and the windows that a model reads.

A corpus is text. A tokenizer (Hugging Face ``tokenizers``) converts it to ids. The ids are read
in contiguous windows; each token is predicted from the tokens before it in its window.
"""

from offramp.data.corpus import BUILT_IN, Corpus, StreamedCorpus, load_corpus, stream_corpus
from offramp.data.text import Text
from offramp.data.tokenizer import (
    UNKNOWN,
    character_tokenizer,
    encode,
    make_tokenizer,
)
from offramp.data.tokens import TokenShards, tokenise
from offramp.data.vocabulary import count_unknown, vocabulary_size
from offramp.data.windows import TokenWindows, batch_indices, batches

__all__ = [
    "BUILT_IN",
    "UNKNOWN",
    "Corpus",
    "StreamedCorpus",
    "Text",
    "TokenShards",
    "TokenWindows",
    "batch_indices",
    "batches",
    "character_tokenizer",
    "count_unknown",
    "encode",
    "load_corpus",
    "make_tokenizer",
    "stream_corpus",
    "tokenise",
    "vocabulary_size",
]
