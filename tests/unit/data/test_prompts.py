"""Prompts from files, and cut from a text."""

import json

import pytest
import torch

from offramp.data.prompts import cut_prompts, read_prompts
from offramp.errors import CheckpointError, ConfigError, CorpusError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_text_file_has_a_prompt_in_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffThe cat\r\n\n  \nÄ\u2028b {\n".encode())
    assert read_prompts(path) == ["The cat", "Ä\u2028b {"]


def test_json_lines_hold_strings_prompts_and_chats(tmp_path):
    path = tmp_path / "prompts.JSONL"
    lines = ["The cat", {"prompt": "a\nb", "id": 7}, {"messages": [{**CHAT[0], "name": "x"}]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_prompts(path) == ["The cat", "a\nb", (CHAT[0],)]


@pytest.mark.parametrize(
    "line",
    [
        "{", "7", "null", "[]", '""', "{}", '{"prompt": ""}', '{"prompt": 3}', '{"messages": []}',
        '{"messages": [{"role": "user"}]}', '{"messages": ["x"]}', '"\\ud800"', "[" * 5000,
        '{"prompt": "a", "prompt": "b"}', "NaN",
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"ok"\n{line}\n')
    with pytest.raises(CorpusError, match=r"prompts\.jsonl, line 2: expected"):
        read_prompts(path)


def test_a_broken_line_is_shown_with_the_place_of_the_mistake(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"ok"\n{"prompt": "x"\n')
    said = r"""line 2: expected JSON, got '\{"prompt": "x"': Expecting .* at character 15$"""
    with pytest.raises(CorpusError, match=said):
        read_prompts(path)


def test_files_without_prompts_are_refused(tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(CorpusError, match="expected at least one prompt"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorpusError, match="expected UTF-8"):
        read_prompts(tmp_path / "bytes.txt")
    with pytest.raises(CheckpointError, match="expected a file"):
        read_prompts(tmp_path)


def test_prompts_are_cut_evenly_from_a_text():
    ids = torch.arange(103)
    every = cut_prompts(ids, tokens=10, first=(500,))
    assert len(every) == 10
    assert every[3] == [500, *range(30, 40)]
    assert [each[0] for each in cut_prompts(ids, tokens=10, first=(), at_most=3)] == [0, 40, 90]
    with pytest.raises(CorpusError, match="expected at least 200 tokens"):
        cut_prompts(ids, tokens=200, first=())
    with pytest.raises(ConfigError, match="prompt_tokens"):
        cut_prompts(ids, tokens=0, first=())
