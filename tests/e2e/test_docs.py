"""The Python blocks of README.md and docs/, and the examples, run without an exception."""

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from offramp.data import make_tokenizer
from offramp.studies.study.plan import Recipe
from offramp.studies.study.studies import STUDIES

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"The {n} quick brown foxes jump over {n * 7 % 31} lazy dogs. " for n in range(900))
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[str]:
    """Yield the Python blocks of a page, moved down so that line numbers are those of the page."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield "\n" * text.count("\n", 0, found.start(1)) + found[1]


PAGES = [
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if list(blocks(page)) and page.parent.name != "ja"  # which has the blocks of the English page
]
EXAMPLES = {
    "train.py": ("corpus.txt", "new"),
    "tune.py": ("HuggingFaceTB/SmolLM2-135M", "corpus.txt", "new"),
    "sweep.py": ("model", "test.txt"),
    "certify.py": ("model", "calibration.txt", "certificate.json"),
    "generate.py": ("model", "The "),
    "bench.py": ("model", "test.txt"),
    "sft.py": ("llama", "corpus.txt", "new"),
    "study.py": ("corpus.txt", "test.txt", "study"),
}


def save_checkpoint(folder: Path, layers: int) -> None:
    """Save a tiny Llama of random parameters with a tokenizer of ``TEXT``'s characters."""
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer("characters", [TEXT])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".").save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def stand_ins(offramp, tmp_path_factory) -> Path:
    """A folder with the files that the pages name, small enough for every block to be fast."""
    folder = tmp_path_factory.mktemp("pages")
    for part, name in enumerate(("corpus.txt", "test.txt", "calibration.txt")):
        (folder / name).write_text(TEXT[part * len(TEXT) // 3 : (part + 1) * len(TEXT) // 3])
    save_checkpoint(folder / "HuggingFaceTB" / "SmolLM2-135M", 24)
    save_checkpoint(folder / "llama", 4)
    made = offramp(
        *("train", "--corpus", folder / "corpus.txt", "--layers", 4, "--dim", 16, "--heads", 2),
        *("--exits", "2", "--steps", 20, "--seq-len", 32, "--batch-size", 8),
        *("--tracker", "none", "--out", folder / "model"),
    )
    assert made.returncode == 0, made.stderr
    made = offramp(
        *("tune", folder / "llama", "--corpus", folder / "corpus.txt", "--exits", "1,2"),
        *("--seq-len", 64, "--epochs", 1, "--out", folder / "tuned"),
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture
def workplace(stand_ins, tmp_path, monkeypatch) -> Path:
    """A copy of the stand-ins as the working folder; the study alpha is a tiny one."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    own = STUDIES["objectives"]
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    tiny = replace(
        own,
        name="alpha",
        tokenizer="characters",
        model=replace(own.model, **shape, exit_layers=(1,)),
        training=replace(own.training, seq_len=16, batch_size=4, warmup_steps=0),
        tokens=1_280,
        test_tokens=200,
        static_layers=(1, 3),
        seeds=2,
        recipes=(Recipe(label="half", training={"loss_weights": "asymmetric:0.5"}),),
    )
    monkeypatch.setitem(STUDIES, "alpha", tiny)
    return tmp_path


OF_TRAINERS = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:.*deprecated and will be removed:FutureWarning",
)
"""What the trainers of transformers and trl warn of on a machine without an accelerator."""


def test_pages_have_blocks():
    assert {"README.md", "docs/python.md"} <= set(PAGES)


@pytest.mark.slow
@OF_TRAINERS
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_one_after_another(page, workplace):
    names = {"__name__": "__main__"}
    for block in blocks(ROOT / page):
        exec(compile(block, ROOT / page, "exec"), names)


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        *EXAMPLES,
        "split_docs.py",  # make demo
    }


@pytest.mark.slow
@OF_TRAINERS
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example, workplace, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [example, *EXAMPLES[example]])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_short_and_uses_public_names(example):
    text = (ROOT / "examples" / example).read_text()
    code = text.split('"""', maxsplit=2)[2]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 17
    assert not re.search(r"from offramp|import offramp\.", code)


@pytest.mark.slow
def test_the_commands_of_the_quickstart_print_what_it_shows(offramp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    commands = re.findall(r"^offramp (.*)$", page, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands[4:]] == ["tune", "generate"]  # of a package
    printed = ""
    for command in commands[:4]:
        outcome = offramp(*shlex.split(command))
        assert outcome.returncode == 0, outcome.stderr
        printed += outcome.stdout
    shown = "The quick brown fox jumps over the lazy dog. The q"
    assert shown in page
    assert printed.count(shown) == 2
    assert "Shallow%" in printed


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (folder := tmp_path / "examples").mkdir()
    notebook = nbformat.read(ROOT / "examples" / "afternoon.ipynb", as_version=4)
    small = "TOKENS, SEEDS = 4_096, 2"
    assert "TOKENS, SEEDS = 65_536, 2" in notebook.cells[1].source
    notebook.cells[1].source = notebook.cells[1].source.replace("TOKENS, SEEDS = 65_536, 2", small)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    out = folder / "afternoon"
    assert "<svg" in (out / "frontier.svg").read_text()
    assert (out / "thresholds.csv").read_text().count("\n") == 5
    assert r"\end{tabular}" in (out / "thresholds.tex").read_text()
    assert "alpha" in (out / "study" / "report.html").read_text()


def outputs(cell: nbformat.NotebookNode) -> list[tuple[str, ...]]:
    """Return the kinds of a cell's outputs, and the text of tables without its numbers.

    What is printed may come in one part or in several, so such parts count once.
    """
    found: list[tuple[str, ...]] = []
    for output in cell.get("outputs", ()):
        kinds = sorted(output.get("data", {}))
        text = output.data["text/plain"] if kinds == ["text/plain"] else ""
        words = re.sub(r"-?[0-9][-+0-9.,e]*|inf|\s+", " ", text).split()
        found.append((output.output_type, *kinds, *words))
    return [kind for kind, _ in groupby(found)]


@pytest.mark.slow
def test_the_tutorial_runs_and_gives_outputs_as_those_that_it_is_kept_with(tmp_path, monkeypatch):
    """A shorter text and fewer steps give other numbers, in the same tables and plots."""
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(ROOT / "examples" / "tutorial.ipynb", as_version=4)
    kept = [outputs(cell) for cell in notebook.cells]
    assert [("execute_result", "image/png", "text/plain")] in kept
    assert "STEPS = 150\n" in notebook.cells[1].source
    notebook.cells[1].source += "\nSTEPS, TEXT = 10, TEXT[:60_000]"
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert [outputs(cell) for cell in notebook.cells] == kept
    assert (tmp_path / "tutorial" / "certificate.json").is_file()
    assert (tmp_path / "tutorial" / "model" / "config.json").is_file()


@pytest.mark.parametrize("name", ["afternoon", "tutorial"])
def test_a_notebook_uses_public_names(name):
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kept_with_outputs = any(cell.outputs or cell.execution_count for cell in code)
    assert kept_with_outputs == (name == "tutorial")
    assert not re.search(r"from offramp|import offramp\.", "\n".join(cell.source for cell in code))
