"""A study's page, pictures and table.md, from its result."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import altair as alt

from offramp.files import replacing
from offramp.models.missing_kv import EXACT
from offramp.report import study_plots
from offramp.report.drawing import save_png
from offramp.report.html import Figure, labelled_figure, page_environment
from offramp.report.study_conclusions import conclusions
from offramp.report.study_csv import frontiers_csv, summary_csv
from offramp.report.study_decoding import (
    NOT_TIMED,
    decoding_chart,
    decoding_csv,
    decoding_table,
)
from offramp.report.study_result import StudyResult, StudyTimes
from offramp.report.study_tables import study_tables
from offramp.report.tables import markdown_table


def write(result: StudyResult, times: StudyTimes, out: Path) -> None:
    """Write table.md, CSV files, two pictures and report.html, each whole or not at all.

    If decoding was timed, decoding.csv is written, too.
    """
    confidence, missing_kv = result.families[0]
    with replacing(out / "table.md") as aside:
        aside.write_text(markdown(result), encoding="utf-8")
    save_png(study_plots.recipes(result), out / "figure.png")
    save_png(study_plots.frontiers(result, confidence, missing_kv), out / "frontier.png")
    files = {"summary.csv": summary_csv(result), "frontiers.csv": frontiers_csv(result)}
    if times.decoding is not None:
        files["decoding.csv"] = decoding_csv(times.decoding)
    for name, content in files.items():
        with replacing(out / name) as aside:
            aside.write_text(content, encoding="utf-8")
    with replacing(out / "report.html") as aside:
        aside.write_text(page(result, times), encoding="utf-8", newline="\n")


def page(result: StudyResult, times: StudyTimes) -> str:
    """One self-contained page: conclusions and a frontier; folded, all answers, plots, tables."""
    environment, javascript = page_environment()
    figures = _figures(result, times)
    tables = study_tables(result)
    if times.decoding is not None:
        tables.append(decoding_table(times.decoding))
    return environment.get_template("study.html.jinja").render(
        content=result,
        conclusions=conclusions(result),
        how=how(result) if times.decoding else f"{how(result)} {NOT_TIMED}",
        tables=tables,
        figures=figures,
        files=["summary.csv", "frontiers.csv", *(["decoding.csv"] if times.decoding else [])],
        vega=javascript,
        version=result.offramp_version,
    )


def _figures(result: StudyResult, times: StudyTimes) -> list[Figure]:
    """The page's figures: the frontier that is shown first, the recipes, and all others."""
    confidence, missing_kv = result.families[0]
    draws: list[Callable[..., alt.LayerChart]] = [
        partial(study_plots.frontiers, result, *family) for family in result.families
    ]
    draws.append(partial(study_plots.frontiers, result, confidence, missing_kv, "compute_pct"))
    draws.append(partial(study_plots.measured, result, times, confidence))
    if times.decoding is not None:
        for batch in times.decoding.batches:
            draws.append(partial(decoding_chart, times.decoding, batch))
    first, *others = [labelled_figure(draw) for draw in draws]
    height = study_plots.ROW * len(result.family(confidence, missing_kv))
    recipes = partial(study_plots.recipes, result)
    return [first, labelled_figure(recipes, heights=(height, height)), *others]


def markdown(result: StudyResult) -> str:
    """The question, the answers, how the figures were obtained, and the tables."""
    lines = [f"# Study: {result.study}", "", result.question, ""]
    lines += [f"- {answer}" for answer in result.answers]
    lines += ["", how(result), ""]
    for table in study_tables(result):
        lines += [*markdown_table(table, 2), ""]
    return "\n".join(lines)


def how(result: StudyResult) -> str:
    """How the figures were obtained, in words."""
    seeds = len(result.seeds)
    return (
        f"Text: {result.text['corpus']}; {result.text['split']}, its first "
        f"{result.test_tokens:,} tokens. {result.train_tokens:,} training tokens a run, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; mean ± sample standard deviation of the "
        "PPL. FLOPs% counts layers, exit heads and gates, relative to the standard model; Compute% "
        "is layers run / layers in the model. Thresholds are quantiles of the confidence on "
        "held-out training text. PPL between two thresholds is interpolated in logs. "
        f"{_thresholds(result)} Static: a shallower model without exits, trained on the same "
        f"tokens, interpolated between depths{_shared(result)}. Gates, and exits that a recipe "
        "specialises, are fitted "
        "after training to a sample of the same training text with the backbone frozen; static "
        "models have neither. A ratio below 1 is better. In brackets is its 95% bootstrap interval "
        "over seeds and stretches of the text; with few seeds it is too narrow, little more than "
        "the range of the seeds, so rely on p. p: paired t test on the seeds' log ratios, with "
        "Holm's correction over the recipes."
    )


def _thresholds(result: StudyResult) -> str:
    """How many thresholds the frontiers have, by the meaning of ``missing_kv``."""
    inner = {kv: len(at) - 2 for run in result.runs for kv, at in run.frontier.items()}
    said = []
    if "recompute" in inner:
        said.append(f"Under recompute there are {inner['recompute']} thresholds.")
    if "propagate" in inner:
        said.append(
            f"Under propagate each threshold needs a pass of its own, so there are "
            f"{inner['propagate']}, and interpolation makes the PPL look slightly too high."
        )
    if EXACT in inner:
        said.append(
            "Exact: the exits are complete, so a token that leaves has left all keys and values "
            "that later tokens read; recompute and propagate are then the same, and there are "
            f"{inner[EXACT]} thresholds."
        )
    return " ".join(said)


def _shared(result: StudyResult) -> str:
    """The static models whose blocks share keys and values, in words; empty without them."""
    sources = sorted({model.source for model in result.static if model.source is not None})
    if not sources:
        return ""
    layers = " and ".join(map(str, sources))
    return (
        "; beside the plain ones stand models whose blocks above a layer share keys and values "
        f"(source {layers}), and at each cost the best of all counts, for each seed, "
        "which favours static models"
    )
