"""Where there is no terminal, long work leaves a line a minute."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from offramp.report import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_gets_a_line_a_minute_for_each_bar(clock, quiet):
    log = io.StringIO()
    with progress.bars(Console(file=log, quiet=quiet)) as drawn:
        for step in range(0, 200, 10):
            clock[0] = float(step)
            drawn.show("alpha", done=step, total=1200, text="runs")
            drawn.show("  [red]", done=step, total=200)
        drawn.drop("  [red]")
    lines = [
        line
        for step in (60, 120, 180)
        for line in (f"alpha: {step} of 1,200  runs", f"[red]: {step} of 200")
    ]
    assert log.getvalue().splitlines() == ([] if quiet else lines)


def test_a_terminal_gets_bars_and_no_lines(clock):
    terminal = io.StringIO()
    with progress.bars(Console(file=terminal, force_terminal=True, width=100)) as drawn:
        drawn.show("alpha", done=0, total=12)
        clock[0] = 100.0
        drawn.show("alpha", done=7, total=12)
    assert "7/12" in terminal.getvalue()
    assert "7 of 12" not in terminal.getvalue()


def test_a_study_has_a_bar_for_itself_and_one_for_each_run():
    said, shown, dropped = [], {}, []

    class Drawn:
        def show(self, name, *, done, total, text=""):
            shown[name] = (done, total, text)

        def drop(self, name):
            dropped.append(name)

    watcher = progress.StudyBars(Drawn(), said.append)
    watcher.on_plan("alpha", 2, 1000)
    watcher.on_timing(3, 400)
    watcher.on_decoding(9, 512, 32)
    watcher.on_progress(SimpleNamespace(name="half", step=1, total_steps=5, loss=2.0, ppl=7.389))
    watcher.on_done("half")
    assert said == [
        "alpha: 2 runs, 1,000 training tokens in all",
        "Timing the static models: 3 passes over 400 tokens each",
        "Timing decoding: 9 models and policies, 512 + 32 tokens each",
    ]
    assert shown["  half"] == (1, 5, "loss 2.000  PPL 7.39")
    assert shown["alpha"] == (1, 2, "runs")
    assert dropped == ["  half"]
