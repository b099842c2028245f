from cyclopts.help import HelpEntry, HelpPanel

from offramp.cli.app import COMMANDS, app
from offramp.cli.help_groups import FEW, GROUPS, split

WORDS = [f"--{flag}" for flags in GROUPS.values() for flag in flags.split()]
REST = [f"--other-{number}" for number in range(FEW)]


def flags_of(command):
    arguments = app[command].assemble_argument_collection(default_parameter=app.default_parameter)
    return {
        name for argument in arguments if argument.parse for name in argument.names if name != "*"
    }


def parts(flags):
    entries = [HelpEntry(positive_names=(flag,)) for flag in flags]
    panel = HelpPanel(format="parameter", title="Parameters", entries=entries)
    return {
        part.title: [name for entry in part.entries for name in entry.positive_names]
        for part in split(panel)
    }


def test_a_short_page_is_one_list():
    assert parts(["--dim", "--layers"]) == {"Parameters": ["--dim", "--layers"]}


def test_flags_of_a_long_page_are_grouped_and_a_group_of_one_is_none():
    grouped = parts(["--dim", *REST, "--layers", "--top-k"])
    assert grouped == {"Parameters": [*REST, "--top-k"], "Model": ["--dim", "--layers"]}


def test_a_flag_of_two_groups_is_in_the_one_with_more_flags():
    sampling = ["--seed", "--temperature", "--top-k"]
    assert parts([*REST, *sampling, "--lr"])["Sampling"] == sampling
    training = ["--seed", "--lr", "--steps"]
    assert parts([*REST, *training, "--top-k"])["Optimisation"] == training


def test_every_flag_of_train_but_its_files_has_a_group():
    files = {"--corpus", "--out", "--tokenizer", "--resume", "--config"}
    positive = {flag for flag in flags_of("train") if not flag.startswith("--no-")}
    assert positive - files <= set(WORDS)


def test_every_grouped_flag_is_one_of_some_command():
    assert set(WORDS) <= set().union(*(flags_of(command) for command in COMMANDS)) | {
        "--max-drafts",
        "--adaptive",
    }
