"""BPE training on one very long word ends soon, and Ctrl-C ends the wait."""

import random
import signal
import threading
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from offramp.data import encode, make_tokenizer
from offramp.data import tokenizer as module

RANDOM = random.Random(0)
WORD = "".join(RANDOM.choice("abcdefghij") for _ in range(262_144))


@pytest.mark.parametrize(
    "text",
    [WORD, "short words " * 500 + "-" * 100_000 + " " * 100_000 + "7" * 100_000 + "\u4e2d" * 9999],
    ids=["one word", "runs of every kind"],
)
def test_a_long_word_is_cut_for_the_training_and_no_character_is_lost(text):
    pieces = list(module._short_words(text))
    assert "".join(pieces) == text
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    longest = max(stop - start for p in pieces for _, (start, stop) in words.pre_tokenize_str(p))
    assert longest <= module._LONGEST_WORD + 1  # a word has its space
    began = time.monotonic()
    tokenizer = make_tokenizer("bpe:300", text)
    assert time.monotonic() - began < 10  # 40 s and more before
    assert tokenizer.decode(encode(tokenizer, text[:5000]).tolist()) == text[:5000]


def test_ordinary_text_gives_the_tokenizer_that_it_gave_before():
    """Short words stay whole, also where no space divides them."""
    chinese = "".join(
        RANDOM.choice("\u4e00\u4e8c\u4e09\u56db\u4e94\uff0c\u3002") for _ in range(9000)
    )
    text = "x = {'a': [1, 22]} # naive\n" * 200 + chinese + "a,b;" * 900 + " " * 900 + "end"
    assert list(module._short_words(text)) == [text]
    before = Tokenizer(models.BPE())
    before.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    before.decoder = decoders.ByteLevel()
    alphabet = module.byte_characters()
    before.train_from_iterator(
        module.cut_apart(text),
        trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        ),
    )
    assert make_tokenizer("bpe:300", text).to_str() == before.to_str()


def test_ctrl_c_ends_the_wait_for_a_library_that_answers_no_signal():
    released = threading.Event()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            module._stoppable(lambda: released.wait(30) and None)
    finally:
        released.set()
        signal.signal(signal.SIGALRM, before)


def test_an_error_of_the_text_reaches_the_caller():
    def pieces():
        yield "some text"
        raise ValueError("the text ends here")

    with pytest.raises(Exception, match="the text ends here"):
        module.train_bpe(300, pieces())
