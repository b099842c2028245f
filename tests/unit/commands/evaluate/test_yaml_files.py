"""What in the YAML files of tasks runs code, read without running it."""

import pytest

from offramp.commands.evaluate.yaml_files import find_code, yaml_files
from offramp.errors import ConfigError

pytest.importorskip("lm_eval")

PLAIN = "task: own\nmetric_list: [{metric: acc}, {metric: exact_match}]\nwhen: 2026-11-28\n"
CODE = {
    "tag": "process_docs: !function code.run",
    "tag in a list": "a: [1, {b: !function code.run}]",
    "tag of an alias": "a: &x !function code.run\nb: *x",
    "key in quotes": '"cl\\u0061ss": code.Run',
    "nested key": "a: {custom_dataset: x}",
    "unknown metric": "metric_list: [{metric: no_such_metric}]",
    "switch": "unsafe_code: True",
    "switch as a text": "hf_evaluate: 'yes'",
    "pickles": "dataset_path: pandas",
    "script": "dataset_path: ./own.py",
    "prompts": "use_prompt: promptsource:all",
}


def test_data_is_no_code(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(PLAIN + "unsafe_code: false\nbinary: !!binary aGk=\nmerged: {<<: {a: 1}}\n")
    assert find_code(path) is None


@pytest.mark.parametrize("case", CODE)
def test_code_is_found_also_in_an_included_file(tmp_path, case):
    path, including = tmp_path / "base.yaml", tmp_path / "task.yaml"
    path.write_text(f"{PLAIN}{CODE[case]}\n")
    including.write_text("include: base.yaml\ntask: other\n")
    assert find_code(path).startswith("base.yaml: ")
    assert find_code(including) == find_code(path)


def test_files_that_include_each_other_end(tmp_path):
    for name, other in (("a.yaml", "b.yaml"), ("b.yaml", "a.yaml")):
        (tmp_path / name).write_text(f"include: [{other}]\ntask: x\n")
    assert find_code(tmp_path / "a.yaml") is None
    assert [path.name for path in yaml_files(tmp_path)] == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize("text", ["a: [", "a: *none", "\x00", "[" * 5_000, "a: b: c"])
def test_what_is_no_yaml_is_a_sentence(tmp_path, text):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected a YAML file"):
        find_code(path)
