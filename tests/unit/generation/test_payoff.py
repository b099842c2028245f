"""Whether a round has drafts, and how many, follows from what they gain and how long they take."""

from dataclasses import replace

import pytest

from offramp.exits.gate import FittedExits
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.generation.payoff import Experience, Payoff, experience_of
from offramp.generation.speculative import SpeculativeDecoder
from offramp.models.work import Work

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


def test_texts_share_what_is_known_of_the_time_and_not_what_lookup_gained():
    experience = Experience()
    first = Payoff(experience)
    assert not first.pays("lookup")
    for _ in range(2):
        first.note("none", drafts=0, tokens=1, seconds=PLAIN)
    for _ in range(20):
        first.note("lookup", drafts=5, tokens=1, seconds=1.75 * PLAIN)
    assert not first.pays("lookup")
    second = Payoff(experience)
    assert second.pays("lookup")
    assert first.drafts("lookup", 5) < second.drafts("lookup", 5) < 5


def test_an_exit_that_does_not_pay_is_not_tried_again_at_once_by_the_next_text():
    experience = Experience()
    first = Payoff(experience, drafts=(2, 0.5))
    for _ in range(2):
        first.note("none", drafts=0, tokens=1, seconds=PLAIN)
    while first.pays("exit"):
        first.note("exit", drafts=1, tokens=1, seconds=1.5 * PLAIN)
    second = Payoff(experience, drafts=(2, 0.5))
    assert not second.pays("exit")
    assert second.pays("lookup")
    rounds = 0
    while not second.pays("exit"):
        second.note("none", drafts=0, tokens=1, seconds=PLAIN)
        rounds += 1
    assert 40 < rounds < 60
    assert Payoff(experience, drafts=(3, 0.5)).pays("exit"), "other options were not tried"


def test_a_slow_first_round_of_an_exit_does_not_pause_it():
    made = Payoff()
    for _ in range(2):
        made.note("none", drafts=0, tokens=1, seconds=PLAIN)
    made.note("exit", drafts=1, tokens=2, seconds=50 * PLAIN)
    for _ in range(20):
        assert made.pays("exit")
        made.note("exit", drafts=1, tokens=2, seconds=1.3 * PLAIN)


def test_texts_that_draft_in_any_case_teach_nothing(make_model):
    model = make_model(num_hidden_layers=3, exit_layers=(1,))
    config = GenerateConfig(speculative=True, adaptive=False, lookup=0, draft_threshold=-1.0)
    list(generate(model, [1, 2, 3], replace(config, max_new_tokens=30)))
    assert experience_of(model).plain_rounds == 0
    assert not experience_of(model).of_rounds


def test_what_is_remembered_of_drafts_is_bounded():
    experience = Experience()
    for threshold in range(1000):
        Payoff(experience, drafts=threshold)
    assert len(experience._exit_books) <= 20
    kept = experience.exit_book(999)
    for threshold in range(10):
        Payoff(experience, drafts=threshold)
    assert experience.exit_book(999) is kept


def test_all_texts_of_a_model_share_what_is_known_of_the_time(make_model):
    model, other = (make_model(num_hidden_layers=3, exit_layers=(1,)) for _ in range(2))
    config = GenerateConfig(speculative=True, max_new_tokens=8)
    for _ in range(2):
        before = experience_of(model).plain_rounds
        list(generate(model, [1, 2, 3], config))
    assert before >= 2  # known before the second text
    assert experience_of(other).plain_rounds == 0


def test_a_slow_first_round_is_forgotten():
    made = payoff("lookup", [], cost=0.0)
    made.note("lookup", drafts=5, tokens=6, seconds=100 * PLAIN)
    assert made.drafts("lookup", 5) == 1
    for _ in range(20):
        made.note("lookup", drafts=1, tokens=2, seconds=PLAIN * 1.02)
    assert made.drafts("lookup", 5) == 5


def rounds(payoff, accepted, count, *, plain=1.0, seconds=1.3, kind="exit"):
    """Play rounds of one draft each; returns how many of them drafted."""
    drafted = 0
    for round_ in range(count):
        if payoff.pays(kind):
            drafted += 1
            payoff.note(kind, drafts=1, tokens=1 + accepted(round_), seconds=seconds)
        else:
            payoff.note("none", drafts=0, tokens=1, seconds=plain)
    return drafted


def test_drafting_that_pays_goes_on():
    payoff = Payoff()
    assert rounds(payoff, lambda n: n % 2 == 0, 200) == 198


def test_drafting_that_does_not_pay_stops_and_tries_again_less_and_less():
    payoff = Payoff()
    assert rounds(payoff, lambda n: False, 1000) < 40
    lost = 0.3 * rounds(payoff, lambda n: False, 2000)
    assert 0 < lost < 20  # one percent


def test_drafting_comes_back_when_the_text_changes():
    payoff = Payoff()
    rounds(payoff, lambda n: False, 300)
    assert rounds(payoff, lambda n: True, 2000) > 1000


def test_one_slow_round_does_not_stop_drafting():
    payoff = Payoff()
    rounds(payoff, lambda n: n % 2 == 0, 50)
    rounds(payoff, lambda n: n % 2 == 0, 1, seconds=30.0)
    assert rounds(payoff, lambda n: n % 2 == 0, 100) == 100


def test_one_kind_of_draft_that_does_not_pay_leaves_the_other_alone():
    payoff = Payoff()
    rounds(payoff, lambda n: False, 100, kind="lookup")
    assert not payoff.pays("lookup")
    assert payoff.pays("exit")
    assert rounds(payoff, lambda n: True, 50) == 50


@pytest.mark.parametrize(
    ("options", "shared"),
    [({"seed": 4}, True), ({"temperature": 2.0}, False), ({"draft_threshold": 0.9}, False)],
)
def test_texts_with_other_options_of_drafts_do_not_pause_each_other(make_model, options, shared):
    model = make_model(num_hidden_layers=3, exit_layers=(1,))
    books = []
    for more in ({}, options):
        decoder = SpeculativeDecoder(
            model,
            model.make_cache(1, 16),
            config=GenerateConfig(speculative=True, **more),
            draft_exit=1,
            fitted=FittedExits(),
            work=Work(),
        )
        books.append(decoder.payoff._books["exit"])
    assert (books[0] is books[1]) == shared
