"""A study's tables, from its result."""

from collections.abc import Iterator, Sequence
from math import sqrt

from offramp.report.study_result import Ratio, Row, Spread, StudyResult, TestedRatio
from offramp.report.tables import Column, Table
from offramp.report.text import p_phrase, p_text

DASH = "–"


def study_tables(result: StudyResult) -> list[Table]:
    """The exits, a table of routed figures for each measure and convention, the static models."""
    routed = [_routed_table(result, *family) for family in result.families]
    found = [search_table(result), frontier_table(result)] if result.search else []
    return [*found, _exit_table(result), *routed, _static_table(result)]


def search_table(result: StudyResult) -> Table:
    """What ``offramp recipe`` tried and chose."""
    budget = f"{result.compared_at:g}%"
    header = (
        Column(title="Question", short="Question"),
        Column(title="Recipe", short="Recipe"),
        Column(title=f"Held-out PPL at {budget} of FLOPs", short=f"PPL at {budget}", kind="number"),
        Column(title="Chosen", short="Chosen"),
    )
    search = result.search or ()
    rows = tuple(
        (tried.question, tried.label, _number(tried.held_out_ppl), "yes" if tried.chosen else "")
        for tried in search
    )
    chosen = next((tried for tried in reversed(search) if tried.chosen), None)
    verdict = (
        f"No recipe has a policy that keeps {budget} of FLOPs."
        if chosen is None
        else f"The search chose: {chosen.label}; held-out PPL {_number(chosen.held_out_ppl)}."
    )
    return Table(
        title="The search, on held-out training text",
        header=header,
        rows=rows,
        notes=("A dash: no policy of that recipe keeps the budget.", verdict),
    )


def frontier_table(result: StudyResult) -> Table:
    """The PPL of the recipe that ``offramp recipe`` found, at each cost, and how certain it is."""
    row = result.rows[0]
    header = (
        Column(title="FLOPs%", short="FLOPs%", kind="number"),
        Column(title="Compute%", short="Compute%", kind="number", dropped=2),
        Column(title="PPL", short="PPL", kind="number"),
        Column(title="95% interval", short="95% interval", kind="number", dropped=1),
        Column(title="to static models of equal cost", short="to static", kind="number"),
        Column(title="to the standard model at 100%", short="to standard", kind="number"),
    )
    rows = tuple(
        (
            f"{point:g}",
            _number(row.compute_pct_at[point], 1),
            spread_text(ppl),
            DASH if ppl.interval is None else " to ".join(f"{end:.3f}" for end in ppl.interval),
            _ratio(row.ratio_to_static_at[point]),
            _ratio(row.ratio_to_standard_at[point]),
        )
        for point, ppl in row.ppl_at.items()
    )
    title = f'The recipe with confidence {row.confidence}, missing_kv = "{row.missing_kv}"'
    return Table(title=title, header=header, rows=rows, notes=(_verdict(result, row),))


def _verdict(result: StudyResult, row: Row) -> str:
    """The outcome at the cost that the study compares at, in a sentence."""
    ratio = row.to_static
    place = f"At {result.compared_at:g}% of FLOPs"
    if ratio.mean is None:
        return f"{place} there is nothing to compare."
    change = 100 * (ratio.mean - 1)
    return (
        f"{place} the recipe's PPL is {abs(change):.1f}% {'higher' if change > 0 else 'lower'} "
        f"than that of static models of equal cost ({p_phrase(ratio.p_holm)})."
    )


