"""offramp bench."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from offramp.cli.base import (
    Base,
    Bos,
    Device,
    Dtype,
    Model,
    Out,
    Threads,
    Weights,
    check_out_file,
    console,
    open_for,
    output,
    say,
    say_verdict,
    use,
)
from offramp.commands.bench.config import BenchConfig
from offramp.files import write_json


def bench(
    model: Model,
    config: Annotated[BenchConfig | None, Parameter(name="*")] = None,
    *,
    corpus: str = "python-docs",
    out: Out = None,
    base: Base = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
) -> None:
    """Time decoding with exits, at full depth and by transformers' own generate, in one run.

    Parameters
    ----------
    corpus
        The text of the prompts: pangram, python-docs, hf:DATASET, or a text file or folder; its
        test split if it has named splits.
    """
    check_out_file(out)

    from offramp.commands.bench.run import run_bench
    from offramp.report.progress import bars

    use(device, threads)
    opened = open_for(model, base=base, bos=bos, device=device, dtype=dtype, weights=weights)
    so_far: list[dict[str, Any]] = []

    def keep(content: dict[str, Any]) -> None:
        so_far[:] = [content]
        if out:
            write_json(out, content)

    try:
        with bars(console) as drawn:
            content = run_bench(
                opened,
                corpus,
                config or BenchConfig(),
                on_run=lambda done, total, name: drawn.show(
                    "bench", done=done, total=total, text=name
                ),
                on_round=keep,
            )
    except KeyboardInterrupt:
        for content in so_far:
            _show(content, model, out)
        raise
    if out:
        write_json(out, content)
    _show(content, model, out)


def _show(content: dict[str, Any], model: Path, out: Path | None) -> None:
    """The table, the verdict, and what was left out."""
    from offramp.report.bench import bench_table, bench_verdict

    shown = output()
    shown.print(bench_table(content, width=shown.width))
    say_verdict(bench_verdict(content))
    for name, why in content["failed"].items():
        say(f"{name} does not run here: {why}")
    if content["untrained"]:
        say(f"{model}: its exits were never trained.")
    if content["unfinished"]:
        say(f"Stopped before the end{f'; {out} says so' if out else ''}.")
