"""The log of an audit: what it records, says, stores and refuses."""

import json
import math

import pytest

from offramp.calibration.change import LEARNED
from offramp.commands.audit import AuditLog, open_log
from offramp.errors import CheckpointError, ConfigError
from offramp.generation.auditing import Comparison


def filled():
    log = AuditLog(share=0.5)
    log.record(False, None)
    log.record(True, None)
    for disagrees, gap in ((False, 0.0), (True, 0.25), (True, 7.0)):
        log.record(True, Comparison(exit_layer=2, disagrees=disagrees, nll_gap=gap))
    return log


def test_it_counts_tokens_and_bounds_two_risks():
    content = filled().content()
    counts = [content[name] for name in ("tokens", "tokens_left", "audited")]
    assert counts == [5, 4, 3]
    assert content["disagreement"]["estimate"] == pytest.approx(2 / 3)
    assert content["nll-gap"]["estimate"] == pytest.approx(1.25 / 3)  # 7 nats count as 1
    for risk in ("disagreement", "nll-gap"):
        of = content[risk]
        assert 0 <= of["lower_left"] <= of["estimate"] <= of["upper_left"] <= 1
    assert "3 of the 4 tokens that exited" in filled().sentence()
    assert "nothing is known" in AuditLog(share=0.5).sentence()


def test_a_stored_log_goes_on_as_if_it_had_not_stopped(tmp_path):
    log, path = filled(), tmp_path / "log.json"
    path.write_text(json.dumps(log.state()))
    other = open_log(0.5, path)
    assert other.content() == log.content()
    for each in (log, other):
        each.record(True, Comparison(exit_layer=2, disagrees=True, nll_gap=0.5))
    assert other.content() == log.content()
    assert open_log(0.5, tmp_path / "none.json").content()["tokens"] == 0
    with pytest.raises(ConfigError, match=r"audit: expected 0\.5, the share of"):
        open_log(0.02, path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"format": True},
        {"share": 0.02},
        {"keep_promise": 0.1},
        {"keep_promise": 2},
        {"promise_risk": "nll-gap"},
        {"keeper": {"epsilon": 0.1, "steps": 6}},
        {"watch": None},
        {"watch": {"alarms": 1}},
        {"watch": {"first": {"share": 0.5}}},
        {"promise": 0.1},
        {"audits": {}},
        {"audits": []},
        {"audits": {"disagreement": {}, "nll-gap": {}}},
        {"audits": {"disagreement": None, "nll-gap": 3}},
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, change):
    path = tmp_path / "log.json"
    path.write_text(json.dumps({**filled().state(), **change}))
    with pytest.raises(CheckpointError, match=r"log\.json: "):
        open_log(0.5, path)
    for wrong in ("[]", "3", "null", '{"format": 1}'):
        path.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"log\.json: "):
            open_log(0.5, path)


def test_counts_and_wealth_that_contradict_each_other_are_refused(tmp_path):
    state = filled().state()
    state["audits"]["disagreement"]["audited"] = 9
    path = tmp_path / "log.json"
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="expected 0 <= audited"):
        open_log(0.5, path)


def test_coins_of_a_log_that_goes_on_are_new():
    log = filled()
    first = [AuditLog(share=0.5).auditor(seed=1)._coins.random() for _ in range(2)]
    assert first[0] == first[1]
    assert log.auditor(seed=1)._coins.random() != first[0]


def test_a_log_of_the_format_before_promises_goes_on(tmp_path):
    path, state = tmp_path / "log.json", filled().state()
    path.write_text(
        json.dumps({name: state[name] for name in ("share", "delta", "audits")} | {"format": 1})
    )
    log = open_log(0.5, path)
    assert log.content()["disagreement"] == filled().content()["disagreement"]
    assert (log.content()["promise"], log.content()["alarms"]) == (None, 0)
    assert log.state()["format"] == 2


def lose(log, count, *, every=1):
    """Record audited tokens, of which one in ``every`` disagrees; 0: none does."""
    for n in range(count):
        wrong = bool(every) and n % every == 0
        log.record(True, Comparison(exit_layer=2, disagrees=wrong, nll_gap=float(wrong)))


