"""offramp card, as it is typed."""

import shutil


def test_it_prints_a_card_or_writes_one_and_keeps_one_that_was_edited(offramp, trained, tmp_path):
    printed = offramp("card", trained, "--name", "me/model", "--license", "mit")
    assert printed.returncode == 0, printed.stderr
    for part in ("license: mit", "# model", 'lm = offramp.load("me/model")', "- text: pangram"):
        assert part in printed.stdout.replace("'", '"')
    assert str(trained) not in printed.stdout
    model = shutil.copytree(trained, tmp_path / "model")
    readme = model / "README.md"
    assert offramp("card", model, "--out", readme).returncode == 0
    assert offramp("card", model, "--out", readme).returncode == 0  # as offramp wrote it
    assert "OWNER/NAME" in readme.read_text()
    readme.write_text("# Mine\n")
    refused = offramp("card", model, "--out", readme)
    assert refused.returncode == 2
    assert "written or edited by hand; --replace-card replaces it" in refused.stderr
    assert readme.read_text() == "# Mine\n"
    assert offramp("card", model, "--out", readme, "--replace-card").returncode == 0
    assert "## Training" in readme.read_text()


def test_exits_whose_backbone_is_local_get_a_card_without_its_place(offramp, checkpoint, tmp_path):
    out = tmp_path / "tuned"
    flags = ("--corpus", checkpoint / "text.txt", "--exits", "2", "--epochs", 1, "--tokens", 400)
    assert offramp("tune", checkpoint, *flags, "--out", out).returncode == 0
    card = offramp("card", out)
    assert card.returncode == 0, card.stderr
    assert "the files do not say whether the hub has it" in card.stdout
    assert "## Exits before and after training" in card.stdout
    assert str(tmp_path) not in card.stdout
    assert str(checkpoint) not in card.stdout
