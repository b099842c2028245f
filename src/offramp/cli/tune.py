"""offramp tune."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.base import Bos, Device, Dtype, Threads, console, output, say, say_verdict, use
from offramp.commands.tune_config import TuneConfig


def tune(
    model: str,
    *,
    corpus: str,
    out: Path,
    tuning: Annotated[TuneConfig | None, Parameter(name="*")] = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """Give a pretrained model exits and train them.

    Its backbone stays as it is, unless --unfreeze or --kv-source is given.

    Parameters
    ----------
    model
        A Hugging Face checkpoint (a folder, or a name on the hub), or smollm2-135m; with
        --kv-source one that the native decoder runs, or a model of offramp train.
    corpus
        The text: python-docs, hf:DATASET, or a text file or folder. It is read whole, or its
        training split where it has named ones; one token in 20, at the end, is held out.
    out
        Folder for the exits; with --unfreeze or --kv-source for the whole model.
    """
    import torch

    from offramp.commands.tune import open_for_tuning
    from offramp.commands.tune import tune as run_tune
    from offramp.report.progress import bars
    from offramp.report.tune import shared_verdict, tune_table, tune_verdict
    from offramp.training.frozen import TuneProgress

    use(device, threads)
    with bars(console) as drawn:

        def on_progress(progress: TuneProgress) -> None:
            doing = progress.doing
            if doing in ("fit", "states", "sample"):
                drawn.show(doing, done=progress.done, total=progress.total, text="tokens")
            elif doing == "gates":
                drawn.show(doing, done=progress.done, total=progress.total, text="fitted")
            elif progress.done % 10 == 0 or progress.done == progress.total:
                text = "" if progress.loss is None else f"loss {float(progress.loss):.3f}"
                drawn.show(doing, done=progress.done, total=progress.total, text=text)

        config = tuning or TuneConfig()
        opened = open_for_tuning(model, config, device=device, dtype=getattr(torch, dtype))
        opened = opened.with_bos(bos)
        trained = run_tune(opened, corpus, out, config, on_progress=on_progress)
    if trained["after"]:
        shown = output()
        shown.print(tune_table(trained, width=shown.width))
        say_verdict(tune_verdict(trained))
        if trained["kv_source"] is not None:
            say_verdict(shared_verdict(trained))
    if trained["fitted_gates"]:
        say(
            f"Gates for gain and gate were fitted to {trained['fitted_gates']['tokens']:,} tokens; "
            "generate, sweep and calibrate decide by gain unless --confidence names a measure."
        )
    whole = trained["unfreeze"] or trained["kv_source"] is not None
    say(
        f"{quote(str(out))} holds the {'model' if whole else 'exits'}. "
        f"Next: offramp probe {quote(str(out))} --corpus OTHER_TEXT"
    )
