"""A push uploads the model's own files and a card, and nothing of this machine."""

import json
import shutil
from pathlib import Path

import pytest
from hub_stand_in import push, refused, same

import offramp as library
from offramp.errors import CertificateError, CheckpointError


def test_nothing_but_the_models_own_files_is_uploaded(offramp, hub, trained, tmp_path):
    model = shutil.copytree(trained, tmp_path / "model")
    for name in (".env", "notes.txt", "secret.safetensors", "optimizer.json", ".git-credentials"):
        (model / name).write_text("secret")
    (model / "logs").mkdir(exist_ok=True)
    (model / "logs" / "events").write_text("secret")
    push(offramp, model, "me/clean")
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert set(hub.files("me/clean")) - {".gitattributes", "fitted.safetensors"} == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "README.md"])
def test_a_link_out_of_the_folder_is_refused(offramp, hub, trained, tmp_path, name):
    model = shutil.copytree(trained, tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    (tmp_path / "elsewhere").write_bytes(
        (trained / name).read_bytes() if name != "README.md" else b"x"
    )
    (model / name).symlink_to(tmp_path / "elsewhere")
    refused(offramp("push", model, "me/links"), name, "got a link to")
    assert hub.repositories == {}


def test_no_name_of_this_machine_is_uploaded(offramp, hub, checkpoint, frozen, unfrozen, tmp_path):
    hub.put("meta/base", checkpoint)
    corpus = tmp_path / "secret-project" / "text.txt"
    corpus.parent.mkdir()
    shutil.copy(checkpoint / "text.txt", corpus)
    tokenizer = tmp_path / "secret-project" / "tokenizer.json"
    shutil.copy(checkpoint / "tokenizer.json", tokenizer)
    native, swept = tmp_path / "native", tmp_path / "sweep.json"
    train = ("--layers", 2, "--dim", 16, "--heads", 2, "--exits", 1, "--steps", 2, "--seq-len", 16)
    made = offramp(
        *("train", "--corpus", corpus, "--tokenizer", tokenizer, *train, "--batch-size", 2),
        *("--tracker", "none", "--out", native),
    )
    assert made.returncode == 0, made.stderr
    assert offramp("sweep", native, "--corpus", corpus, "--out", swept).returncode == 0
    push(offramp, native, "me/native", "--sweep", swept)
    push(offramp, frozen, "me/frozen", "--base", "meta/base")
    push(offramp, unfrozen, "me/unfrozen")
    for name in ("me/native", "me/frozen", "me/unfrozen"):
        for file, data in hub.files(name).items():
            for secret in (
                "secret-project",
                "private-place",
                str(tmp_path),
                str(Path.home()) + "/",
            ):
                assert secret.encode() not in data, (name, file, secret)
    assert json.loads(hub.files("me/native")["config.json"])["corpus"]["name"] == "text.txt"
    assert "text.txt" in hub.files("me/native")["README.md"].decode()


def test_exits_of_a_backbone_on_this_machine_only_are_refused(offramp, hub, frozen):
    refused(
        offramp("push", frozen, "me/exits"), "whose backbone is on the hub", "--base OWNER/NAME"
    )
    assert hub.repositories == {}
    with pytest.raises(CheckpointError, match="whose backbone is on the hub"):
        library.load(frozen).push_to_hub("me/exits")


def test_a_backbone_with_other_weights_is_refused(
    offramp, hub, frozen, trained, checkpoint, tmp_path
):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[:-4] + b"\0\0\0\1")
    hub.put("meta/other", other)
    refused(offramp("push", frozen, "me/exits", "--base", "meta/other"), "its sha256 is now")
    refused(offramp("push", trained, "me/exits", "--base", "meta/other"), "base: expected none")


def test_a_plain_checkpoint_is_refused(offramp, hub, checkpoint):
    refused(offramp("push", checkpoint, "me/plain"), "got a checkpoint without exits")


def test_exits_from_the_hub_may_not_name_a_folder_of_this_machine(offramp, hub, frozen, checkpoint):
    hub.put("eve/exits", frozen)  # as it is, with the place of its backbone
    refused(offramp("generate", "eve/exits", "7"), "expected the name of a model on the hub")
    hub.put("meta/base", checkpoint)
    same(library.load("eve/exits", base="meta/base"), library.load(frozen))


