"""The processes that train the runs of a study, and the watcher that shows their progress."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offramp.errors import CheckpointError
from offramp.studies.cluster import check_cluster, run_on_ray
from offramp.studies.runs import RunProgress, run_all
from offramp.studies.study.run import StudyRun


class Watcher(Protocol):
    """Functions that a study calls, so that the caller can show its progress."""

    def on_plan(self, name: str, total: int, tokens: int) -> None:
        """A study begins, with that many runs and training tokens in all."""

    def on_timing(self, passes: int, tokens: int) -> None:
        """The static models are being timed, by that many passes over that many tokens each."""

    def on_decoding(self, policies: int, prompt_tokens: int, new_tokens: int) -> None:
        """Decoding is being timed, with that many models and policies in turns."""

    def on_progress(self, progress: RunProgress) -> None:
        """A run has done some steps."""

    def on_done(self, name: str) -> None:
        """A run is finished."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who trains, and where the runs are kept."""

    folder: Path
    "Folder of the runs, one folder each; studies may share it."
    jobs: int = 1
    "Number of processes of this machine that train at a time."
    threads: int = 1
    "Threads of each run."
    ray: str | None = None
    "Address of a Ray cluster that does the runs instead."

    def missing(self, runs: Sequence[StudyRun]) -> list[StudyRun]:
        """The runs that are not done yet."""
        return [run for run in runs if not (self.folder / run.name).exists()]

    def check(self, runs: Sequence[StudyRun]) -> None:
        """Raise where the folder cannot hold the runs, or the cluster could not do them."""
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not there.is_dir():
            raise CheckpointError(f"{there}: expected a folder for the runs, got a file")
        if not os.access(there, os.W_OK):
            raise CheckpointError(f"{there}: expected a folder that can be written to")
        if self.ray is not None and self.missing(runs):
            check_cluster(self.ray, threads=self.threads)

    def do(self, runs: Sequence[StudyRun], watcher: Watcher) -> None:
        """Do the runs that are missing.

        Figures do not depend on who does them, as long as processors and numbers of threads
        round alike.
        """
        if self.ray is not None:
            run_on_ray(
                runs,
                self.folder,
                address=self.ray,
                threads=self.threads,
                on_done=watcher.on_done,
            )
            return
        run_all(
            runs,
            self.folder,
            jobs=self.jobs,
            threads=self.threads,
            on_progress=watcher.on_progress,
            on_done=watcher.on_done,
        )
