"""Two processes (gloo) train what one trains: DDP and FSDP2, all cases in one start of them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offramp.errors import ConfigError
from offramp.training.config import TrainConfig
from offramp.training.distributed import Processes, check_processes, join, local_device

WORKER = Path(__file__).with_name("worker.py")
spec = importlib.util.spec_from_file_location("worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
FULL = {**SHAPE, "exit_layers": [1, 2], "exit_head": "full"}
TIED = {**SHAPE, "exit_layers": [1, 2], "tie_word_embeddings": True}
BASE = {"seq_len": 8, "batch_size": 8, "steps": 50, "eval_every": 25, "lr": 3e-3}
SHORT = {**BASE, "steps": 8, "eval_every": 4}
LAYERSKIP = {"loss_weights": "layerskip:0.3", "layer_dropout": 0.5}
ROTATIONAL = {**LAYERSKIP, "curriculum": "rotational:2"}
LATE = {"alpha_end": 0.5, "alpha_schedule": "step", "alpha_steps": [5]}

CASES = {
    "asymmetric": {"model": TIED, "training": {**BASE, "loss_weights": "1=0.5,4=0.5"}},
    "rotational": {"model": FULL, "training": {**BASE, **ROTATIONAL}},
    "gradual": {"model": FULL, "training": {**BASE, **LAYERSKIP, "curriculum": "gradual"}},
    # each part of a batch has two rows, and nearly all of them skip the upper layers
    "idle": {
        "model": FULL,
        "training": {
            **SHORT,
            **ROTATIONAL,
            "layer_dropout": 0.9,
            "accumulate": 2,
            "recompute_activations": True,
        },
    },
    # blocks 3 and 4 share keys and values, also those of rows that skip block 3
    "shared": {
        "model": {**FULL, "kv_source_layer": 2},
        "training": {
            **SHORT,
            **ROTATIONAL,
            "layer_dropout": 0.8,
            "accumulate": 2,
            "recompute_activations": True,
        },
    },
    "below": {"model": FULL, "training": {**SHORT, "loss_weights": "1=0.5,2=0.5"}},
    "detached": {
        "model": FULL,
        "training": {**SHORT, "loss_weights": "1=0.5,4=0.5", "detach_exits": True},
    },
    # blocks 2 to 4 are validated, in inference mode, before they are trained
    "late": {"model": FULL, "training": {**SHORT, "loss_weights": "asymmetric:1.0", **LATE}},
    "bfloat16": {
        "model": FULL,
        "training": {**SHORT, **ROTATIONAL, "precision": "bfloat16", "accumulate": 2},
    },
}
WHOLE = {"model": FULL, "training": {**SHORT, **ROTATIONAL, "eval_every": 3}}
SHARDINGS = ("ddp", "fsdp")


def sharded(case, sharding):
    return {**case, "training": {**case["training"], "sharding": sharding}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def together(folder):
    """{(sharding, case): [what came of it in each process]}."""
    cases = {}
    for sharding in SHARDINGS:
        own = {
            **CASES,
            "stopped": {**WHOLE, "stop_after": 5, "checkpoints": str(folder / sharding)},
            "resumed": {**WHOLE, "checkpoints": str(folder / f"alone-{sharding}")},
            "nan": {**WHOLE, "nan_after": 4, "checkpoints": str(folder / f"nan-{sharding}")},
        }
        cases |= {f"{sharding} {name}": sharded(case, sharding) for name, case in own.items()}
        worker.run({**WHOLE, "stop_after": 5, "checkpoints": str(folder / f"alone-{sharding}")})
    worker.run({**WHOLE, "stop_after": 5, "checkpoints": str(folder / "apart" / "1")})
    apart = {"checkpoints": str(folder / "apart"), "folders_differ": True}
    cases["ddp apart"] = {**WHOLE, **apart}
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["--local-addr", "127.0.0.1", WORKER, folder / "cases.json", folder / "out.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((folder / "out.json").read_text())
    return {tuple(name.split(" ", 1)): outcome for name, outcome in outcomes.items()}


def gap(curve, expected):
    assert [step.keys() for step in curve] == [step.keys() for step in expected]
    return max(
        abs(step[key] - wanted[key])
        for step, wanted in zip(curve, expected, strict=True)
        for key in step
    )


def assert_same_parameters(found, expected, *, within):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=within, err_msg=name)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "bfloat16"])
def test_two_processes_train_what_one_trains(together, sharding, name):
    expected = worker.run(CASES[name])
    main, other = together[sharding, name]
    assert gap(main["curve"], expected["curve"]) < 1e-4
    np.testing.assert_allclose(main["validations"], expected["validations"], rtol=1e-4)
    assert_same_parameters(main["parameters"], expected["parameters"], within=1e-3)
    for key in ("curve", "validations", "finished", "error"):
        assert main[key] == other[key], key
    assert main["finished"]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_bfloat16_differs_by_its_rounding(together, sharding):
    training = {**CASES["bfloat16"]["training"], "accumulate": 4}  # the same parts in one process
    expected = worker.run({**CASES["bfloat16"], "training": training})
    main, _ = together[sharding, "bfloat16"]
    assert gap(main["curve"][:1], expected["curve"][:1]) < 1e-6
    assert gap(main["curve"], expected["curve"]) < 0.05
    exact = worker.run({**CASES["bfloat16"], "training": {**training, "precision": "float32"}})
    assert gap(main["curve"][:1], exact["curve"][:1]) > 1e-5


def test_only_fsdp_shards_every_parameter(together):
    count = len(together["fsdp", "rotational"][0]["parameters"])
    assert [part["sharded"] for part in together["fsdp", "rotational"]] == [count, count]
    assert [part["sharded"] for part in together["ddp", "rotational"]] == [0, 0]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_one_process_stops_all_and_one_alone_goes_on(together, folder, sharding):
    expected = worker.run(WHOLE)
    stopped = together[sharding, "stopped"]
    assert [(part["finished"], len(part["curve"])) for part in stopped] == [(False, 5)] * 2
    resumed = worker.run({**WHOLE, "checkpoints": str(folder / sharding)})
    assert len(resumed["curve"]) == 3
    assert gap(stopped[0]["curve"] + resumed["curve"], expected["curve"]) < 1e-4
    assert_same_parameters(resumed["parameters"], expected["parameters"], within=1e-3)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_go_on_with_what_one_began(together, sharding):
    expected = worker.run(WHOLE)
    main, other = together[sharding, "resumed"]
    assert len(main["curve"]) == 3
    assert gap(main["curve"], expected["curve"][5:]) < 1e-4
    assert main["curve"] == other["curve"]
    assert_same_parameters(main["parameters"], expected["parameters"], within=1e-3)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_nan_in_one_process_stops_all_with_the_same_sentence(together, folder, sharding):
    alone = worker.run({**WHOLE, "nan_after": 4})
    main, other = together[sharding, "nan"]
    assert main["error"] == other["error"] == alone["error"]
    assert main["error"].startswith("step 5: expected a finite loss")
    assert (folder / f"nan-{sharding}" / "step-00000004").is_dir()


# What a user can get wrong.


def test_processes_that_see_different_checkpoints_do_not_start(together):
    for part in together["ddp", "apart"]:
        assert "expected a folder that every process reads" in part["error"]
        assert part["curve"] == []


def test_a_batch_that_cannot_be_shared_is_a_config_error_with_all_numbers():
    config = TrainConfig(batch_size=32, accumulate=2)
    check_processes(config, Processes(size=16))
    with pytest.raises(ConfigError, match=r"6 \(accumulate 2 x 3 processes\), got 32"):
        check_processes(config, Processes(size=3))


def connected(monkeypatch, *, size, device):
    """Let accelerate have connected so many processes, this one on that device."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    state = SimpleNamespace(process_index=1, num_processes=size, device=torch.device(device))
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)


def test_a_model_on_the_cpu_goes_where_its_process_is(monkeypatch):
    assert join("cpu") == Processes(device=torch.device("cpu"))
    connected(monkeypatch, size=2, device="cuda:1")
    assert join("cpu") == Processes(rank=1, size=2, device=torch.device("cuda:1"))
    connected(monkeypatch, size=2, device="cpu:0")
    assert join("cpu").device == torch.device("cpu")


def test_processes_that_cannot_be_connected_do_not_train_side_by_side(monkeypatch):
    connected(monkeypatch, size=1, device="mps")
    with pytest.raises(ConfigError, match="expected cpu or cuda for 2 processes, got mps"):
        join("mps")


def test_each_of_several_processes_needs_a_gpu_of_its_own(monkeypatch):
    assert local_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert local_device("cuda") == "cuda:1"
    with pytest.raises(ConfigError, match="got cuda:0"):
        local_device("cuda:0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"each of the 2 processes .* got cuda and 1 GPUs"):
        local_device("cuda")
