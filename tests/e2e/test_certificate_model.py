"""A certificate is refused for another model, and warns of another precision.

The changes are in the folder of the backbone, whose exits stay as they are.
"""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from offramp import load


@pytest.fixture(scope="module")
def certified(offramp, checkpoint, tmp_path_factory):
    """A folder with a backbone, its exits and a certificate."""
    folder = tmp_path_factory.mktemp("certified")
    shutil.copytree(checkpoint, folder / "base")
    text = checkpoint / "text.txt"
    for command in (
        ("tune", folder / "base", "--corpus", text, "--exits", "1,2", "--seq-len", 32),
        ("calibrate", "MODEL", "--corpus", text, "--epsilon", 0.9, "--delta", 0.4),
    ):
        words = [folder / "tuned" if word == "MODEL" else word for word in command]
        out = folder / ("tuned" if command[0] == "tune" else "certificate.json")
        extra = ("--epochs", 1) if command[0] == "tune" else ()
        result = offramp(*words, *extra, "--out", out)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def copy(certified, tmp_path):
    """The three together in another place, so that a test may change them."""
    return shutil.copytree(certified, tmp_path / "copy")


def generate(offramp, folder, *more):
    certificate = folder / "certificate.json"
    return offramp(
        *("generate", folder / "tuned", "7 quick", "--max-new-tokens", 4),
        *("--certificate", certificate, *more),
    )


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def permute(path):
    """Exchange the ids of two characters."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content))
    assert Tokenizer.from_file(str(path)).token_to_id("a") == vocabulary["a"]


def scale(path):
    state = load_file(path)
    state["exits.1.norm.weight"] *= 2
    save_file(state, path)
    about = path.with_name("offramp.json")
    edit(about, exits_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


CHANGES = {
    "the epsilon of the norms": lambda folder: edit(folder / "base/config.json", rms_norm_eps=1e-3),
    "the base of the rotary positions": lambda folder: edit(
        folder / "base/config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "a permuted tokenizer": lambda folder: permute(folder / "base/tokenizer.json"),
    "other exits": lambda folder: scale(folder / "tuned/exits.safetensors"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_certificate_is_refused_after_a_change(offramp, copy, change):
    assert generate(offramp, copy).returncode == 0
    CHANGES[change](copy)
    result = generate(offramp, copy)
    assert result.returncode == 2
    assert "certificate: expected one for this model" in result.stderr


def test_a_certificate_holds_for_the_same_weights_in_shards_and_another_generation_config(
    offramp, copy
):
    base = copy / "base"
    edit(base / "generation_config.json", temperature=0.5)
    about = json.loads((copy / "tuned" / "offramp.json").read_text())
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    where, names = {}, sorted(state)
    for number in (1, 2):
        part = {name: state[name] for name in names[number - 1 :: 2]}
        save_file(part, base / f"part-{number}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(part, f"part-{number}.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    data = b"".join((base / f"part-{number}.safetensors").read_bytes() for number in (1, 2))
    about["base"]["sha256"] = hashlib.sha256(data).hexdigest()
    (copy / "tuned" / "offramp.json").write_text(json.dumps(about))
    result = generate(offramp, copy)
    assert result.returncode == 0, result.stderr

    part = load_file(base / "part-1.safetensors")
    part = {name: value + 0.1 for name, value in part.items()}  # a shard of another model
    save_file(part, base / "part-1.safetensors", {"format": "pt"})
    result = generate(offramp, copy)
    assert result.returncode == 2
    assert "its exits were trained on" in result.stderr


def test_weights_that_an_index_names_elsewhere_are_refused(offramp, copy):
    base = copy / "base"
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(copy / "model.safetensors")
    where = dict.fromkeys(state, "../model.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    result = generate(offramp, copy)
    assert result.returncode == 2
    assert "safetensors files in the same folder" in result.stderr


def test_a_certificate_warns_of_another_precision(offramp, copy, tmp_path):
    warning = "its thresholds were found in float32, but the model runs in bfloat16"
    assert json.loads((copy / "certificate.json").read_text())["dtype"] == "float32"
    assert warning not in generate(offramp, copy).stderr
    result = generate(offramp, copy, "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(warning) == 1
    text = copy / "base" / "text.txt"
    result = offramp(
        *("sweep", copy / "tuned", "--corpus", text, "--dtype", "bfloat16"),
        *("--certificate", copy / "certificate.json"),
    )
    assert warning in result.stderr
    lm = load(copy / "tuned", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=warning):
        lm.generate("7 quick", certificate=copy / "certificate.json")


def test_a_bfloat16_model_runs_in_the_precision_of_its_certificate(offramp, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "half")
    state = load_file(folder / "model.safetensors")
    halves = {name: value.bfloat16() for name, value in state.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", dtype="bfloat16")
    certificate = tmp_path / "certificate.json"
    result = offramp(
        *("calibrate", folder, "--corpus", checkpoint / "text.txt", "--epsilon", 0.9),
        *("--delta", 0.4, "--out", certificate),
    )
    assert result.returncode == 0, result.stderr
    result = offramp(
        "generate", folder, "7 quick", "--max-new-tokens", 3, "--certificate", certificate
    )
    assert result.returncode == 0, result.stderr
    assert "runs in float32, in which its thresholds were found" in result.stderr


def test_check_detects_a_false_promise_whose_hash_was_made_anew(offramp, copy):
    """A certificate has no key: hashes detect accidents, and --check a false promise."""
    path = copy / "certificate.json"
    content = json.loads(path.read_text())
    content |= {"thresholds": [-1e9, -1e9], "epsilon": 0.02}
    rest = {name: value for name, value in content.items() if name != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content))
    assert generate(offramp, copy).returncode == 0
    text = copy / "new.txt"
    text.write_text((copy / "base" / "text.txt").read_text()[1:])
    result = offramp("calibrate", copy / "tuned", "--corpus", text, "--check", path)
    assert result.returncode == 0, result.stderr
    assert "broken" in result.stdout


@pytest.mark.parametrize("confidence", ["max_prob", "margin"])
def test_a_certificate_has_its_own_confidence(offramp, copy, confidence):
    """The measure that is the default without a certificate is refused, too, not ignored."""
    result = generate(offramp, copy, "--confidence", confidence)
    assert result.returncode == 2
    assert "confidence: expected none with --certificate, which has its own" in result.stderr
