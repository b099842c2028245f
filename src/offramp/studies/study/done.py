"""A finished run of a study, as a summary reads it: files, never a model."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from offramp.studies.runs import reading_run
from offramp.studies.study.frontier import Frontier, FrontierKey, load_frontiers
from offramp.studies.study.record import FRONTIERS, RunRecord, RunTiming
from offramp.studies.study.run import StudyRun


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished run, as the summary reads it."""

    run: StudyRun
    folder: Path

    @cached_property
    def record(self) -> RunRecord:
        """How the model was trained, and its figures."""
        with reading_run(self.folder):
            return RunRecord.load(self.folder)

    @cached_property
    def frontiers(self) -> dict[FrontierKey, Frontier]:
        """Its frontiers, costs in percent of the run's own full model."""
        with reading_run(self.folder):
            return load_frontiers(self.folder / FRONTIERS)

    @cached_property
    def timing(self) -> RunTiming:
        """The seconds that it took."""
        with reading_run(self.folder):
            return RunTiming.load(self.folder)

    @property
    def seed(self) -> int:
        """The seed of its training."""
        return self.run.training.seed

    @property
    def layers(self) -> int:
        """The depth of its model."""
        return self.run.model.num_hidden_layers

    @property
    def source(self) -> int | None:
        """The layer above which its blocks share keys and values; None for a usual model."""
        return self.run.model.kv_source_layer

    @property
    def is_static(self) -> bool:
        """Whether its model has no early exits."""
        return len(self.run.model.exit_layers) == 1
