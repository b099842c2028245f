"""The log of an audit: what it records, says, stores and refuses."""

import json

import pytest

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
        {"format": 2},
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
