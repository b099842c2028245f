"""offramp study."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from offramp.cli.base import console, output, say
from offramp.cli.interrupts import work_begins
from offramp.errors import ConfigError
from offramp.studies.study.config import StudyConfig

if TYPE_CHECKING:
    from offramp.report.progress import Bars
    from offramp.report.study_result import StudyResult
    from offramp.studies.runs import RunProgress
    from offramp.studies.study.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Where:
    """Who trains, and where the runs go."""

    runs: Path | None = None
    "Folder of the runs (default: OUT/runs); studies that name the same do a run once."
    jobs: int | None = None
    "Processes that train at a time (default: one a core)."
    ray: str | None = None
    "Train on the Ray cluster at this address instead: auto, HOST:PORT or ray://HOST:PORT."
    threads: int = 1
    "Threads of each process."

    def __post_init__(self) -> None:
        if self.jobs is not None and self.ray is not None:
            raise ConfigError("ray: expected --jobs or --ray, got both")
        for name, value in (("jobs", self.jobs), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")

    def workers(self, out: Path) -> "Workers":
        """The processes that train: one for each core unless chosen otherwise, or a cluster."""
        from offramp.studies.study.workers import Workers

        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return Workers(
            folder=self.runs or out / "runs",
            jobs=self.jobs or max(1, cores // self.threads),
            threads=self.threads,
            ray=self.ray,
        )


def study(
    name: str,
    config: Annotated[StudyConfig, Parameter(name="*")],
    *,
    out: Path,
    where: Annotated[Where | None, Parameter(name="*")] = None,
) -> None:
    """Train a grid of recipes on the same tokens with several seeds, and compare them.

    Parameters
    ----------
    name
        Which study: objectives, alpha, middle, exits or heads.
    out
        Folder for study.json, the tables, the plots and the runs; the same command continues a
        study that was stopped.
    """
    from offramp.report.progress import bars
    from offramp.studies.study.study import run_study, study_named

    workers = (where or Where()).workers(out)
    work_begins()
    with bars(console) as drawn:
        result = run_study(
            study_named(name), config, out, watcher=StudyBars(drawn), workers=workers
        )
    say_answers(result)
    say(f"The figures: {out / 'study.json'}; the report: {out / 'report.html'}")


def say_answers(result: "StudyResult") -> None:
    """Print what the study found."""
    out = output()
    for answer in result.answers:
        out.print(f"- {answer}", highlight=False, markup=False, soft_wrap=True)


class StudyBars:
    """One bar for the study, and one for each run under way."""

    def __init__(self, drawn: "Bars") -> None:
        self.drawn, self.name = drawn, ""
        self.total, self.done = 0, 0

    def on_plan(self, name: str, total: int, tokens: int) -> None:
        """The study begins."""
        say(f"{name}: {total} runs, {tokens:,} training tokens in all")
        self.name, self.total, self.done = name, total, 0
        self.drawn.show(name, done=0, total=total, text="runs")

    def on_timing(self, passes: int, tokens: int) -> None:
        """The static models are timed."""
        say(f"Timing the static models: {passes} passes over {tokens:,} tokens each")

    def on_progress(self, progress: "RunProgress") -> None:
        """Move the bar of a run."""
        text = f"loss {progress.loss:.3f}  PPL {progress.ppl:.2f}"
        self.drawn.show(
            f"  {progress.name}", done=progress.step, total=progress.total_steps, text=text
        )

    def on_done(self, name: str) -> None:
        """A run is finished."""
        self.done += 1
        self.drawn.drop(f"  {name}")
        self.drawn.show(self.name, done=self.done, total=self.total, text="runs")
