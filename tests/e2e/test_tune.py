"""A Hugging Face checkpoint gets exits, is probed, and leaves as a shallower checkpoint."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM


def refused(result, *expected):
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr
    return True


@pytest.fixture(scope="module")
def tuned(offramp, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "exits"
    result = offramp(
        *("tune", checkpoint, "--corpus", checkpoint / "text.txt", "--exits", "1,2"),
        *("--seq-len", 32, "--epochs", 1, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    return out


def test_tune_writes_the_exits_alone(tuned):
    names = {"offramp.json", "exits.safetensors", "fitted.safetensors"}
    assert {path.name for path in tuned.iterdir()} == names
    about = json.loads((tuned / "offramp.json").read_text())
    assert about["exit_layers"] == [1, 2, 4]
    assert about["trained"]["objective"] == "distill"


def test_a_tuned_model_is_probed_and_exported(offramp, checkpoint, tuned, tmp_path):
    text = checkpoint / "text.txt"
    result = offramp("probe", tuned, "--corpus", text, "--tokens", 500, "--out", tmp_path / "p")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "p").read_text())
    assert [row["exit_layer"] for row in found["exits"]] == [1, 2, 4]
    plain = tmp_path / "with-exits"
    result = offramp(
        *("tune", checkpoint, "--corpus", text, "--exits", "2", "--exit-head", "norm"),
        *("--seq-len", 32, "--epochs", 1, "--out", plain),
    )
    assert result.returncode == 0, result.stderr
    result = offramp("export", plain, "--exit", 2, "--out", tmp_path / "shallow")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "shallow" / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_checkpoint_comes_to_share_keys_and_values(offramp, checkpoint, tmp_path):
    text, out = checkpoint / "text.txt", tmp_path / "shared"
    result = offramp(
        *("tune", checkpoint, "--kv-source", 2, "--corpus", text, "--exits", "1,3"),
        *("--seq-len", 32, "--epochs", 1, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    assert "The blocks above layer 2 now share keys and values" in result.stdout
    assert "after the least-squares fit and" in " ".join(result.stdout.split())
    assert "shared holds the model" in result.stderr
    assert json.loads((out / "config.json").read_text())["model"]["kv_source_layer"] == 2
    result = offramp("sweep", out, "--corpus", text, "--thresholds", "0.5")
    assert result.returncode == 0, result.stderr
    assert refused(
        offramp("tune", out, "--kv-source", 1, "--corpus", text, "--out", tmp_path / "again"),
        *("kv_source", "shares those after layer 2"),
    )
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--kv-source", "4"], ["kv_source", "from 1 to 3", "got 4"]),
        (["--kv-source", "0"], ["kv_source", "at least 1", "got 0"]),
        (["--kv-source", "2", "--dtype", "bfloat16"], ["float32", "bfloat16"]),
        (["--kv-source", "2", "--loss-weights", "1=1"], ["loss_weights", "--kv-source"]),
        (["--distill-epochs", "2"], ["distill_epochs", "--kv-source"]),
        (["--kv-source", "2", "--tokens", "40", "--seq-len", "32"], ["at least 65 tokens"]),
        (["--exits", "9"], ["1 to 4", "9"]),
        (["--exits", "1,x"], ["--exits"]),
        (["--exit-head", "shared"], ["norm, adapter, full or specialist", "shared"]),
        (["--tokens", "1"], ["tokens", "at least 2"]),
    ],
)
def test_tune_refuses(offramp, checkpoint, tmp_path, flags, expected):
    out = tmp_path / "out"
    text = checkpoint / "text.txt"
    assert refused(offramp("tune", checkpoint, "--corpus", text, "--out", out, *flags), *expected)
    assert not (out / "offramp.json").exists()


def copied(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    return folder


def edited(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def bert(folder):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=2048, num_hidden_layers=2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def foreign(folder):
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not weights</html>" * 9)
    return folder


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def without_config(folder):
    (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (bert, ["decoder-only", "bert"]),
        (lambda f: edited(f, model_type="vit"), ["decoder-only", "vit"]),
        (lambda f: edited(f, model_type="t5"), ["decoder-only", "t5"]),
        (lambda f: edited(f, model_type="nobody"), ["model_type", "nobody"]),
        (truncated, ["model.safetensors"]),
        (foreign, ["model.safetensors"]),
        (pickled, ["pytorch_model.bin", "pickle"]),
        (without_config, ["config.json", "found none"]),
        (lambda f: edited(f, vocab_size=5), ["weights do not fit"]),
    ],
    ids=["bert", "vit", "t5", "unknown", "truncated", "foreign", "pickle", "config", "shape"],
)
def test_a_checkpoint_that_is_none_is_refused(offramp, checkpoint, tmp_path, damage, expected):
    folder = damage(copied(checkpoint, tmp_path))
    text = checkpoint / "text.txt"
    assert refused(offramp("probe", folder, "--corpus", text), *expected)


def test_a_tokenizer_that_does_not_fit_is_refused(offramp, checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(5000)])
    tokenizer.save(str(folder / "tokenizer.json"))
    result = offramp("probe", folder, "--corpus", checkpoint / "text.txt")
    assert refused(result, "expected a tokenizer of at most")


def test_without_a_network_a_name_is_refused_with_what_is_here(offramp, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = offramp("probe", "nobody/no-such-model", "--corpus", checkpoint / "text.txt")
    assert refused(result, "nobody/no-such-model")
