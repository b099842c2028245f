import sys
import types
from importlib import metadata

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offramp.errors import ConfigError
from offramp.models.native.config import DecoderConfig
from offramp.training.config import TrainConfig
from offramp.training.loop import Progress, new_model, train
from offramp.training.tracking import RunLog, check_tracker
from offramp.training.validation import Validation

CONFIG = TrainConfig(seq_len=8, batch_size=4)


def scalars(folder):
    """{tag: {step: value}} as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        entries = events.Scalars(tag)
        found[tag] = {event.step: event.value for event in entries}
        assert len(found[tag]) == len(entries), "a step stands twice"
    return found


def progress(step, *, total_steps=25, shift=0.0):
    losses = {2: torch.tensor(step + 1.0)} | ({1: torch.tensor(0.5)} if step % 2 else {})
    return Progress(
        step=step,
        total_steps=total_steps,
        epoch=1,
        loss=torch.tensor(step + shift),
        losses=losses,
        lr=step / 100,
    )


def log_steps(folder, steps, *, shift=0.0, validate_at=()):
    log = RunLog("tensorboard", folder, CONFIG)
    for step in steps:
        log.on_step(progress(step, shift=shift))
        if step in validate_at:
            ppl = {1: 3.0, 2: 2.0 + shift}
            log.on_validation(Validation(step=step, epoch=1, score=1.5, exit_ppl=ppl, is_best=True))
    log.close()


def test_entries_are_means_over_ten_steps(tmp_path):
    log_steps(tmp_path, range(1, 26), validate_at=(12,))
    found = scalars(tmp_path)
    assert found["train/loss"] == {10: 5.5, 20: 15.5, 25: 23.0}
    assert found["train/cross_entropy_2"] == {10: 6.5, 20: 16.5, 25: 24.0}
    assert found["train/cross_entropy_1"] == {10: 0.5, 20: 0.5, 25: 0.5}  # where it had a weight
    assert found["train/learning_rate"] == pytest.approx({10: 0.1, 20: 0.2, 25: 0.25})
    assert found["validation/score"] == {12: 1.5}
    assert found["validation/ppl_1"] == {12: 3.0}
    assert found["validation/ppl_2"] == {12: 2.0}


def test_tokens_per_second_leave_validations_out(tmp_path, monkeypatch):
    now = iter([100.0, 100.5, 101.0, 900.0, 900.5])  # 797.5 s of validation, a step of 0.5 s
    monkeypatch.setattr("offramp.training.tracking.time.perf_counter", lambda: next(now))
    log_steps(tmp_path, range(21, 26), validate_at=(23,))
    assert scalars(tmp_path)["train/tokens_per_second"] == {25: 4 * 8 / 0.5}


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path):
    log_steps(tmp_path, range(1, 18), validate_at=(8, 16))  # killed after the checkpoint of 14
    log_steps(tmp_path, range(15, 26), shift=0.25, validate_at=(16, 24))
    found = scalars(tmp_path)
    assert found["train/loss"] == {10: 5.5, 20: 17.75, 25: 23.25}
    assert found["validation/ppl_2"] == {8: 2.0, 16: 2.25, 24: 2.25}


def test_a_run_that_stops_writes_what_is_left(tmp_path):
    log_steps(tmp_path, range(1, 14))
    assert scalars(tmp_path)["train/loss"] == {10: 5.5, 13: 12.0}


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog("none", tmp_path / "logs", CONFIG)
    log.on_step(progress(25))
    log.close()
    model = new_model(DecoderConfig(vocab_size=5, hidden_size=8, num_hidden_layers=2), seed=0)
    ids = torch.arange(100) % 5
    train(model, ids, ids, TrainConfig(seq_len=8, batch_size=4, steps=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "install"), [("wandb", r"pip install 'offramp\[wandb\]'"), ("tensorboard", "tensorb")]
)
def test_a_tracker_that_is_missing_is_a_config_error(monkeypatch, name, install):
    def missing(asked):
        assert asked == name
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    check_tracker("none")
    with pytest.raises(ConfigError, match=f"tracker: expected {name} .* {install}"):
        check_tracker(name)


def test_wandb_gets_the_same_run_again(tmp_path, monkeypatch):
    begun, logged = [], []

    def init(**arguments):
        begun.append(arguments)
        log = lambda values, step: logged.append((step, values))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: logged.append("finished"))

    monkeypatch.setattr(metadata, "version", lambda name: "1")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (10, 20):
        log = RunLog("wandb", tmp_path / "logs", CONFIG)
        log.on_step(progress(step))
        log.close()
    assert [entry if entry == "finished" else entry[0] for entry in logged] == [
        10,
        "finished",
        20,
        "finished",
    ]
    assert logged[0][1]["train/loss"] == 10.0
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"]["batch_size"] == 4
