"""The whole reproduction on short texts: trained, interrupted, gone on with, reported."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from offramp.reading import read_json
from offramp.studies.reproduce import study


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(study, "TRAIN_CHARACTERS", 4200)
    monkeypatch.setattr(study, "VALIDATION_CHARACTERS", 2100)
    monkeypatch.setattr(study, "PANGRAM_EPOCHS", 2)


def figures(path):
    content = read_json(path)
    for volatile in ("command", "seconds", "environment"):
        del content[volatile]
    return content


@pytest.mark.slow
def test_the_same_seeds_twice_give_the_same_figures(offramp, short, tmp_path):
    for name, jobs in (("a", 2), ("b", 1)):
        arguments = ("reproduce", "--corpus", "pangram", "--seeds", 2, "--jobs", jobs)
        result = offramp(*arguments, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert figures(tmp_path / "a" / "results.json") == figures(tmp_path / "b" / "results.json")
    assert "Experiment 6" in result.stdout
    corpus = figures(tmp_path / "a" / "results.json")["corpora"]["pangram"]
    assert corpus["protocol"]["parameters"] == 200_832
    assert len(corpus["findings"]) == 6
    first, second = corpus["tables"]["baselines"][0]["measured"]["ppl"]["values"]
    assert first != second  # the seeds do something
    assert (tmp_path / "a" / "report.html").stat().st_size > 100_000
    assert "22.95" in (tmp_path / "a" / "tables.md").read_text()
    for part in ("tables", "curves", "findings"):
        with (tmp_path / "a" / f"{part}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["corpus"] for row in rows} == {"pangram"}


@pytest.mark.slow
def test_chosen_alphas_take_the_runs_that_another_command_trained(offramp, short, tmp_path):
    runs = tmp_path / "runs"
    plain = ("reproduce", "--corpus", "pangram", "--seeds", 1, "--jobs", 1, "--runs", runs)
    result = offramp(*plain, "--out", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    assert "6 training runs to do: about" in result.stderr
    times = {run: run.stat().st_mtime_ns for run in runs.glob("pangram/*/run.json")}
    more = (*plain, "--out", tmp_path / "b", "--alphas", "0.1,0.7", "--thresholds", "0.2,0.9")
    result = offramp(*more)
    assert result.returncode == 0, result.stderr
    assert "1 training run to do: about" in result.stderr
    assert "asymmetric, α = 0.1" in result.stdout
    assert {run: run.stat().st_mtime_ns for run in times} == times
    corpora = [read_json(tmp_path / name / "results.json")["corpora"]["pangram"] for name in "ab"]
    assert corpora[0]["findings"] == corpora[1]["findings"]
    assert len(corpora[1]["grid"]) == 5 * 2


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "out"
    script = (
        "import signal\n"
        "from offramp.studies.reproduce import study\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs of a shell ignore it
        "study.TRAIN_CHARACTERS, study.VALIDATION_CHARACTERS = 4200, 2100\n"
        "study.PANGRAM_EPOCHS = 2\n"
        "from offramp import cli\n"
        "if __name__ == '__main__':\n"
        "    arguments = ['reproduce', '--corpus', 'pangram', '--seeds', '4', '--out']\n"
        f"    cli.main([*arguments, {str(out)!r}])\n"
    )
    path = tmp_path / "run.py"
    path.write_text(script)
    command = [sys.executable, str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )
    folder = out / "runs" / "pangram"
    deadline = time.monotonic() + 120
    while len([*folder.glob("*-seed0/run.json")]) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, stderr = process.communicate(timeout=120)
    finished = {run.name for run in folder.iterdir() if not run.name.startswith(".")}
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "does the rest" in stderr
    partial = json.loads((out / "results.json").read_text())
    assert partial["corpora"]["pangram"]["protocol"]["seeds"][0] == 0
    kept = {name: (folder / name / "run.json").stat().st_mtime_ns for name in finished}

    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert len(read_json(out / "results.json")["corpora"]["pangram"]["protocol"]["seeds"]) == 4
    assert {name: (folder / name / "run.json").stat().st_mtime_ns for name in kept} == kept
    assert not (out / study.MARKER).exists()
