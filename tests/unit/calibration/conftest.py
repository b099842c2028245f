import numpy as np
import pytest

from offramp.evaluation.trace import ExitTrace


@pytest.fixture
def make_trace():
    """A random trace of 2 layers or more, whose exits know what they know the better the later.

    Windows of ``length`` tokens; the first choice of an exit is the last one's (0) the more
    likely, the higher the score.
    """

    def make(sequences=200, *, exit_layers=(1, 2), length=8, seed=0):
        random = np.random.default_rng(seed)
        exits, tokens = len(exit_layers), sequences * length
        scores = random.random((exits, tokens)).astype(np.float32)
        wrong = random.random((exits, tokens)) > scores ** (1 / np.arange(1, exits + 1)[:, None])
        wrong[-1] = False
        nll = random.exponential(0.5, tokens) + 0.5 * wrong * random.random((exits, tokens))
        return ExitTrace(
            num_layers=exit_layers[-1],
            exit_layers=exit_layers,
            targets=np.zeros(tokens, dtype=np.int64),
            nll=nll.astype(np.float32),
            argmax=wrong.astype(np.int64),
            confidence={"max_prob": scores},
            sequence=np.repeat(np.arange(sequences, dtype=np.int32), length),
            position=np.tile(np.arange(length, dtype=np.int32), sequences),
        )

    return make
