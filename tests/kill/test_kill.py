"""A command that is killed at any moment leaves whole files, and the same command goes on.

``make kill`` runs these tests: each command is killed before and in the middle of its file
operations, and at random moments. After each kill

- every file with a final name is whole;
- the same command, or ``offramp train --resume``, ends as one that was never killed, or says in
  one sentence what to do, and doing that works;
- no temporary file is left then.

KILLS is the number of kills; with fewer than some 420, the operations of each command are a sample
of all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KILLS = int(os.environ.get("KILLS", "300"))
TEXT = "".join(
    f"{number} quick brown foxes jump over {number * 7 % 31} lazy dogs. " for number in range(120)
)
CORPUS = ["--corpus", "text.txt"]
TRAIN = ["train", *CORPUS, "--layers", "2", "--dim", "16", "--heads", "2", "--exits", "1"]
TRAIN += ["--steps", "4", "--seq-len", "16", "--batch-size", "4", "--tracker", "none"]
TRAIN += ["--eval-every", "2", "--checkpoint-every", "2", "--out", "model"]
TUNE = ["tune", "base", *CORPUS, "--exits", "1", "--seq-len", "16", "--epochs", "1"]
TUNE += ["--tokens", "400", "--out", "tuned"]
FIT = ["confidence", "tuned", *CORPUS, "--fit", "text.txt", "--out", "measures.json"]
RECIPE = ["recipe", *CORPUS, "--layers", "2", "--dim", "32", "--tokens", "384", "--seeds", "1"]
RECIPE += ["--compute-budget", "95", "--out", "study"]
VOLATILE = {"environment", "seconds", "tokens_per_s", "command", "out"}


def command(arguments: list[str]) -> Callable[[], None]:
    def run() -> None:
        from offramp.cli import main

        main([*arguments])

    return run


def begin() -> None:
    Path("text.txt").write_text(TEXT)


def make_base() -> None:
    """A tiny Llama, as save_pretrained leaves it."""
    import torch
    import transformers

    from offramp.data import make_tokenizer

    begin()
    tokenizer = make_tokenizer("characters", [TEXT])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("base")
    tokenizer.save("base/tokenizer.json")


def make_task() -> None:
    """A task of lm-evaluation-harness with two documents."""
    Path("task.jsonl").write_text(2 * '{"text": "7 quick brown", "words": [" foxes", " dogs"]}\n')
    Path("task.yaml").write_text(
        "{task: own, dataset_path: json, dataset_kwargs: {data_files: {test: task.jsonl}}, "
        "test_split: test, output_type: multiple_choice, doc_to_text: text, "
        "doc_to_choice: words, doc_to_target: 0}"
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command to kill."""

    before: list[Callable[[], None]]
    "What was done before it."
    arguments: list[str]
    outcome: Callable[[Path], object]
    "What the finished command leaves; the same after every kill."
    out: str
    opens: str | None = None
    "A model folder that opens after every kill."
    weight: int = 1
    "Its part of the kills."
    folders: list[str] = field(default_factory=list)
    "Folders that hold no temporary file in the end."


