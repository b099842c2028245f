"""offramp study."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from offramp.cli.base import console, output, say
from offramp.cli.interrupts import work_begins
from offramp.errors import ConfigError
from offramp.options import check_processes
from offramp.studies.study.config import StudyConfig

if TYPE_CHECKING:
    from offramp.report.scale_result import ScaleResult
    from offramp.report.study_result import StudyResult
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
        check_processes(jobs=self.jobs, threads=self.threads)

    def workers(self, out: Path) -> "Workers":
        """The processes that train: one for each core unless chosen otherwise, or a cluster."""
        from offramp.studies.runs import default_jobs
        from offramp.studies.study.workers import Workers

        return Workers(
            folder=self.runs or out / "runs",
            jobs=self.jobs or default_jobs(self.threads),
            threads=self.threads,
            ray=self.ray,
        )


def study(
    name: str | None = None,
    *,
    config: Annotated[StudyConfig, Parameter(name="*")],
    out: Path,
    grid: Path | None = None,
    where: Annotated[Where | None, Parameter(name="*")] = None,
) -> None:
    """Train a grid of recipes on the same tokens with several seeds, and compare them.

    Parameters
    ----------
    name
        Which study: objectives, alpha, middle, exits, heads, kv or scale; none with
        --grid.
    grid
        A TOML file with a grid of your own: any fields of the model and of the training.
    out
        Folder for study.json, the tables, the plots and the runs; the same command continues a
        study that was stopped.
    """
    from offramp.report.progress import StudyBars, bars
    from offramp.studies.study.chosen import run_chosen

    if (name is None) == (grid is None):
        got = "neither" if name is None else "both"
        raise ConfigError(f"study: expected the name of a study or --grid, got {got}")
    workers = (where or Where()).workers(out)
    work_begins()
    with bars(console) as drawn, say_how_to_continue(out):
        result = run_chosen(
            grid or str(name), config, out, watcher=StudyBars(drawn, say), workers=workers
        )
    say_answers(result)
    say(f"The figures: {out / 'study.json'}; the report: {out / 'report.html'}")


@contextmanager
def say_how_to_continue(out: Path) -> Iterator[None]:
    """After Ctrl-C, say what is kept and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"Stopped. The finished runs are kept in {quote(str(out))}; the same command continues")
        raise


def say_answers(result: "StudyResult | ScaleResult") -> None:
    """Print what the study found."""
    out = output()
    for answer in result.answers:
        out.print(f"- {answer}", highlight=False, markup=False, soft_wrap=True)
