"""offramp bench."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from offramp.cli.base import (
    UNTRAINED,
    Base,
    Bos,
    Device,
    Dtype,
    Exits,
    Model,
    Out,
    Threads,
    check_out_file,
    console,
    open_for,
    output,
    say,
    say_verdict,
    use,
)
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.llama_process import check_gguf
from offramp.errors import ConfigError
from offramp.files import write_json
from offramp.models.native.schemes import SCHEMES


def bench(
    model: Model,
    config: Annotated[BenchConfig | None, Parameter(name="*")] = None,
    *,
    corpus: str = "python-docs",
    out: Out = None,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype | None = None,
) -> None:
    """Time decoding with exits, at full depth, and by transformers and llama.cpp, in one run.

    Parameters
    ----------
    corpus
        The text of the prompts and of PPL: pangram, python-docs, hf:DATASET, or a text file or
        folder; its test split if it has named splits.
    dtype
        Precision of the model (default: float32), and of what is not quantised in int8 and int4.
    """
    check_out_file(out)
    config = config or BenchConfig()
    first = config.weights[0] if config.weights else None
    scheme = next((name for name in SCHEMES if name == first), None)
    if dtype is not None and first is not None and any(set(config.weights) - set(SCHEMES)):
        raise ConfigError(f"dtype: expected none with a precision in --weights, got {dtype}")
    if config.gguf is not None:
        check_gguf(Path(config.gguf))

    from offramp.commands.bench.run import run_bench
    from offramp.report.progress import bars

    use(device, threads)
    precision = dtype or (first if first is not None and scheme is None else "float32")
    opened = open_for(
        model, base=base, exits=exits, bos=bos, device=device, dtype=precision, weights=scheme
    )
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
                config,
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
    """The tables, the verdict, and what was left out."""
    from offramp.report.bench import bench_table, summary_table
    from offramp.report.bench_verdict import bench_verdict

    shown = output()
    shown.print(bench_table(content, width=shown.width))
    if content["summary"]:
        shown.print(summary_table(content, width=shown.width))
    say_verdict(bench_verdict(content))
    for name, why in content["failed"].items():
        say(f"{name} does not run here: {why}")
    if content["untrained"]:
        say(f"{model}: {UNTRAINED}.")
    if content["unfinished"]:
        say(f"Stopped before the end{f'; {out} says so' if out else ''}.")
