"""Checkpoints: a run that is stopped, killed or damaged ends where it would have ended."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offramp.errors import CheckpointError, TrainingError
from offramp.models.native.config import DecoderConfig
from offramp.training import loop
from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig
from offramp.training.loop import new_model, train

CONFIG = DecoderConfig(
    vocab_size=11, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, exit_layers=(1,)
)
TEXT = torch.arange(400) * 7 % 11
TRAINING = {
    "seq_len": 8,
    "batch_size": 8,
    "steps": 14,
    "eval_every": 4,
    "checkpoint_every": 3,
    "layer_dropout": 0.5,
    "loss_weights": "layerskip:0.3",
    "curriculum": "rotational:2",
}


class Killed(BaseException):
    pass


def run(folder, *, kill_at=None, **fields):
    """Train from a new model, from the newest checkpoint there is; die after a step."""
    model = new_model(CONFIG, seed=5)
    damaged = []

    def on_step(progress):
        if progress.step == kill_at:
            raise Killed

    config = TrainConfig(**{**TRAINING, **fields})
    result = train(
        model,
        TEXT,
        TEXT[:90],
        config,
        on_step=on_step,
        on_damaged=damaged.append,
        checkpoints=Checkpoints(folder=folder, keep=config.keep_checkpoints),
    )
    return model.state_dict(), result, damaged


@pytest.fixture
def whole(tmp_path):
    return run(tmp_path / "whole")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kill_at", [1, 3, 4, 8, 13, 14])
def test_a_killed_run_resumes_to_the_same_parameters_bit_for_bit(tmp_path, whole, kill_at):
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        run(folder, kill_at=kill_at)
    state, result, damaged = run(folder)
    assert same(state, whole[0])
    assert result.validations == whole[1].validations
    assert damaged == []


def test_a_finished_run_has_nothing_left_to_do(tmp_path, whole):
    state, result, _ = run(tmp_path / "whole", kill_at=14)
    assert same(state, whole[0])
    assert (result.step, result.finished) == (14, True)


def test_the_last_few_checkpoints_are_kept(tmp_path):
    run(tmp_path, keep_checkpoints=3)
    assert [path.name for path in Checkpoints(folder=tmp_path).paths()] == [
        "step-00000009",
        "step-00000012",
        "step-00000014",
    ]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole, name, damage):
    folder = tmp_path / "damaged"
    with pytest.raises(Killed):
        run(folder, kill_at=8)
    newest = Checkpoints(folder=folder).paths()[-1]
    damage(newest / name)
    state, _, damaged = run(folder)
    assert same(state, whole[0])
    assert len(damaged) == 1
    assert damaged[0].startswith("step-00000006 is damaged")


def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    from offramp.training import checkpoint

    real, calls = checkpoint.save_file, []

    def full_disk(tensors, path):
        calls.append(path)
        if len(calls) > 4:  # two files a checkpoint: the third checkpoint fails
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left.*last good one is step-00000006"):
        run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]


def test_a_loss_that_is_not_finite_names_step_layer_and_windows(tmp_path, monkeypatch, whole):
    folder = tmp_path / "nan"
    real = loop.TrainingRun._backward

    def sometimes(self, step, indices):
        loss, losses = real(self, step, indices)
        return (loss * torch.nan, {3: losses[3] * torch.nan}) if step == 8 else (loss, losses)

    monkeypatch.setattr(loop.TrainingRun, "_backward", sometimes)
    with pytest.raises(TrainingError, match=r"step 8: .*layer 3; windows \d+ to \d+"):
        run(folder)
    monkeypatch.undo()
    assert Checkpoints(folder=folder).paths()[-1].name == "step-00000007"
    assert same(run(folder)[0], whole[0])


def test_accumulated_and_recomputed_steps_are_the_same_step(tmp_path, whole):
    for name, fields in (
        ("accumulate", {"accumulate": 4}),
        ("recompute", {"recompute_activations": True}),
    ):
        state, _, _ = run(tmp_path / name, **fields)
        for key, value in whole[0].items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4)
        shutil.rmtree(tmp_path / name)


def test_a_checkpoint_of_another_model_is_refused_with_both_hashes(tmp_path):
    run(tmp_path / "run", steps=4)
    wider = new_model(replace(CONFIG, hidden_size=32), seed=5)
    checkpoints = Checkpoints(folder=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"of this model.* [0-9a-f]{64}.* [0-9a-f]{64}"):
        train(wider, TEXT, TEXT[:90], TrainConfig(**TRAINING), checkpoints=checkpoints)
    assert len(checkpoints.paths()) == 2
