"""``offramp study``: do the runs that are missing, then summarise all of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.environment import environment
from offramp.errors import CheckpointError
from offramp.files import write_json
from offramp.folders import working_in
from offramp.reading import read_json
from offramp.report import study as report
from offramp.report.study_json import write_study
from offramp.report.study_result import Searched, StudyResult
from offramp.studies.study.config import StudyConfig
from offramp.studies.study.decoding import decoding_times
from offramp.studies.study.format import FORMAT
from offramp.studies.study.grid import check_runs, plan_runs
from offramp.studies.study.plan import Study
from offramp.studies.study.run import StudyRun
from offramp.studies.study.summary import summarise
from offramp.studies.study.texts import study_text
from offramp.studies.study.timing import TIMES, keep_static_times, timings
from offramp.studies.study.workers import Watcher, Workers

RESULT = "study.json"
SETTINGS = "settings.json"


def run_study(
    study: Study, config: StudyConfig, out: Path, *, watcher: Watcher, workers: Workers
) -> StudyResult:
    """Train the runs that are missing, summarise all; returns the content of ``study.json``.

    ``out`` gets study.json, timing.json, the tables, the plots and the report. The same call
    continues a study that was stopped or killed.
    """
    text = study_text(config)
    study = replace(study, seeds=config.seeds or study.seeds, tokens=config.tokens or study.tokens)
    runs = plan_runs(study, text)
    check_runs(runs)
    settings = {
        "study": study.name,
        "seeds": study.seeds,
        "tokens": study.tokens,
        "text": text.about,
    }
    if study.grid is not None:
        settings["grid"] = study.grid
    workers.check(runs)
    with go_on_or_claim(out, settings):
        return finish_study(study, runs, out, watcher=watcher, workers=workers)


def finish_study(
    study: Study,
    runs: Sequence[StudyRun],
    out: Path,
    *,
    watcher: Watcher,
    workers: Workers,
    search: tuple[Searched, ...] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> StudyResult:
    """Train the runs that are missing and write the result of all.

    If runs are missing, the static models are timed first, so that their times are kept though
    the study is stopped later, and decoding is timed at the end. Where every run is kept already
    nothing is trained or timed.
    ``search`` and ``recipe`` are what ``offramp recipe`` adds to the result.
    """
    watcher.on_plan(study.name, len(runs), sum(run.tokens for run in runs))
    if workers.missing(runs):
        keep_static_times(runs, out, threads=workers.threads, on_timing=watcher.on_timing)
    workers.do(runs, watcher)
    result = summarise(study, runs, workers.folder, search=search, recipe=recipe)
    write_study(out / RESULT, result)
    times = replace(
        timings(runs, workers.folder, out),
        decoding=decoding_times(
            runs, workers.folder, out, threads=workers.threads, on_decoding=watcher.on_decoding
        ),
    )
    write_study(out / TIMES, times)
    report.write(result, times, out)
    made_with = {"jobs": workers.jobs, "threads": workers.threads, "ray": workers.ray}
    write_json(out / "environment.json", {**environment("cpu"), **made_with})
    return result


@contextmanager
def go_on_or_claim(out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Make ``out``, or check that it holds a study with the same settings, to continue it.

    The folder is locked meanwhile. A study that fails before it has trained a run leaves nothing.
    """
    marker = out / SETTINGS
    mine = {"format": FORMAT, **settings}
    if marker.exists():
        _check_settings(out, read_json(marker), mine)
    with working_in(marker, mine):
        yield


def _check_settings(out: Path, stored: Any, mine: Mapping[str, Any]) -> None:
    found = stored.get("format") if isinstance(stored, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{out}: expected a study of format {FORMAT}, got one of another offramp version, "
            f"of format {found}; choose another --out"
        )
    if stored != mine:
        keys = dict.fromkeys((*mine, *stored))
        different = [key for key in keys if stored.get(key) != mine.get(key)]
        raise CheckpointError(
            f"{out}: expected the same study to continue, but {', '.join(different)} differ: "
            f"stored {[stored.get(key) for key in different]}, now "
            f"{[mine.get(key) for key in different]}; choose another --out"
        )