def tensors(folder: Path) -> dict[str, str]:
    """Hashes of the tensors in a folder; the bytes of a header may have any order."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            for name, value in load_file(path).items():
                where = f"{path.relative_to(folder)} {name}"
                found[where] = hashlib.sha256(value.tobytes()).hexdigest()
    return found


def figures(*names: str) -> Callable[[Path], object]:
    def read(root: Path) -> object:
        return [without(json.loads((root / name).read_text()), VOLATILE) for name in names]

    return read


def without(content: object, names: set[str]) -> object:
    if isinstance(content, dict):
        return {key: without(value, names) for key, value in content.items() if key not in names}
    if isinstance(content, list):
        return [without(value, names) for value in content]
    return content


TUNED = [make_base, command(TUNE)]
CASES = {
    "train": Case(
        before=[begin],
        arguments=TRAIN,
        outcome=lambda root: (
            tensors(root / "model"),
            (root / "model" / "metrics.csv").read_text().splitlines()[0],
        ),
        out="model",
        weight=8,
    ),
    "train --steps": Case(
        before=[begin, command(TRAIN)],
        arguments=["train", "--resume", "model", "--steps", "6"],
        outcome=lambda root: (tensors(root / "model"), (root / "model" / "run.json").exists()),
        out="model",
        weight=5,
        opens="model",
    ),
    "tune": Case(
        before=[make_base],
        arguments=TUNE,
        outcome=lambda root: tensors(root / "tuned"),
        out="tuned",
    ),
    "tune --unfreeze": Case(
        before=[make_base],
        arguments=[*TUNE, "--unfreeze"],
        outcome=lambda root: tensors(root / "tuned"),
        out="tuned",
        weight=2,
    ),
    "tune --kv-source": Case(
        before=[make_base],
        arguments=[*TUNE, "--kv-source", "1"],
        outcome=lambda root: tensors(root / "tuned"),
        out="tuned",
    ),
    "confidence --fit": Case(
        before=TUNED,
        arguments=FIT,
        outcome=lambda root: (tensors(root / "tuned"), figures("measures.json")(root)),
        out="measures.json",
        weight=2,
        opens="tuned",
        folders=["tuned"],
    ),
    "confidence --fit again": Case(
        before=[*TUNED, command(FIT), lambda: Path("text.txt").write_text(TEXT[::-1])],
        arguments=FIT,
        outcome=lambda root: (tensors(root / "tuned"), figures("measures.json")(root)),
        out="measures.json",
        opens="tuned",
        folders=["tuned"],
    ),
    "specialise": Case(
        before=[begin, command(TRAIN)],
        arguments=["specialise", "model", *CORPUS, "--compute-budget", "95", "--out", "special"],
        outcome=lambda root: tensors(root / "special"),
        out="special",
        weight=2,
        opens="model",
    ),
    "quantise": Case(
        before=TUNED,
        arguments=["quantise", "tuned", "--weights", "int4", "--out", "small"],
        outcome=lambda root: tensors(root / "small"),
        out="small",
        opens="tuned",
    ),
    "card": Case(
        before=TUNED,
        arguments=["card", "tuned", "--out", "card.md"],
        outcome=lambda root: (root / "card.md").read_text(),
        out="card.md",
        opens="tuned",
    ),
    "export": Case(
        before=[make_base],
        arguments=["export", "base", "--exit", "1", "--out", "short"],
        outcome=lambda root: tensors(root / "short"),
        out="short",
    ),
    "calibrate": Case(
        before=TUNED,
        arguments=["calibrate", "tuned", *CORPUS, "--epsilon", "0.5", "--out", "c.json"],
        outcome=figures("c.json"),
        out="c.json",
        opens="tuned",
    ),
    "evaluate": Case(
        before=[*TUNED, make_task],
        arguments=[
            "evaluate",
            "tuned",
            "--tasks",
            "task.yaml",
            "--threshold",
            "1",
            "--out",
            "e.json",
        ],
        outcome=figures("e.json"),
        out="e.json",
        opens="tuned",
    ),
    "study": Case(
        before=[begin],
        arguments=["study", "objectives", *CORPUS, "--out", "study"],
        outcome=lambda root: (root / "study" / "study.json").read_text(),
        out="study",
        weight=3,
        folders=["study/runs"],
    ),
    "recipe": Case(
        before=[begin],
        arguments=RECIPE,
        outcome=lambda root: (
            (root / "study" / "study.json").read_text(),
            (root / "study" / "recipe.toml").read_text(),
        ),
        out="study",
        folders=["study/runs"],
    ),
    "reproduce": Case(
        before=[begin],
        arguments=["reproduce", "--corpus", "pangram", "--seeds", "1", "--out", "seed"],
        outcome=figures("seed/results.json"),
        out="seed",
        folders=["seed/runs/pangram"],
    ),
}


def check_whole(root: Path) -> None:
    """In a child: every file with a final name is readable."""
    import numpy as np

    from offramp.files import read_tensors
    from offramp.reading import read_json
    from offramp.training.metrics_file import read_rows

    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file():
            continue
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            read_tensors(path)
        elif path.suffix in (".npz", ".npy"):
            np.load(path, allow_pickle=False)
        elif path.suffix == ".csv":
            read_rows(path)
        elif path.suffix == ".png":
            assert path.read_bytes() == b"\x89PNG", path
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path


def left_behind(root: Path, case: Case) -> list[str]:
    places = [root, root / case.out, *(root / folder for folder in case.folders)]
    places += (root / "model").glob("checkpoints")
    return [
        str(path.relative_to(root))
        for place in places
        if place.is_dir()
        for path in place.iterdir()
        if path.name.startswith(".")
    ]


def recover(children, case: Case) -> None:
    """Do what a user does after a kill, until the command has ended well."""
    unfinished = case.arguments[0] == "train" and (children.root / "model/unfinished.json").exists()
    arguments = ["train", "--resume", "model"] if unfinished else case.arguments
    again = children.run(command(arguments))
    if again.code == 0:
        return
    assert again.code == 2, again.text[-2000:]
    out = children.root / case.out
    if "finished; --steps N extends it" in again.sentence or "steps that the run has" in again.text:
        return
    assert "choose another --out, or remove it first" in again.sentence, again.sentence
    shutil.rmtree(out)
    again = children.run(command(case.arguments))
    assert again.code == 0, again.text[-2000:]


def check_after_kill(children, case: Case, expected: object) -> None:
    root = children.root
    whole = children.run(lambda: check_whole(root))
    assert whole.code == 0, whole.text[-1500:]
    if case.opens:
        opened = children.run(command(["probe", case.opens, *CORPUS, "--tokens", "100"]))
        assert opened.code == 0, opened.text[-1500:]
    recover(children, case)
    assert case.outcome(root) == expected
    assert left_behind(root, case) == []


@pytest.fixture(params=CASES)
def prepared(request, children) -> tuple[Case, Path, object]:
    """A command, the folder that it begins in, and what it leaves if it isn't killed."""
    case = CASES[request.param]
    children.reset(None)
    for step in case.before:
        ended = children.run(step)
        assert ended.code == 0, ended.text[-2000:]
    template = children.root.with_name("template")
    shutil.rmtree(template, ignore_errors=True)
    shutil.copytree(children.root, template, symlinks=True)
    ended = children.run(command(case.arguments))
    assert ended.code == 0, ended.text[-2000:]
    return case, template, (case.outcome(children.root), ended.points, ended.seconds)


def share(case: Case) -> int:
    return max(2, KILLS * case.weight // sum(each.weight for each in CASES.values()))


def test_a_killed_command_leaves_whole_files_and_goes_on(prepared, children, chance):
    case, template, (expected, points, seconds) = prepared
    kills = share(case)
    random_kills = max(1, kills // 5)
    chosen = list(range(len(points)))
    if len(chosen) > kills - random_kills:
        chosen = sorted(chance.sample(chosen, kills - random_kills))
    print(f"\n{len(points)} points in {seconds:.1f} s; {len(chosen)} + {random_kills} kills")
    failures = []
    moments = [("point", point) for point in chosen]
    moments += [("after_seconds", chance.uniform(0, seconds)) for _ in range(random_kills)]
    for kind, moment in moments:
        children.reset(template)
        ended = children.run(command(case.arguments), **{kind: moment})
        assert ended.code in (0, -9), ended.text[-2000:]
        try:
            check_after_kill(children, case, expected)
        except AssertionError as error:
            where = points[moment] if kind == "point" else f"after {moment:.2f} s"
            failures.append(f"killed {where}: {str(error)[:1500]}")
    assert not failures, "\n\n".join(failures[:5]) + f"\n({len(failures)} failures)"
