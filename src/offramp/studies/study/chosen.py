"""What ``offramp study`` runs: a study by its name, or a grid of one's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.errors import ConfigError, OfframpError
from offramp.report.scale_result import ScaleResult
from offramp.report.study_result import StudyResult
from offramp.schema import fitting
from offramp.studies.study.config import StudyConfig
from offramp.studies.study.grid_file import GridFile, read_grid
from offramp.studies.study.own import study_of_grid
from offramp.studies.study.plan import Study
from offramp.studies.study.scale import NAME, SCALE, Scale, run_scale
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.study import run_study
from offramp.studies.study.workers import Watcher, Workers

Chosen = str | Path | Mapping[str, Any]


def chosen_study(chosen: Chosen) -> Study | Scale:
    """The built-in study of a name, or that of a grid: a TOML file, or its content.

    A string that ends with .toml is the path of a file. Raises ConfigError for a name that no study
    has, and CheckpointError or ConfigError for a grid that is not valid.
    """
    if isinstance(chosen, Mapping):
        return study_of_grid(fitting(GridFile, chosen))
    if isinstance(chosen, Path) or chosen.endswith(".toml"):
        content = read_grid(Path(chosen))
        try:
            return study_of_grid(content)
        except OfframpError as error:
            raise ConfigError(f"{chosen}: {error}") from None
    if chosen == NAME:
        return SCALE
    if chosen not in STUDIES:
        raise ConfigError(f"study: expected one of {', '.join((*STUDIES, NAME))}, got {chosen!r}")
    return STUDIES[chosen]


def run_chosen(
    chosen: Chosen, config: StudyConfig, out: Path, *, watcher: Watcher, workers: Workers
) -> StudyResult | ScaleResult:
    """Do the runs of the chosen study that are missing, and write its result.

    Raises what ``chosen_study`` raises, and ConfigError for an option that the study does not have.
    """
    study = chosen_study(chosen)
    if isinstance(study, Scale):
        return run_scale(study, config, out, watcher=watcher, workers=workers)
    if config.sizes is not None:
        raise ConfigError(
            f"sizes: expected none with study {study.name}, got "
            f"{', '.join(map(str, config.sizes))}; only study {NAME} has sizes"
        )
    return run_study(study, config, out, watcher=watcher, workers=workers)
