"""offramp study."""

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.base import app, console, say
from offramp.errors import ConfigError
from offramp.experiments.runs import RunProgress
from offramp.experiments.study import StudyConfig, run_study
from offramp.report.progress import Bars, bars


@app.command
def study(
    name: str,
    config: Annotated[StudyConfig, Parameter(name="*")],
    *,
    out: Path,
    runs: Path | None = None,
    jobs: int | None = None,
    threads: Annotated[int, Parameter(help="Threads of each process.")] = 1,
) -> None:
    """Train a grid of recipes on the same tokens with several seeds, and compare them.

    Parameters
    ----------
    name
        Which study: objectives, alpha, middle, exits or heads.
    out
        Folder for study.json, the tables, the plots and the runs; the same command goes on with
        a study that was stopped.
    runs
        Folder of the runs (default: OUT/runs); studies that name the same do a run once.
    jobs
        Processes that train at a time (default: one a core).
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs: expected at least 1, got {jobs}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with bars(console) as drawn:
        run_study(
            name,
            config,
            out,
            watcher=StudyBars(name, drawn),
            jobs=jobs or max(1, (cores or 1) // threads),
            threads=threads,
            folder=runs,
        )
    say(f"The figures: {out / 'study.json'}")


class StudyBars:
    """One bar for the study, and one for each run under way."""

    def __init__(self, study_name: str, drawn: Bars) -> None:
        self.study_name, self.drawn = study_name, drawn
        self.total, self.done = 0, 0

    def on_plan(self, total: int, tokens: int) -> None:
        """The study begins."""
        say(f"{self.study_name}: {total} runs, {tokens:,} training tokens in all")
        self.total = total
        self.drawn.show(self.study_name, done=0, total=total, text="runs")

    def on_progress(self, progress: RunProgress) -> None:
        """A run goes on."""
        text = f"loss {progress.loss:.3f}  PPL {progress.ppl:.2f}"
        self.drawn.show(
            f"  {progress.name}", done=progress.step, total=progress.total_steps, text=text
        )

    def on_done(self, name: str) -> None:
        """A run is finished."""
        self.done += 1
        self.drawn.drop(f"  {name}")
        self.drawn.show(self.study_name, done=self.done, total=self.total, text="runs")
