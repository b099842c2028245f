"""A field or a tensor of a model's files that does not fit ends in one sentence and exit code 2.

The fuzzers in tests/faults change files at random.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from offramp.files import file_sha256


@pytest.fixture(scope="module")
def tuned(offramp, checkpoint, tmp_path_factory):
    """Exits, gates, temperatures and a draft vocabulary for the checkpoint."""
    out = tmp_path_factory.mktemp("hostile") / "tuned"
    text = checkpoint / "text.txt"
    result = offramp(
        *("tune", checkpoint, "--corpus", text, "--exits", "1,2", "--exit-head", "norm"),
        *("--seq-len", 32, "--epochs", 1, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    result = offramp("confidence", out, "--corpus", text, "--fit", text)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def folders(trained, checkpoint, tuned):
    return {"native": trained, "checkpoint": checkpoint, "tuned": tuned}


EDITS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("checkpoint", "generation_config.json", {"eos_token_id": v}) for v in ("", ["a"], [True])),
    ("native", "config.json", {"corpus": {"sha256": [1]}}),
    ("native", "config.json", {"specialised": {"corpus_sha256": {}}}),
    ("native", "config.json", {"training": {"seq_len": math.nan}}),
    ("tuned", "offramp.json", {"trained": {"corpus": {"sha256": [1]}}}),
    ("tuned", "offramp.json", {"trained": {"specialised": {"corpus_sha256": 7}}}),
    ("tuned", "offramp.json", {"exit_layers": ["a"]}),
    ("tuned", "offramp.json", {"exit_layers": [True]}),
    ("tuned", "offramp.json", {"exit_layers": [10**30]}),
    ("tuned", "offramp.json", {"base": {"id": 5}}),
    ("tuned", "offramp.json", {"dtype": "int8"}),
)


@pytest.mark.parametrize(("kind", "name", "edit"), EDITS)
def test_a_field_of_a_wrong_kind_is_refused(offramp, folders, tmp_path, kind, name, edit):
    model = tmp_path / "model"
    shutil.copytree(folders[kind], model)
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | edit))
    refused(offramp("sweep", model, "--corpus", folders["checkpoint"] / "text.txt"), "expected")


def refused(result: Any, expected: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("offramp: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": {"lm_head.weight": 5}},
        {"weight_map": {"lm_head.weight": ".."}},
        {"weight_map": {"lm_head.weight": "../model.safetensors"}},
        {"weight_map": {"lm_head.weight": "/model.safetensors"}},
        {"weight_map": {"lm_head.weight": "config.json"}},
        {"weight_map": {"lm_head.weight": "none.safetensors"}},
    ],
)
def test_an_index_of_weights_names_files_beside_it(offramp, checkpoint, tmp_path, index):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    shutil.copy(model / "model.safetensors", tmp_path)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(offramp("sweep", model, "--corpus", checkpoint / "text.txt"), "expected")


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "temperature.1": lambda old: torch.ones(2),
    "temperature.2": lambda old: torch.tensor(0.0),
    "temperature.x": lambda old: torch.tensor(1.0),
    "temperature.1 ": lambda old: torch.tensor(math.nan),
    "gate.1.up_proj.weight": lambda old: old[:, :5].clone(),
    "gate.1.norm.weight": lambda old: old[:5].clone(),
    "gate.1.out_proj.bias": lambda old: torch.ones(()),
    "gain.1.up_proj.weight": lambda old: old[0].clone(),
    "gain.2.up_proj.weight": lambda old: old.to(torch.complex64),
    "draft_vocab": lambda old: torch.tensor([1, 10**9]),
    "draft_vocab ": lambda old: torch.tensor([-1]),
    "draft_vocab  ": lambda old: torch.tensor([[1]]),
    "draft_vocab   ": lambda old: torch.tensor([1.5]),
    "draft_vocab    ": lambda old: torch.tensor([], dtype=torch.int64),
    "exits.1.norm.weight": lambda old: old[:5].clone(),
}


def change(model: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write a model's exits or what was fitted to them anew, as a whole file."""
    path, about = model / name, model / "offramp.json"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    if name == "exits.safetensors":
        content = json.loads(about.read_text())
        about.write_text(json.dumps(content | {"exits_sha256": file_sha256(path)}))


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_exits_that_do_not_fit(offramp, tuned, checkpoint, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(tuned, model)
    file = "exits.safetensors" if name.startswith("exits.") else "fitted.safetensors"
    stored, key = load_file(model / file), name.strip()
    change(model, file, stored | {key: TENSORS[name](stored.get(key, torch.ones(())))})
    refused(offramp("sweep", model, "--corpus", checkpoint / "text.txt"), f"{file}: ")


def test_gates_of_other_sizes_are_refused(offramp, tuned, checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tuned, model)
    stored = load_file(model / "fitted.safetensors")
    for kind, part in (("gate", "norm"), ("gain", "out_proj")):
        changed = dict(stored)
        if part == "norm":  # a gate for narrower states
            for name in (f"{kind}.1.norm.weight", f"{kind}.1.up_proj.weight"):
                changed[name] = stored[name][..., :5].clone()
        else:  # one output more than there are exits
            for name in (f"{kind}.1.out_proj.weight", f"{kind}.1.out_proj.bias"):
                changed[name] = torch.cat([stored[name], stored[name][:1]])
        change(model, "fitted.safetensors", changed)
        refused(offramp("sweep", model, "--corpus", checkpoint / "text.txt"), f"expected a {kind}")
