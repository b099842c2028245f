"""offramp evaluate: tasks of lm-evaluation-harness from local files, with exits on."""

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest

from offramp import load
from offramp.errors import ConfigError, OfframpError
from offramp.report.charts import chart_of

pytest.importorskip("lm_eval")

SENTENCE = "the quick brown fox jumps over the lazy dog. "
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
LETTER = CHOICE.replace("task: choice", "task: letter").replace("choice.jsonl", "letter.jsonl")
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "fox"
generation_kwargs: {until: [".", "dog"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: both
task: [choice, writing]
aggregate_metric_list: [{metric: acc, aggregation: mean}]
"""
TRAINED_PREFIX = ("--prefix-token", "text: ")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks; what datasets keeps of them is kept beside it."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "context": (2 * SENTENCE)[place : place + 30],
            "choices": [(2 * SENTENCE)[place + 30 : place + 36], "dogdog", "xyzxyz"],
            "label": 0,
        }
        for place in range(12)
    ]
    letters = [
        {**row, "context": row["context"].strip(), "choices": [each[:1] for each in row["choices"]]}
        for row in rows
    ]
    for name, content in (("choice", rows), ("letter", letters)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines)
    for name, text in {
        "choice": CHOICE,
        "letter": LETTER,
        "rolling": ROLLING,
        "writing": WRITING,
        "both": GROUP,
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        yield folder


@pytest.fixture
def evaluate(offramp, trained, tasks):
    def run(*arguments, path=tasks):
        return offramp("evaluate", trained, "--tasks-path", path, *arguments)

    return run


def refused(result, *expected):
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    sentence = result.stderr.splitlines()[-1]
    for part in ("offramp: ", *expected):
        assert part in sentence, result.stderr


def test_a_task_at_full_depth(evaluate, tmp_path):
    out = tmp_path / "out.json"
    result = evaluate("--tasks", "choice", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    [row] = json.loads(out.read_text())["evaluations"]
    assert (row["task"], row["method"], row["missing_kv"]) == ("choice", "full", None)
    assert (row["mean_layers"], row["flops_pct"]) == (4.0, pytest.approx(100))
    assert row["metrics"]["acc"] > 0.5
    assert row["documents"] == 12
    assert f"{row['metrics']['acc']:.4f} ± {row['stderr']['acc']:.4f}" in result.stdout
    assert len(result.stdout.splitlines()) < 12


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
def test_all_kinds_of_requests_exit_early(evaluate, tmp_path, missing_kv):
    out = tmp_path / "out.json"
    result = evaluate(
        *("--tasks", "choice,rolling,writing", *TRAINED_PREFIX, "--out", out),
        *("--threshold", 0.3, "--confidence", "max_prob", "--missing-kv", missing_kv),
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["evaluations"]
    assert {row["task"] for row in rows} == {"choice", "rolling", "writing"}
    for row in rows:
        assert (row["method"], row["missing_kv"]) == ("exit@0.3", missing_kv)
        assert 1 < row["mean_layers"] < 4
        assert row["tokens"] > 0
        assert row["tokens_per_s"] > 0


def test_the_cost_of_generated_texts_is_that_of_generate(evaluate, trained, tasks, tmp_path):
    lm, out = load(trained), tmp_path / "out.json"
    documents = [json.loads(line) for line in (tasks / "choice.jsonl").read_text().splitlines()]
    for missing_kv in ("propagate", "recompute"):
        options = ("--threshold", 0.3, "--confidence", "max_prob", "--missing-kv", missing_kv)
        assert evaluate("--tasks", "writing", *options, "--out", out).returncode == 0
        [row] = json.loads(out.read_text())["evaluations"]
        layers = tokens = 0
        for document in documents:
            made = lm.generate(
                document["context"],
                threshold=0.3,
                confidence="max_prob",
                missing_kv=missing_kv,
                max_new_tokens=6,
                stop_strings=(".", "dog"),
            )
            assert made.text is not None
            tokens += len(made.completion.tokens)
            layers += made.mean_layers * len(made.completion.tokens)
        assert (row["tokens"], row["mean_layers"]) == (tokens, pytest.approx(layers / tokens))


def test_compare_puts_full_depth_thresholds_and_static_models_side_by_side(
    evaluate, offramp, trained, tasks, tmp_path
):
    out, short, alone = tmp_path / "out.json", tmp_path / "short", tmp_path / "alone.json"
    result = evaluate(
        *("--tasks", "both", "--compare", "--thresholds", "0.3,0.9", "--static", "2"),
        *("--confidence", "max_prob", "--out", out),
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["evaluations"]
    assert [row["method"] for row in rows if row["task"] == "choice"] == [
        *("full", "exit@0.3", "exit@0.9", "static@2")
    ]
    assert {row["task"] for row in rows} == {"choice", "writing", "both"}
    [group] = [row for row in rows if (row["task"], row["method"]) == ("both", "exit@0.3")]
    parts = [row for row in rows if row["method"] == "exit@0.3" and row["task"] != "both"]
    assert group["tokens"] == sum(row["tokens"] for row in parts)
    assert offramp("export", trained, "--exit", 2, "--out", short).returncode == 0
    assert (
        offramp(
            *("evaluate", short, "--tasks-path", tasks, "--tasks", "both", "--out", alone)
        ).returncode
        == 0
    )
    exported = json.loads(alone.read_text())["evaluations"]
    static = [row for row in rows if row["method"] == "static@2"]
    for one, other in zip(static, exported, strict=True):
        assert (one["task"], one["metrics"]) == (other["task"], other["metrics"])
        assert one["mean_layers"] == 2
        assert 20 < one["flops_pct"] < 80
    assert "standard error" in result.stdout.splitlines()[-1]
    chart = chart_of(json.loads(out.read_text())).to_dict()
    assert len(chart["vconcat"]) == 3


def test_a_choice_of_one_token_is_that_of_full_depth(evaluate):
    result = evaluate("--tasks", "letter", "--threshold", 0.1, "--confidence", "max_prob")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("No token left early")


def test_the_thresholds_of_a_certificate(evaluate, offramp, trained, tmp_path):
    certificate, out = tmp_path / "c.json", tmp_path / "out.json"
    made = offramp(
        *("calibrate", trained, "--corpus", "pangram", "--compute-budget", 70),
        *("--confidence", "max_prob", "--out", certificate),
    )
    assert made.returncode == 0, made.stderr
    result = evaluate("--tasks", "choice", "--certificate", certificate, "--out", out)
    assert result.returncode == 0, result.stderr
    [row] = json.loads(out.read_text())["evaluations"]
    assert len(row["threshold"]) == 2
    refused(
        evaluate("--tasks", "choice", "--certificate", certificate, "--threshold", 1),
        "threshold: expected none with --certificate",
    )


BAD = {
    "unknown task": (["--tasks", "choise"], "perhaps choice"),
    "no task": (["--tasks", ""], "tasks: expected names of tasks"),
    "limit": (["--tasks", "choice", "--limit", "0"], "limit: expected a number above 0"),
    "limit of 1.5": (["--tasks", "choice", "--limit", "1.5"], "limit: expected a whole number"),
    "batch": (["--tasks", "choice", "--batch-size", "0"], "batch_size: expected at least 1"),
    "gates": (["--tasks", "choice", "--threshold", "0.9", "--confidence", "gain"], "gain"),
    "several": (["--tasks", "choice", "--thresholds", "0.9"], "expected none without compare"),
    "static": (["--tasks", "choice", "--static", "2"], "static: expected none without compare"),
    "no exit": (["--tasks", "choice", "--compare", "--static", "3"], "static: expected exits"),
    "prefix": (["--tasks", "rolling"], "prefix_token: expected a token for texts without a con"),
    "bad prefix": (["--tasks", "rolling", "--prefix-token", "xx"], "prefix_token: expected a tok"),
    "max length": (["--tasks", "choice", "--max-length", "999999"], "max_length: expected from 2"),
    "too long": (["--tasks", "choice", "--max-length", "3"], "continuations of at most 3 tokens"),
    "no room": (["--tasks", "writing", "--max-length", "6"], "max_gen_toks below 6"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_a_sentence(evaluate, case):
    arguments, expected = BAD[case]
    refused(evaluate(*arguments), expected)


FILES = {
    "no YAML": ("task: [", "expected a YAML file"),
    "not UTF-8": (b"\xff\xfe\x00", "expected a YAML file"),
    "a list": ("- 1\n- 2\n", "expected a YAML file of a task"),
    "function": (CHOICE + "process_docs: !function code.run\n", "!function; --trust-task-code"),
    "class": ("task: own\nclass: !function code.Run\n", "class; --trust-task-code"),
    "python tag": (CHOICE + "x: !!python/object/apply:os.system ['true']\n", "--trust-task-code"),
    "pickle": (CHOICE.replace("path: json", "path: pandas"), "dataset_path 'pandas'"),
    "evaluate": (CHOICE.replace("metric: acc,", "metric: ./code,"), "--trust-task-code"),
    "unsafe": (CHOICE + "unsafe_code: true\n", "unsafe_code; --trust-task-code"),
    "no data": (CHOICE.replace("choice.jsonl", "none.jsonl"), "choice: expected a task that"),
    "no split": (CHOICE.replace("split: test", "split: other"), "choice: expected a task that"),
    "template": (CHOICE.replace("{{context}}", "{{ nothing }}"), "choice: expected a task that"),
    "sandbox": (
        CHOICE.replace("{{context}}", "{{ cycler.__init__.__globals__.os.mkdir('made') }}"),
        "choice: expected a task that",
    ),
    "option": (WRITING.replace("until:", "num_beams: 4, until:"), "got 'num_beams'"),
    "until": (WRITING.replace('[".", "dog"]', "{a: 1}"), "until: expected a string or a list"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_a_sentence_and_runs_no_code(evaluate, tasks, tmp_path, monkeypatch, case):
    text, expected = FILES[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own" / "task.yaml"
    path.parent.mkdir()
    (path.parent / "code.py").write_text("import os\nos.mkdir('made')\n")
    for name in ("choice.jsonl",):
        (path.parent / name).write_text((tasks / name).read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(evaluate("--tasks", path, path=path), expected)
    assert not (tmp_path / "made").exists()


def test_a_missing_place_is_a_sentence(evaluate, tmp_path):
    refused(evaluate("--tasks", "choice", path=tmp_path / "none"), "tasks_path: expected a YAML")
    refused(evaluate("--tasks", "choice", path=tmp_path), "tasks_path: expected a YAML")
    os.mkfifo(tmp_path / "pipe.yaml")
    refused(evaluate("--tasks", "choice", path=tmp_path), "expected a file, got a pipe")


def test_code_of_tasks_runs_if_it_is_trusted(evaluate, tasks, tmp_path):
    path = tmp_path / "task.yaml"
    (tmp_path / "shorter.py").write_text("def run(docs):\n    return docs.select(range(5))\n")
    (tmp_path / "choice.jsonl").write_text((tasks / "choice.jsonl").read_text())
    path.write_text(CHOICE + "process_docs: !function shorter.run\n")
    refused(evaluate("--tasks", "choice", path=path), "task.yaml: !function")
    out = tmp_path / "out.json"
    result = evaluate("--tasks", "choice", "--trust-task-code", "--out", out, path=path)
    assert result.returncode == 0, result.stderr
    assert json.loads(out.read_text())["evaluations"][0]["documents"] == 5


def test_documents_that_must_be_fetched_without_a_network_are_a_sentence(
    evaluate, tmp_path, monkeypatch
):
    monkeypatch.setattr("offramp.commands.evaluate.tasks.hub_reachable", lambda: False)
    refused(evaluate("--tasks", "hellaswag"), "hellaswag: ", "hub cannot be reached")
    path = tmp_path / "task.yaml"
    path.write_text(CHOICE.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    refused(evaluate("--tasks", "choice", path=path), "hub cannot be reached")


def test_the_missing_extra_is_named(evaluate, monkeypatch):
    monkeypatch.setattr(
        "offramp.commands.evaluate.library.importlib.util.find_spec",
        lambda name, package=None: None,
    )
    refused(evaluate("--tasks", "choice"), "pip install 'offramp[eval]'")


def test_the_limit_and_the_examples_of_a_question(evaluate, tmp_path):
    out = tmp_path / "out.json"
    result = evaluate("--tasks", "choice", "--limit", 3, "--num-fewshot", 2, "--out", out)
    assert result.returncode == 0, result.stderr
    [row] = json.loads(out.read_text())["evaluations"]
    assert (row["documents"], row["num_fewshot"]) == (3, 2)
    assert row["context_tokens"] > 3 * 3 * 3 * 30


def test_the_harness_itself_runs_the_model_under_its_name(trained, tasks, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import offramp.lm_eval  # noqa: F401

    monkeypatch.chdir(tasks)
    arguments = f"pretrained={trained},threshold=0.3,confidence=max_prob,missing_kv=propagate"
    found = lm_eval.simple_evaluate(
        "offramp",
        arguments,
        tasks=["choice"],
        batch_size="4",
        device="cuda:0",  # which the harness's command line asks for by default
        task_manager=TaskManager(include_defaults=False, include_path="."),
        bootstrap_iters=10,
    )
    figures = found["config"]["offramp"]
    assert figures["missing_kv"] == "propagate"
    assert 1 < figures["tasks"]["choice"]["mean_layers"] < 4
    assert {"hf", "offramp"} <= set(lm_eval.api.registry.model_registry)
    with pytest.raises(ConfigError, match="model_args: expected pretrained, threshold"):
        lm_eval.simple_evaluate("offramp", f"pretrained={trained},peft=x", tasks=["choice"])


TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}. {% endfor %}"


def test_the_harness_runs_a_model_without_trained_exits_at_full_depth(checkpoint, tasks):
    """Its exits are no news there, so that nothing warns of them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import offramp.lm_eval  # noqa: F401

    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tasks)
        found = lm_eval.simple_evaluate(
            "offramp",
            f"pretrained={checkpoint},prefix_token_id=0",
            tasks=["choice"],
            limit=1,
            task_manager=manager,
            bootstrap_iters=0,
        )
    assert found["config"]["offramp"]["tasks"]["choice"]["mean_layers"] == 4


def test_questions_in_the_models_chat_template(evaluate, offramp, trained, tasks, tmp_path):
    refused(
        evaluate("--tasks", "choice", "--apply-chat-template"),
        "chat: expected a model with a chat template",
    )
    model, out = shutil.copytree(trained, tmp_path / "model"), tmp_path / "out.json"
    about = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    read = []
    for more in ((), ("--apply-chat-template",), ("--system-instruction", "jump. ")):
        result = offramp(
            *("evaluate", model, "--tasks-path", tasks, "--tasks", "choice", "--limit", 2),
            *("--out", out, *more),
        )
        assert result.returncode == 0, result.stderr
        read.append(json.loads(out.read_text())["evaluations"][0]["context_tokens"])
    rows = [json.loads(line) for line in (tasks / "choice.jsonl").read_text().splitlines()[:2]]
    contexts = [row["context"] for row in rows for _ in row["choices"]]
    for found, text in zip(read, ("{}", "u {}. ", "jump. {}"), strict=True):
        # spaces at the end of a context belong to the continuation
        assert found == sum(len(text.format(context).rstrip()) for context in contexts)


def test_the_task_among_the_examples(offramp, trained, tasks, tmp_path):
    """Also its script, which makes the documents again where Python's reference is the same."""
    folder, out = Path(__file__).parents[2] / "examples" / "tasks", tmp_path / "out.json"
    result = offramp(
        *("evaluate", trained, "--tasks-path", folder, "--tasks", "python_docs", "--limit", 2),
        *("--compare", "--thresholds", 0.2, "--confidence", "max_prob", "--out", out),
        *("--batch-size", 4),
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["evaluations"]
    assert [row["method"][:6] for row in rows] == ["full", "exit@0", "static"]
    assert all({"acc", "acc_norm"} == set(row["metrics"]) for row in rows)
    script = runpy.run_path(str(folder / "make_python_docs.py"))
    questions = script["questions"]()
    assert len(questions) == 120
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert question["context"].endswith((".", ")"))


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
def test_a_model_of_transformers_with_adapters_is_compared_too(
    offramp, tasks, checkpoint, tmp_path, missing_kv
):
    """No plain checkpoint can hold the heads of these exits; a static model of them runs."""
    tuned, out = tmp_path / "tuned", tmp_path / "out.json"
    made = offramp(
        *("tune", checkpoint, "--corpus", checkpoint / "text.txt", "--exits", "1,2"),
        *("--seq-len", 32, "--epochs", 1, "--exit-head", "adapter", "--out", tuned),
    )
    assert made.returncode == 0, made.stderr
    result = offramp(
        *("evaluate", tuned, "--tasks-path", tasks, "--tasks", "both", "--compare", "--limit", 3),
        *("--thresholds", 0.5, "--static", 1, "--missing-kv", missing_kv, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["evaluations"]
    assert {row["confidence"] for row in rows if row["method"] == "exit@0.5"} == {"gain"}
    assert {row["mean_layers"] for row in rows if row["method"] == "static@1"} == {1.0}


def test_tasks_from_python(trained, tasks, tmp_path):
    lm = load(trained)
    options = {"tasks_path": tasks, "confidence": "max_prob", "limit": 4}
    table = lm.evaluate("choice,writing", threshold=0.3, missing_kv="recompute", **options)
    assert [(row.task, row.method) for row in table.rows] == [
        ("choice", "exit@0.3"),
        ("writing", "exit@0.3"),
    ]
    assert {row.missing_kv for row in table.rows} == {"recompute"}
    assert "exit@0.3" in repr(table)
    for name in ("table.json", "table.csv", "table.tex"):
        table.save(tmp_path / name)
    assert table.plot().to_dict()["vconcat"]
    assert "metrics_acc" in (tmp_path / "table.csv").read_text()
    compared = lm.evaluate(["choice"], compare=True, thresholds=[0.3], static=2, **options)
    assert [row.method for row in compared.rows] == ["full", "exit@0.3", "static@2"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tasks": []}, "tasks: expected names of tasks"),
        ({"tasks": "choice", "limits": 3}, "limits: expected the name of an option, perhaps limit"),
        ({"tasks": "choice", "limit": "3"}, "limit: expected"),
        ({"tasks": "choice", "thresholds": [0.5]}, "thresholds: expected none without compare"),
        (
            {"tasks": "choice", "missing_kv": "none"},
            "missing_kv: expected 'propagate' or 'recompute'",
        ),
        ({"tasks": "choice", "threshold": float("nan")}, "threshold"),
        ({"tasks": "choice", "certificate": "none.json"}, "none.json: expected a file"),
    ],
)
def test_bad_options_from_python_are_a_sentence(trained, tasks, options, expected):
    with pytest.raises(OfframpError, match=expected):
        load(trained).evaluate(**{"tasks_path": str(tasks), **options})
