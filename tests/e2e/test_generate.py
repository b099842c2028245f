"""offramp generate, as it is typed."""

import json

import pytest


def generate(offramp, model, *arguments):
    result = offramp("generate", model, "The quick brown", "--max-new-tokens", 12, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def test_it_streams_text_and_ends_with_figures(offramp, trained):
    result = generate(offramp, trained)
    assert len(result.stdout.strip("\n")) == 12
    assert "tokens/s" in result.stderr
    assert "mean layers 4.0 of 4" in result.stderr


def test_json_holds_every_token(offramp, trained):
    content = json.loads(generate(offramp, trained, "--json").stdout)
    assert content["text"] == generate(offramp, trained).stdout.removesuffix("\n")
    assert len(content["tokens"]) == 12
    assert {token["exit_layer"] for token in content["tokens"]} == {4}
    assert content["mean_layers"] == 4.0


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
def test_exits_save_layers_and_a_threshold_above_one_none(offramp, trained, missing_kv):
    flags = ("--missing-kv", missing_kv, "--json")
    always = json.loads(generate(offramp, trained, "--threshold", "0:0", *flags).stdout)
    assert [token["exit_layer"] for token in always["tokens"]] == [4] + [1] * 11
    never = json.loads(generate(offramp, trained, "--threshold", "1.01", *flags).stdout)
    assert never["text"] == json.loads(generate(offramp, trained, "--json").stdout)["text"]


def test_a_threshold_decays_with_the_new_tokens(offramp, trained):
    def first(*flags):
        return json.loads(generate(offramp, trained, "--json", *flags).stdout)["tokens"][1]

    confidence = first("--threshold", "0")["confidence"]
    assert first("--threshold", confidence)["exit_layer"] == 1
    assert first("--threshold", confidence, "--decay", 4)["exit_layer"] > 1  # 0.1 is added at first


def test_speculative_output_is_that_of_full_depth(offramp, trained):
    speculative = json.loads(generate(offramp, trained, "--speculative", "--json").stdout)
    assert speculative["text"] == json.loads(generate(offramp, trained, "--json").stdout)["text"]


def test_seeds_decide_what_is_drawn(offramp, trained):
    def drawn(seed):
        return generate(offramp, trained, "--temperature", 1.5, "--seed", seed).stdout

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_a_stop_string_ends_the_text(offramp, trained):
    whole = generate(offramp, trained).stdout.removesuffix("\n")
    stopped = generate(offramp, trained, "--stop", whole[3:5]).stdout.removesuffix("\n")
    assert stopped == whole[: whole.index(whole[3:5])]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("",), "prompt: expected at least 1 token, got none"),
        (("x" * 5000,), "prompt: expected at most"),
        (("The", "--max-new-tokens", "0"), "max_new_tokens: expected at least 1, got 0"),
        (("The", "--stop-token", "<nothing>"), "stop_token: expected a token of the model"),
        (("The", "--threshold", "x"), "threshold: expected a number"),
        (("The", "--threshold", "0.5:0.5:0.5"), "thresholds: expected 2"),
        (("The", "--confidence", "gate", "--threshold", "0.5"), "gate"),
        (("The", "--speculative", "--draft-exit", "3"), "draft_exit: expected one of the exits"),
        (("The", "--speculative", "--threshold", "0.5"), "threshold: expected none with"),
        (("The", "--decay", "4"), "decay: expected a threshold with it, got decay 4 alone"),
        (("The", "--chat"), "chat: expected a model with a chat template"),
        (("The", "--temperature", "-1"), "temperature: expected at least 0"),
    ],
)
def test_bad_input_is_one_sentence(offramp, trained, arguments, said):
    result = offramp("generate", trained, *arguments)
    assert result.returncode == 2, result.stdout
    assert said.replace("_", "-") in result.stderr.replace("_", "-")
    assert len(result.stderr.strip().splitlines()) == 1
