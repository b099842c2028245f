"""Code from a checkpoint never runs, whatever the user answers; a chat template is only a text."""

import ast
import io
import json
import shutil
import tomllib
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import offramp
from offramp.cli import main
from offramp.errors import OfframpError

SOURCE = Path(offramp.__file__).parent
LOADERS = ("from_pretrained", "from_config", "pipeline", "load_dataset_builder")
RUNS_CODE = ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "torch.hub.load")
OURS = ("from_pretrained(", "Tokenizer.from_pretrained(", "library.PeftModel.from_pretrained(")
"""Ours, one that reads only JSON, and one that reads JSON and safetensors into a given model."""


def calls():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func)


def test_every_call_of_a_loader_forbids_code_of_the_checkpoint():
    found = 0
    for path, node, name in calls():
        if name.rpartition(".")[2] not in LOADERS or f"{name}(" in OURS:
            continue
        found += 1
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert given.get("trust_remote_code") == "False", f"{path.name}:{node.lineno} {name}"
    assert found >= 8


def test_datasets_is_of_a_version_that_runs_no_code_of_a_dataset():
    """From version 4 on it has no loading scripts."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "datasets>=4" in project["project"]["optional-dependencies"]["hf"]


def test_nothing_in_the_source_loads_a_pickle_or_trusts_a_checkpoint():
    for path, node, name in calls():
        assert name not in (*RUNS_CODE, "eval", "exec"), f"{path.name}:{node.lineno} {name}"
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert given.get("allow_pickle", "False") == "False", f"{path.name}:{node.lineno}"
        assert given.get("trust_remote_code", "False") == "False", f"{path.name}:{node.lineno}"


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Run a command in this process; gives its exit code, its output and its messages."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def hostile(checkpoint, tmp_path):
    """A checkpoint whose own code creates a file when it is imported."""
    folder = tmp_path / "hostile"
    shutil.copytree(checkpoint, folder)
    marker = tmp_path / "it ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass X:\n    pass\nY = Z = X\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.X", "AutoModelForCausalLM": "own.Y"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Z", "auto_map": {"AutoTokenizer": ["own.Z", "own.Z"]}})
    )
    return folder, marker


@pytest.mark.parametrize("unknown", [False, True], ids=["a llama", "a kind of its own"])
@pytest.mark.parametrize("tokenizer", [True, False], ids=["tokenizer.json", "no tokenizer.json"])
def test_a_checkpoints_code_does_not_run_in_any_command(
    hostile, tokenizer, unknown, cli, monkeypatch, tmp_path
):
    folder, marker = hostile
    text = folder / "text.txt"
    if not tokenizer:
        (folder / "tokenizer.json").unlink()
    if unknown:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    for arguments in (
        ("sweep", folder, "--corpus", text),
        ("generate", folder, "7 quick", "--chat", "--max-new-tokens", 2),
        ("probe", folder, "--corpus", text, "--tokens", 64),
        ("tune", folder, "--corpus", text, "--tokens", 64, "--out", tmp_path / "tuned"),
        ("export", folder, "--exit", 2, "--out", tmp_path / "short"),
        ("train", "--corpus", text, "--tokenizer", folder, "--steps", 1, "--out", tmp_path / "t"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
        code, _, stderr = cli(*arguments)
        assert not marker.exists(), arguments
        assert code in (0, 2), stderr
        assert "Traceback" not in stderr
        if arguments[0] in ("sweep", "probe", "tune") and not tokenizer:
            assert code == 2
            assert len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "expected a model with a chat template"),
        ("{{ raise_exception('roles must alternate') }}", "got: roles must alternate"),
        ("{{ messages[7].content }}", "got: "),
        ("{% for %}", "got: "),
        ("{{ 'a' * 10 ** 14 }}", "got: MemoryError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "got: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "got: maximum recursion"),
        ("{% for i in range(10 ** 12) %}a{% endfor %}", "got: Range too big"),
    ],
)
def test_a_chat_template_that_fails_is_one_sentence_with_its_cause(checkpoint, template, said):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    )
    tokenizer.chat_template = template
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(OfframpError, match=r"^chat: expected") as error:
        offramp.load(model, tokenizer=tokenizer).generate("7 quick", chat=True)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
