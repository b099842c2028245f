"""The page, the picture, the table and the CSV of the study ``scale``, from its result."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from offramp.files import replacing
from offramp.report.drawing import save_png
from offramp.report.html import labelled_figure, page_environment
from offramp.report.scale_plot import ratios
from offramp.report.scale_result import ScaleResult, Size, millions
from offramp.report.study_csv import written
from offramp.report.study_result import Ratio
from offramp.report.study_tables import DASH, spread_text
from offramp.report.tables import Column, Table, markdown_table
from offramp.report.text import p_text

SUMMARY = "summary.csv"


def write_scale(result: ScaleResult, out: Path) -> None:
    """Write table.md, summary.csv, figure.png and report.html, each whole or not at all."""
    save_png(ratios(result), out / "figure.png")
    files = {
        "table.md": markdown(result),
        SUMMARY: summary_csv(result),
        "report.html": page(result),
    }
    for name, content in files.items():
        with replacing(out / name) as aside:
            aside.write_text(content, encoding="utf-8", newline="\n")


def page(result: ScaleResult) -> str:
    """One self-contained page: the answers and the plot; folded, the tables."""
    environment, javascript = page_environment()
    return environment.get_template("study.html.jinja").render(
        content=result,
        conclusions=result.answers,
        how=how(result),
        tables=scale_tables(result),
        figures=[labelled_figure(partial(ratios, result))],
        files=[SUMMARY],
        vega=javascript,
        version=result.offramp_version,
    )


def markdown(result: ScaleResult) -> str:
    """The question, the answers, how the figures were obtained, and the tables."""
    lines = [f"# Study: {result.study}", "", result.question, ""]
    lines += [f"- {answer}" for answer in result.answers]
    lines += ["", how(result), ""]
    for table in scale_tables(result):
        lines += [*markdown_table(table, 2), ""]
    return "\n".join(lines)


def how(result: ScaleResult) -> str:
    """How the figures were obtained, in words."""
    seeds = len(result.seeds)
    return (
        f"Text: {result.text['corpus']}; {result.text['split']}, its first "
        f"{result.test_tokens:,} tokens; {seeds} {'seed' if seeds == 1 else 'seeds'}. The sizes "
        "differ in width; training tokens grow as the parameters of the blocks do, and so do the "
        "steps that fit exits and gates after training, which static models do not have. Larger "
        "models therefore train for more steps and read the text more often (Epochs), and this "
        "study cannot tell that from their size. "
        "The learning rate is the same for all. The early-exit model is the recipe of the study "
        "recipe-exact: complete exits after layers 1 and 2 of 6, routed by confidence "
        f'{result.confidence} with missing_kv = "{result.missing_kv}". Static: shallower models '
        "without exits of the same width, trained on the same tokens; their log PPL is "
        f"interpolated between depths at {result.compared_at:g}% of the FLOPs of the standard "
        "model of the same width. Thresholds are chosen on held-out training text. In brackets: "
        "95% bootstrap interval over seeds and stretches of the text, too narrow with few seeds. "
        "p: paired t test on the seeds' log ratios, without a correction for the number of sizes. "
        "The fit: ordinary least squares of the log ratio on the log of the parameters, a point "
        "for each size and seed, with intervals by Student's t. They count the spread of the "
        "seeds about a straight line, one spread for all sizes, not that the line may bend."
    )


def scale_tables(result: ScaleResult) -> list[Table]:
    """The sizes, and the fitted line."""
    return [_sizes(result), *([_fit(result)] if result.fit else [])]


def _sizes(result: ScaleResult) -> Table:
    at = f"{result.compared_at:g}%"
    titles = (
        *("Parameters", "Width", "Training tokens", "Tokens a parameter", "Epochs"),
        *(f"Static PPL at {at}", f"Early-exit PPL at {at}", "to static", "p"),
        *("Standard PPL at 100%", f"early exit at {at} to standard"),
    )
    return Table(
        title=f"The sizes, at {at} of FLOPs",
        header=tuple(Column(title=title, kind="number") for title in titles),
        rows=tuple(_row(size) for size in result.sizes),
    )


def _row(size: Size) -> tuple[str, ...]:
    return (
        *(f"{size.parameters:,}", str(size.width), f"{size.train_tokens:,}"),
        *(f"{size.tokens_per_parameter:.2f}", f"{size.epochs:.2f}"),
        *(spread_text(size.static_ppl), spread_text(size.ppl)),
        *(_ratio(size.to_static), p_text(size.to_static.p_value)),
        *(spread_text(size.standard_ppl), _ratio(size.to_standard)),
    )


def _ratio(ratio: Ratio) -> str:
    return str(ratio) if ratio.interval is None else f"{ratio} [{_bounds(ratio.interval, ', ')}]"


def _fit(result: ScaleResult) -> Table:
    assert result.fit is not None
    largest = max(size.parameters for size in result.sizes)
    shown = [at for at in result.fit.curve if at.parameters in _shown(result)]
    return Table(
        title="The fitted line: ratio of the early-exit model's PPL to that of static models",
        header=(
            Column(title="Parameters", kind="number"),
            Column(title="Ratio", kind="number"),
            Column(title="95% interval of the line", kind="number"),
            Column(title="95% interval for one more seed", kind="number"),
            Column(title="What it is"),
        ),
        rows=tuple(
            (
                millions(at.parameters),
                f"{at.ratio:.3f}",
                _bounds(at.interval),
                _bounds(at.prediction),
                "extrapolation" if at.parameters > largest else "fit",
            )
            for at in shown
        ),
    )


def _shown(result: ScaleResult) -> set[float]:
    """Numbers of parameters of the table of the fitted line: the sizes, and the extrapolation."""
    assert result.fit is not None
    sizes = {float(size.parameters) for size in result.sizes}
    return {*sizes, result.fit.extrapolated.parameters}


def _bounds(interval: tuple[float, float] | None, between: str = " to ") -> str:
    return DASH if interval is None else between.join(f"{end:.3f}" for end in interval)


def summary_csv(result: ScaleResult) -> str:
    """Return a line for each size and seed; a cell that is not known is empty."""
    header = (
        *("parameters", "width", "layers", "train_tokens", "epochs", "seed", "flops_pct"),
        *("ppl", "static_ppl", "standard_ppl", "to_static", "to_standard"),
    )
    rows = [
        (
            *(size.parameters, size.width, size.layers, size.train_tokens, size.epochs),
            *(seed, result.compared_at, *found),
        )
        for size in result.sizes
        for seed, *found in zip(result.seeds, *_columns(size), strict=True)
    ]
    return written(header, rows)


def _columns(size: Size) -> Sequence[Sequence[float | None]]:
    spreads = (size.ppl, size.static_ppl, size.standard_ppl, size.to_static, size.to_standard)
    return [spread.values for spread in spreads]
