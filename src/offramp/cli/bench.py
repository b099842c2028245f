"""offramp bench."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.base import (
    Device,
    Dtype,
    Threads,
    check_out_file,
    console,
    open_for,
    output,
    say,
    use,
)
from offramp.commands.bench.config import BenchConfig
from offramp.files import write_json


def bench(
    model: Path,
    config: Annotated[BenchConfig | None, Parameter(name="*")] = None,
    *,
    corpus: str = "python-docs",
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """Time decoding with exits beside full depth and transformers' own generate, in one run.

    Parameters
    ----------
    model
        A folder that ``offramp train`` or ``offramp tune`` wrote, a Hugging Face checkpoint (a
        folder, or a name on the hub), or smollm2-135m.
    corpus
        Where the prompts come from: pangram, python-docs, hf:DATASET, or a text file or folder
        (its test split where it has named ones).
    out
        Write the figures to this JSON file, too.
    dtype
        Precision of the model.
    """
    from offramp.commands.bench.run import run_bench
    from offramp.report.bench import bench_table, bench_verdict
    from offramp.report.progress import bars

    use(device, threads)
    check_out_file(out)
    with bars(console) as drawn:
        content = run_bench(
            open_for(model, device=device, dtype=dtype),
            corpus,
            config or BenchConfig(),
            on_run=lambda done, total, name: drawn.show("bench", done=done, total=total, text=name),
        )
    out_console = output()
    out_console.print(bench_table(content, width=out_console.width))
    out_console.print(bench_verdict(content), highlight=False, markup=False)
    for name, reason in content["failed"].items():
        say(f"{name} does not run here: {reason}")
    if content["untrained"]:
        say(f"{model}: its exits were never trained.")
    if out:
        write_json(out, content)
