"""How far a text that was written with exits is from the one that full depth writes.

Each loss is from 0 to 1, and its unit is the prompt. Both texts continue the same prompt, and both
are greedy, so they are the same until an exit changes a token. ``rouge-l`` is what CALM (Schuster
et al. 2022) certifies.
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def divergence(full: Sequence[int], early: Sequence[int]) -> float:
    """Return the share of positions from the first differing token on; 0 for the same tokens.

    Where one text goes on after the other has ended, its next token is one that differs. The share
    is that of the longer text.
    """
    longest = max(len(full), len(early))
    pairs = enumerate(zip(full, early, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(full), len(early)))
    return (longest - first) / longest if longest else 0.0


def rouge_l_loss(full: str, early: str) -> float:
    """Return 1 - ROUGE-L (Lin 2004) of the early text, with the full model's as the reference.

    ROUGE-L is the F1 of the longest common subsequence of words. A word is a run of letters,
    digits and underscores of any script, in lower case; two texts without words have no loss.
    """
    reference, words = (_WORD.findall(text.lower()) for text in (full, early))
    if not reference or not words:
        return float(bool(reference) != bool(words))
    return 1.0 - 2.0 * _common(reference, words) / (len(reference) + len(words))


def nll_gap_loss(full: float, early: float, *, bound: float) -> float:
    """Return by how much the early text is less likely, clipped to [0, ``bound``], over ``bound``.

    Each argument is the full model's mean NLL of a text, in nats per token: of its own text, and of
    the early one.
    """
    return min(max(early - full, 0.0), bound) / bound


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0  # best of the row above, one to the left
        for at, other in enumerate(b, start=1):
            above = best[at]
            best[at] = before + 1 if word == other else max(above, best[at - 1])
            before = above
    return best[-1]
