"""offramp reproduce."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from offramp.cli.base import Device, console, new_folder, output, say, use
from offramp.options import check_processes
from offramp.studies.reproduce.config import ReproduceConfig, minutes_text

if TYPE_CHECKING:
    from offramp.report.progress import Bars
    from offramp.studies.runs import RunProgress


def reproduce(
    config: Annotated[ReproduceConfig | None, Parameter(name="*")] = None,
    *,
    out: Path | None = None,
    runs: Path | None = None,
    device: Device = "cpu",
    threads: Annotated[int, Parameter(help="Threads of each process.")] = 1,
    jobs: int | None = None,
) -> None:
    """Reproduce Experiments 5 and 6 of the seed document, with a verdict on each claim.

    Parameters
    ----------
    out
        Folder for results.json, tables.md and report.html (default: a new one in runs/).
    runs
        Folder of the training runs (default: OUT/runs); what is there is not trained again.
    jobs
        Processes that train at a time (default: one a core).
    """
    config = config or ReproduceConfig()
    check_processes(jobs=jobs)
    from offramp.report.progress import bars
    from offramp.report.reproduction_tables import rich_tables
    from offramp.report.text import headline
    from offramp.studies.reproduce.study import reproduce as run_reproduction
    from offramp.studies.runs import default_jobs

    use(device, threads)
    out = out or new_folder(Path("runs"), "reproduce")
    with bars(console) as drawn:
        watcher = ReproductionBars(drawn, out)
        try:
            results = run_reproduction(
                config,
                out,
                command=shlex.join(["offramp", *sys.argv[1:]]),
                watcher=watcher,
                jobs=jobs or default_jobs(threads),
                threads=threads,
                device=device,
                kept=runs,
            )
        except KeyboardInterrupt:
            say(
                f"Stopped. The finished runs ({watcher.done} of {watcher.total} on "
                f"{watcher.corpus}) are kept in {runs or out}. The same command with "
                f"--out {shlex.quote(str(out))} does the rest."
            )
            raise
    shown = output()
    for table in rich_tables(results, shown.width):
        shown.print(table)
    for name, corpus in results["corpora"].items():
        shown.print(headline(name, corpus), highlight=False, markup=False)
    say(f"{results['seconds']:.0f} s. The report: {out / 'report.html'}")


class ReproductionBars:
    """One bar for the corpus, and one for each run under way."""

    def __init__(self, drawn: "Bars", out: Path) -> None:
        self.drawn, self.out = drawn, out
        self.corpus, self.total, self.done = "", 0, 0

    def on_plan(self, missing: int, jobs: int) -> None:
        """Say how long the work takes."""
        from offramp.studies.runs import default_jobs

        runs = f"{missing} training {'run' if missing == 1 else 'runs'}"
        say(f"{runs} to do: {minutes_text(missing, min(jobs, default_jobs()))}.")

    def on_corpus(self, name: str, total: int) -> None:
        """A corpus begins."""
        say(f"{name}: {total} training runs into {self.out}")
        self.drawn.drop(self.corpus)
        self.corpus, self.total, self.done = name, total, 0
        self.drawn.show(name, done=0, total=total, text="runs")

    def on_progress(self, progress: "RunProgress") -> None:
        """Move the bar of a run."""
        text = f"loss {progress.loss:.3f}  PPL {progress.ppl:.2f}"
        name = f"  {progress.name}"
        self.drawn.show(name, done=progress.step, total=progress.total_steps, text=text)

    def on_done(self, name: str) -> None:
        """A run is finished."""
        self.done += 1
        self.drawn.drop(f"  {name}")
        self.drawn.show(self.corpus, done=self.done, total=self.total, text="runs")