def _exit_table(result: StudyResult) -> Table:
    baseline = any(row.final_to_baseline for row in result.rows)
    header = [
        Column(title="Recipe"),
        Column(title="Loss weights"),
        Column(title="Exit PPL", kind="number"),
        Column(title="Last layer's PPL", kind="number"),
        Column(title="to standard", kind="number"),
        Column(title="p", kind="number"),
    ]
    if baseline:
        header += [Column(title="to baseline", kind="number"), Column(title="p", kind="number")]
    rows = []
    for row in result.family(*result.families[0]):
        tested = [row.final_to_standard, *([row.final_to_baseline] if baseline else [])]
        exits = " / ".join(f"{layer}: {spread_text(ppl)}" for layer, ppl in early_exits(row))
        cells = [row.label, row.loss_weights, exits, spread_text(row.final_ppl)]
        rows.append((*cells, *(cell for ratio in tested for cell in _tested(ratio))))
    return Table(title="The exits and the last layer", header=tuple(header), rows=tuple(rows))


def _routed_table(result: StudyResult, confidence: str, missing_kv: str) -> Table:
    compared = result.compared_at
    points = list(result.rows[0].ppl_at)
    header = [
        Column(title="Recipe"),
        *(Column(title=f"PPL at {point:g}%", kind="number") for point in points),
        Column(title=f"Compute% at {compared:g}%", kind="number"),
        Column(title=f"to static at {compared:g}%", kind="number"),
        Column(title="p", kind="number"),
        Column(title="area to static", kind="number"),
        Column(title="to standard at 100%", kind="number"),
    ]
    rows = tuple(
        (
            row.label if row.missing_kv == missing_kv else f"{row.label} ({row.missing_kv})",
            *(spread_text(row.ppl_at[point]) for point in points),
            _number(row.compute_pct_at[compared], 1),
            *_tested(row.to_static),
            _ratio(row.area),
            _ratio(row.ratio_to_standard_at[compared]),
        )
        for row in result.family(confidence, missing_kv)
    )
    title = f'Routed with confidence {confidence}, missing_kv = "{missing_kv}", at shares of FLOPs%'
    notes = (
        f"To standard at 100%: the recipe at {compared:g}% of FLOPs divided by the standard model. "
        f"Area: mean log PPL from {result.area[0]:g} to {result.area[1]:g}% of FLOPs.",
    )
    return Table(title=title, header=tuple(header), rows=rows, notes=notes)


def _static_table(result: StudyResult) -> Table:
    shared = any(source is not None for _, source in result.static_kinds)
    header = (
        Column(title="Layers", kind="number"),
        *((Column(title="Keys and values"),) if shared else ()),
        Column(title="Compute%", kind="number"),
        Column(title="FLOPs%", kind="number"),
        Column(title="PPL", kind="number"),
    )
    rows = tuple(
        (
            str(layers),
            *((_keys_and_values(source),) if shared else ()),
            _number(models[0].compute_pct, 1),
            _number(models[0].flops_pct, 1),
            spread_text(_spread([model.ppl for model in models])),
        )
        for (layers, source), models in result.static_kinds.items()
    )
    return Table(title="Static models", header=header, rows=rows)


def _keys_and_values(source: int | None) -> str:
    return "of each layer" if source is None else f"shared from layer {source}"


def early_exits(row: Row) -> list[tuple[int, Spread]]:
    """(layer, PPL) of the exits below the last layer."""
    return sorted(row.exit_ppl.items())[:-1]


def spread_text(spread: Spread) -> str:
    """Mean ± standard deviation; a dash where no PPL is known."""
    if spread.std is None:
        return _number(spread.mean)
    return f"{_number(spread.mean)} ± {_number(spread.std)}"


def _tested(ratio: TestedRatio | None) -> Iterator[str]:
    yield DASH if ratio is None else _ratio(ratio)
    yield p_text(None if ratio is None else ratio.p_holm)


def _ratio(ratio: Ratio) -> str:
    if ratio.interval is None:
        return _number(ratio.mean)
    low, high = ratio.interval
    return f"{_number(ratio.mean)} [{_number(low)}, {_number(high)}]"


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _spread(values: Sequence[float]) -> Spread:
    mean = sum(values) / len(values)
    std = None
    if len(values) > 1:
        std = sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Spread(mean=mean, std=std, values=tuple(values))
