"""offramp confidence."""

from pathlib import Path

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
from offramp.files import write_json


def confidence(
    model: Path,
    *,
    corpus: str,
    measures: tuple[str, ...] = (),
    fit: str | None = None,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """How good each confidence measure is: risk and coverage, AUROC, ECE, and PPL at equal cost.

    Parameters
    ----------
    model
        A folder that ``offramp train`` or ``offramp tune`` wrote, a Hugging Face checkpoint (a
        folder, or a name on the hub), or smollm2-135m.
    corpus
        The text: pangram, python-docs, hf:DATASET, or a text file or folder. It is read
        whole, or its test split where it has named ones.
    measures
        Such as max_prob,entropy,gain (default: all that the model can have).
    fit
        First fit gates and temperatures to this text, which should be another (training text),
        and keep them in the model's folder.
    out
        Write the figures to this JSON file, and the plot beside it as a .png.
    dtype
        Precision of the model.
    """
    from offramp.commands.confidence import fit as fit_exits
    from offramp.commands.confidence import measure_confidence
    from offramp.report.confidence import confidence_table, frontier_table, save_confidence_png
    from offramp.report.progress import bars

    use(device, threads)
    check_out_file(out)
    opened = open_for(model, device=device, dtype="float32" if fit else dtype)
    if fit is not None:
        say(f"{model}: gates and temperatures are fitted to {fit}")
        opened = fit_exits(opened, fit)
    with bars(console) as drawn:
        content = measure_confidence(
            opened,
            corpus,
            measures=measures,
            on_tokens=lambda done, total: drawn.show(
                "trace", done=done, total=total, text="tokens"
            ),
        )
    output().print(confidence_table(content))
    output().print(frontier_table(content))
    warn(model, corpus, content)
    if out:
        write_json(out, content)
        save_confidence_png(content, out.with_suffix(".png"))


def warn(model: Path, corpus: str, content: dict[str, object]) -> None:
    """Say what makes these figures better or worse than they should be."""
    if content.get("seen_in_training"):
        say(f"{corpus}: the model, or its exits, were trained on this text; the figures flatter.")
    if content.get("untrained"):
        say(f"{model}: its exits were never trained.")
    if content.get("unknown_tokens"):
        say(
            f"{content['unknown_tokens']:,} of the tokens are <unk>: characters or words that the "
            "tokenizer does not have."
        )
    if content.get("unfinished"):
        say(f"{model}: its training run is unfinished; this is its best model so far.")
