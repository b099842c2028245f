"""How many drafts a round has follows from how often they are accepted and how long they take."""

import pytest

from offramp.generation.payoff import Payoff

PLAIN = 0.01


def payoff(kind, rounds, *, cost):
    """Return one that saw rounds of (drafts, accepted), each draft a share ``cost`` of a token."""
    made = Payoff()
    for _ in range(2):
        made.note("none", drafts=0, tokens=1, seconds=PLAIN)
    for drafts, accepted in rounds:
        seconds = PLAIN * (1 + cost * drafts)
        made.note(kind, drafts=drafts, tokens=accepted + 1, seconds=seconds)
    return made


@pytest.mark.parametrize("kind", ["exit", "lookup"])
@pytest.mark.parametrize(
    ("rounds", "cost", "drafts"),
    [
        ([], 0.2, 5),  # nothing is known yet
        ([(5, 0)] * 20, 0.2, 1),
        ([(5, 0)] * 20, 0.0, 5),  # drafts that cost nothing
        ([(5, 5)] * 20, 0.2, 5),
        ([(5, 1)] * 20, 0.2, 1),  # the second draft is always rejected
        ([(5, 0), (5, 5)] * 20, 0.2, 5),  # all or nothing
        ([(3, 2)] * 20, 0.2, 2),
        ([(1, 1)] * 20, 0.1, 5),  # nothing but a guess of the later ones
    ],
)
def test_a_round_has_as_many_drafts_as_pay(kind, rounds, cost, drafts):
    assert payoff(kind, rounds, cost=cost).drafts(kind, 5) == drafts


def test_the_sources_are_counted_apart_and_the_most_is_kept():
    made = payoff("lookup", [(5, 0)] * 20, cost=0.2)
    assert made.drafts("exit", 5) == 5
    assert made.drafts("exit", 2) == 2
    assert payoff("lookup", [(5, 5)] * 20, cost=0.2).drafts("lookup", 3) == 3


def test_more_drafts_come_back_with_a_text_that_repeats_itself():
    made = payoff("lookup", [(5, 0)] * 20, cost=0.2)
    assert made.drafts("lookup", 5) == 1
    while (drafts := made.drafts("lookup", 5)) < 5:
        made.note("lookup", drafts=drafts, tokens=drafts + 1, seconds=PLAIN * (1 + 0.2 * drafts))
    assert drafts == 5
