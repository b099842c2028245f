"""offramp plot draws any result file."""

import json

import pytest


@pytest.fixture(scope="module")
def results(offramp, trained, tmp_path_factory):
    """A result file of each quick command, by its name."""
    folder = tmp_path_factory.mktemp("results")
    text = ("--corpus", "pangram")
    commands = {
        "sweep": ("sweep", trained, *text),
        "probe": ("probe", trained, *text, "--tokens", 500),
        "confidence": ("confidence", trained, *text),
        "certificate": ("calibrate", trained, *text, "--epsilon", 0.2),
        "budget": ("calibrate", trained, *text, "--compute-budget", 90),
        "bench": (
            *("bench", trained, *text, "--prompts", 1, "--repeats", 1, "--prompt-tokens", 8),
            *("--max-new-tokens", 4, "--no-peers"),
        ),
    }
    for name, command in commands.items():
        done = offramp(*command, "--out", folder / f"{name}.json")
        assert done.returncode == 0, done.stderr
    done = offramp(
        *("calibrate", trained, *text, "--check", folder / "certificate.json"),
        *("--out", folder / "check.json"),
    )
    assert done.returncode == 0, done.stderr
    done = offramp("sweep", trained, *text, "--out", folder / "table.csv")
    assert done.returncode == 0, done.stderr
    (folder / "metrics.csv").write_bytes((trained / "metrics.csv").read_bytes())
    return folder


@pytest.mark.parametrize(
    "name",
    ["sweep", "probe", "confidence", "certificate", "budget", "bench", "metrics", "check", "table"],
)
def test_a_result_is_drawn(offramp, results, tmp_path, name):
    [file] = results.glob(f"{name}.[jc]s*")
    out = tmp_path / f"{name}.svg"
    done = offramp("plot", file, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("ending", "beginning"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")]
)
def test_the_ending_names_the_format(offramp, results, tmp_path, ending, beginning):
    out = tmp_path / f"a picture.{ending}"
    assert offramp("plot", results / "sweep.json", "--out", out).returncode == 0
    assert out.read_bytes().startswith(beginning)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "expected a result of offramp sweep"),
        ("[1]", "expected a result of offramp sweep"),
        ('{"rows": []}', "cannot be drawn"),
        ('{"rows": [{"threshold": 1}], "n_tokens": "x"}', "cannot be drawn"),
        ('{"study": "alpha"}', "study: expected what offramp"),
        (
            '{"study": "a", "offramp_version": "9.0"}',
            "(offramp 9.0 wrote it), got one that differs",
        ),
        ('{"rows": [{"threshold": 1, "ppl": NaN, "compute_pct": 1}]}', "another at rows[0].ppl"),
        ('{"rows": [{"threshold": 1, "ppl": 1e400, "compute_pct": 1}]}', "another at rows[0].ppl"),
        ("", "expected readable JSON"),
        ("[" * 100_000, "expected readable JSON"),
        ("[" * 900 + "]" * 900, "expected a result of offramp sweep"),
        ('{"corpora": 7}', "cannot be drawn"),
        ("no json", "expected readable JSON"),
        ('{"exits": [], "oracle_layers": 1}', "expected a"),
        ("step\n", "expected a CSV file with rows"),
        ("a,b\n1,2\n", "a column step"),
        ("threshold,ppl\nx,y\n", "expected numbers"),
        ("step,loss\n1,\n", "expected a"),
        ("step,loss\n1,x\n", "expected a"),
    ],
)
def test_another_file_is_refused_in_one_sentence(offramp, tmp_path, content, said):
    csv = "," in content.partition("\n")[0] or content.startswith("step")
    file = tmp_path / ("file.csv" if csv and content[0] not in "[{" else "file.json")
    file.write_text(content)
    done = offramp("plot", file)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not file.with_suffix(".png").exists()


def test_a_study_is_drawn(offramp, tmp_path):
    from pathlib import Path

    root = Path(__file__).parents[2]
    for name in ("alpha", "recipe"):
        out = tmp_path / f"{name}.svg"
        done = offramp("plot", root / "docs" / "studies" / name / "study.json", "--out", out)
        assert done.returncode == 0, done.stderr
        assert "<svg" in out.read_text()[:200]
    assert json.loads((root / "docs/studies/alpha/study.json").read_text())["study"] == "alpha"


def test_a_theme_and_a_size(offramp, results, tmp_path):
    out = tmp_path / "paper.svg"
    done = offramp("plot", results / "sweep.json", "--theme", "paper", "--out", out)
    assert done.returncode == 0, done.stderr
    assert 'width="252' in out.read_text()[:400] or 'width="251' in out.read_text()[:400]
    sized = ("--width", 300, "--height", 200, "--out", tmp_path / "sized.png")
    done = offramp("plot", results / "sweep.json", *sized)
    assert done.returncode == 0, done.stderr
    header = (tmp_path / "sized.png").read_bytes()[16:24]
    size = [int.from_bytes(header[at : at + 4]) for at in (0, 4)]
    assert abs(size[0] - 600) <= 4
    assert abs(size[1] - 400) <= 4


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--theme", "dark"), "theme"),
        (("--width", "10"), "width: expected a number from 150 to 4000, got 10"),
        (("--height", "nan"), "height: expected a number from 150 to 4000, got nan"),
        (("--width", "x"), "width"),
    ],
)
def test_a_size_that_is_none_is_refused(offramp, results, tmp_path, option, said):
    out = tmp_path / "picture.svg"
    done = offramp("plot", results / "sweep.json", *option, "--out", out)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()
