"""offramp recipe."""

from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from offramp.cli.app import FLAGS
from offramp.cli.base import console, output, say
from offramp.cli.config_file import write_config_file
from offramp.cli.interrupts import work_begins
from offramp.cli.study import Where, say_answers, say_how_to_continue
from offramp.models.native.config import DecoderConfig
from offramp.studies.study.config import RecipeConfig
from offramp.training.config import TrainConfig

if TYPE_CHECKING:
    from offramp.studies.study.run import StudyRun

FILE = "recipe.toml"


def recipe(
    config: Annotated[RecipeConfig, Parameter(name="*")],
    *,
    out: Path,
    where: Annotated[Where | None, Parameter(name="*")] = None,
) -> None:
    """Find the best recipe for a corpus at a budget of FLOPs, and measure it.

    A search of short runs chooses by the PPL under the cache that decodes, on held-out training
    text. The recipe that it finds is trained in full with several seeds, compared with static
    models, and reported on the test text.

    Parameters
    ----------
    out
        Folder for recipe.toml (for offramp train --config), study.json, the report and the runs;
        the same command continues a search that was stopped.
    """
    from offramp.report.progress import StudyBars, bars
    from offramp.report.study_tables import frontier_table, search_table
    from offramp.report.tables import terminal_table
    from offramp.studies.study.recipe import find_recipe

    workers = (where or Where()).workers(out)
    work_begins()
    with bars(console) as drawn, say_how_to_continue(out):
        run, result = find_recipe(config, out, watcher=StudyBars(drawn, say), workers=workers)
    write_config_file(out / FILE, flags_of(run, config))
    shown = output()
    for table in (search_table(result), frontier_table(result)):
        shown.print(terminal_table("recipe", table, shown.width))
    say_answers(result)
    toml = (out / FILE).read_text(encoding="utf-8")
    output().print(toml, highlight=False, markup=False, soft_wrap=True)
    retrain = f"offramp train --config {quote(str(out / FILE))} --out MODEL"
    if run.specialise is not None:
        added = ",".join(map(str, run.specialise.add_exits))
        retrain += (
            f", then offramp specialise MODEL --corpus {quote(config.corpus)} --compute-budget "
            f"{run.specialise.compute_budget:g}{added and f' --add-exits {added}'} "
            "--out SPECIALISED"
        )
    say(
        f"A model of this recipe is in {workers.folder / run.name}. Train another one with: "
        f"{retrain}. The report: {out / 'report.html'}"
    )


def flags_of(run: "StudyRun", config: RecipeConfig) -> dict[str, object]:
    """The flags of ``offramp train`` for the recipe's model and training, defaults left out.

    ``train`` splits the corpus its own way: the run that the report is about is in the runs.
    """
    flags: dict[str, object] = {"corpus": config.corpus, "tokenizer": config.tokenizer}
    for mine, usual in ((run.model, DecoderConfig()), (run.training, TrainConfig())):
        for field in fields(usual):
            value = getattr(mine, field.name)
            if field.name != "vocab_size" and value not in (None, getattr(usual, field.name)):
                flags[FLAGS.get(field.name, field.name.replace("_", "-"))] = value
    return flags