def test_gates_cannot_be_fitted_into_the_cache_of_the_hub(offramp, hub, trained, text):
    push(offramp, trained, "me/model")
    fit = offramp("confidence", "me/model", "--corpus", "pangram", "--fit", "pangram")
    refused(fit, "expected the folder of a model, to keep its gates in")


def test_a_card_that_was_written_by_hand_stays(offramp, hub, trained, tmp_path):
    model = shutil.copytree(trained, tmp_path / "model")
    (model / "README.md").write_text("# Mine\n")
    push(offramp, model, "me/mine")
    assert hub.files("me/mine")["README.md"] == b"# Mine\n"
    refused(offramp("push", model, "me/mine", "--license", "mit"), "license: expected none")
    (model / "README.md").unlink()
    kept = push(offramp, model, "me/mine")  # the one on the hub
    assert "was written by hand and stays" in kept.stderr
    assert hub.files("me/mine")["README.md"] == b"# Mine\n"
    push(offramp, model, "me/mine", "--replace-card", "--license", "apache-2.0")
    card = hub.files("me/mine")["README.md"].decode()
    assert "license: apache-2.0" in card
    push(offramp, model, "me/mine", "--license", "mit")  # a generated one is written anew
    assert "license: mit" in hub.files("me/mine")["README.md"].decode()
    (model / "README.md").write_text(card + "\nAnd a line by hand.\n")
    push(offramp, model, "me/mine")
    assert hub.files("me/mine")["README.md"].decode().endswith("by hand.\n")


def test_an_earlier_model_leaves_nothing_that_would_be_read(
    offramp, hub, checkpoint, frozen, trained
):
    hub.put("meta/base", checkpoint)
    push(offramp, frozen, "me/model", "--base", "meta/base")
    repository = hub.repositories["me/model"]
    repository.commit("main", {**hub.files("me/model"), "mine.txt": b"kept"}, "a file")
    push(offramp, trained, "me/model")
    assert not {"offramp.json", "exits.safetensors"} & set(hub.files("me/model"))
    assert "mine.txt" in hub.files("me/model")
    same(library.load("me/model"), library.load(trained))


def test_a_certificate_and_a_frontier_are_in_the_card(offramp, hub, trained, tmp_path):
    certificate, swept = tmp_path / "certificate.json", tmp_path / "sweep.json"
    (text := tmp_path / "few.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    flags = ("--corpus", text, "--epsilon", 0.5, "--out")
    assert offramp("calibrate", trained, *flags, certificate).returncode == 0
    corpus = ("--corpus", text, "--out")
    assert offramp("sweep", trained, *corpus, swept, "--thresholds", "0.5,0.75").returncode == 0
    push(offramp, trained, "me/model", "--certificate", certificate, "--sweep", swept)
    card = hub.files("me/model")["README.md"].decode()
    for part in ("## Certificate", "With probability 0.95 or more", "## Frontier", "| 0.75 |"):
        assert part in card
    stored = tmp_path / "from-hub.json"
    stored.write_bytes(hub.files("me/model")["certificate.json"])
    used = offramp("generate", "me/model", "The", "--certificate", stored, "--max-new-tokens", 3)
    assert used.returncode == 0, used.stderr
    lm = library.load("me/model")
    lm.push_to_hub("me/again", certificate=stored, sweep=lm.sweep(text, [0.5]))
    assert "## Frontier" in hub.files("me/again")["README.md"].decode()


def test_figures_of_another_model_are_refused_before_anything_is_uploaded(
    offramp, hub, trained, unfrozen, text, tmp_path
):
    certificate, swept = tmp_path / "certificate.json", tmp_path / "sweep.json"
    assert offramp("calibrate", unfrozen, "--corpus", text, "--out", certificate).returncode == 0
    assert offramp("sweep", unfrozen, "--corpus", text, "--out", swept).returncode == 0
    refused(offramp("push", trained, "me/x", "--certificate", certificate), "certificate: expected")
    refused(offramp("push", trained, "me/x", "--sweep", swept), "sweep: expected the figures of")
    (tmp_path / "hostile.json").write_text('{"num_layers": "many", "rows": 7}')
    refused(offramp("push", trained, "me/x", "--sweep", tmp_path / "hostile.json"), "hostile.json")
    refused(offramp("push", trained, "me/x", "--sweep", tmp_path / "none.json"), "none.json")
    with pytest.raises(CertificateError):
        library.load(trained).push_to_hub("me/x", certificate=certificate)
    assert hub.repositories == {}