def test_an_alarm_when_the_risk_rises_or_falls_and_none_while_it_stays():
    log = AuditLog(share=1.0)
    lose(log, 3 * LEARNED, every=10)
    assert log.content()["alarms"] == 0
    assert "left the range" not in log.sentence()
    lose(log, LEARNED, every=2)
    first = log.content()
    assert first["alarms"] == 1
    assert 3 * LEARNED < first["last_alarm"] <= 4 * LEARNED
    assert (
        f"left the range that it had before once, last at token {first['last_alarm']:,}."
        in log.sentence()
    )
    lose(log, 3 * LEARNED, every=2)  # the new range
    assert log.content()["alarms"] == 1
    again = AuditLog.load(json.loads(json.dumps(log.state())))
    for each in (log, again):
        lose(each, 2 * LEARNED, every=0)
        assert each.content()["alarms"] == 2
    assert again.state() == log.state()


def test_the_range_is_fixed_before_the_tokens_that_it_judges():
    log = AuditLog(share=1.0)
    lose(log, LEARNED, every=10)
    fixed = (log.watch.detector.low, log.watch.detector.high)
    assert 0 < fixed[0] < 0.1 < fixed[1] < 0.25
    lose(log, 20, every=2)
    assert (log.watch.detector.low, log.watch.detector.high) == fixed


def test_thresholds_that_a_promise_moves_have_a_range_of_their_own():
    log = AuditLog(share=1.0, keep_promise=0.5)
    rung = log.auditor().rung
    for _ in range(30):
        rung(0)
        lose(log, 1, every=0)
    assert log.watch.first.audited < 20  # since the last move
    for _ in range(30):
        rung(0)
        lose(log, 1, every=0)
    assert log.rung == 6
    assert log.watch.first.audited > 30  # nothing moves any more


def test_a_promise_says_what_it_is_and_goes_on_in_its_log(tmp_path):
    log, path = AuditLog(share=0.02, keep_promise=0.05), tmp_path / "log.json"
    said = log.promise_note()
    assert "at most 5% of all new tokens" in said
    assert "at least about 3,9" in said
    log.auditor().rung(0)
    log.record(False, None)
    path.write_text(json.dumps(log.state()))
    other = open_log(0.02, path, keep_promise=0.05)
    assert other == log
    assert other.content()["promise"] == {
        "risk": "disagreement",
        "epsilon": 0.05,
        "rung": 0,
        "rungs": 6,
    }
    assert "disagreement of at most 0.05: the bound is 0" in other.sentence()
    gap = AuditLog(share=1.0, keep_promise=0.05, promise_risk="nll-gap")
    assert "0.05 nats per new token" in gap.promise_note()
    lose(gap, 99, every=0)
    assert "needs" not in gap.promise_note()
    assert gap.promised is gap.audits["nll-gap"]


@pytest.mark.parametrize(
    "given", [{}, {"keep_promise": 0.1}, {"keep_promise": 0.05, "promise_risk": "nll-gap"}]
)
def test_a_log_with_another_promise_is_refused(tmp_path, given):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(AuditLog(share=0.02, keep_promise=0.05).state()))
    with pytest.raises(
        ConfigError, match=r"(keep_promise|promise_risk): expected .*, as in .*log\.json, got"
    ):
        open_log(0.02, path, **given)
    path.write_text(json.dumps(AuditLog(share=0.02).state()))
    with pytest.raises(ConfigError, match=r"keep_promise: expected None, as in"):
        open_log(0.02, path, keep_promise=0.1)


@pytest.mark.parametrize("epsilon", [0, 1, -0.1, math.nan, math.inf, "0.1", True, [], 10**400])
def test_a_promise_that_is_none_is_refused(epsilon):
    with pytest.raises(ConfigError, match="keep_promise: expected a number between 0 and 1, got"):
        AuditLog(share=0.5, keep_promise=epsilon)


def test_a_risk_that_is_none_and_one_without_a_promise_are_refused():
    with pytest.raises(ConfigError, match="promise_risk: expected disagreement or nll-gap, got"):
        AuditLog(share=0.5, keep_promise=0.1, promise_risk="rouge-l")
    with pytest.raises(ConfigError, match="promise_risk: expected keep_promise with it"):
        AuditLog(share=0.5, promise_risk="nll-gap")
    with pytest.raises(ConfigError, match="audit: expected a share above 0"):
        AuditLog(share="much", keep_promise=0.1)
