"""offramp generate, as it is typed."""

import io
import json

import pytest

PROMPT = "The quick brown"
PROMISE = (PROMPT, "--audit", "1", "--keep-promise")


def generate(offramp, model, *arguments):
    result = offramp("generate", model, PROMPT, "--max-new-tokens", 12, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def continued(result):
    """The new text: what follows the prompt on standard output."""
    assert result.stdout.startswith(PROMPT)
    assert result.stdout.endswith("\n")
    return result.stdout.removeprefix(PROMPT).removesuffix("\n")


def test_it_streams_text_and_ends_with_figures(offramp, trained):
    result = generate(offramp, trained)
    assert len(continued(result)) == 12
    assert "tokens/s" in result.stderr
    assert "mean layers 4.0 of 4" in result.stderr


def test_json_holds_every_token(offramp, trained):
    content = json.loads(generate(offramp, trained, "--json").stdout)
    assert content["text"] == continued(generate(offramp, trained))
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


def test_an_audit_changes_no_text_and_goes_on_in_its_log(offramp, trained, tmp_path):
    log = tmp_path / "audit.json"
    exits = ("--threshold", 0.2)
    audit = ("--audit", 1, "--audit-log", log)
    alone = json.loads(generate(offramp, trained, *exits, "--json").stdout)
    first = generate(offramp, trained, *exits, *audit, "--json")
    content = json.loads(first.stdout)
    assert content["tokens"] == alone["tokens"]
    assert content["audit"]["tokens"] == 12
    left = sum(token["exit_layer"] < 4 for token in alone["tokens"])
    assert content["audit"]["audited"] == content["audit"]["tokens_left"] == left > 0
    assert f"Audit: {left} of the {left} tokens that exited" in first.stderr
    again = json.loads(generate(offramp, trained, *exits, *audit, "--json").stdout)
    assert again["audit"]["tokens"] == 24
    log.write_text("{}")
    refused = offramp("generate", trained, PROMPT, *exits, *audit)
    assert refused.returncode == 2
    assert "format: expected 1 or 2 of an audit" in refused.stderr
    assert log.read_text() == "{}"


def test_a_promise_is_kept_and_goes_on_in_its_log(offramp, trained, tmp_path):
    log = tmp_path / "audit.json"
    flags = ("--threshold", 0.2, "--audit", 1, "--audit-log", log, "--keep-promise", 0.5, "--json")
    left = []
    for _ in range(4):
        result = generate(offramp, trained, *flags)
        content = json.loads(result.stdout)
        left.append(sum(token["exit_layer"] < 4 for token in content["tokens"]))
        assert content["audit"]["disagreement"]["upper"] <= 0.5
    assert content["audit"]["promise"]["epsilon"] == 0.5
    assert content["audit"]["tokens"] == 48
    assert left[0] < left[-1]
    assert "Promise: on average at most 50% of all new tokens" in result.stderr
    assert "The promise is disagreement of at most 0.5: the bound is" in result.stderr
    stored = log.read_text()
    for change in (("--keep-promise", 0.4), ("--promise-risk", "nll-gap"), ("--keep-promise", "x")):
        refused = offramp("generate", trained, PROMPT, *flags, *change)
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()) == 1
        assert log.read_text() == stored


def test_a_promise_by_untrained_exits_is_refused(offramp, checkpoint, tmp_path):
    log = tmp_path / "audit.json"
    flags = ("--exits", 2, "--threshold", 0.5, "--audit", 1, "--keep-promise", 0.1)
    refused = offramp("generate", checkpoint, PROMPT, *flags, "--audit-log", log)
    assert refused.returncode == 2
    assert "keep_promise: expected a model with trained exits, got" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not log.exists()
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    served = offramp("serve", checkpoint, "--exits", 2, "--port", 0, *flags[4:])
    assert served.returncode == 2
    assert "keep_promise: expected a model with trained exits, got" in served.stderr
    assert len(served.stderr.strip().splitlines()) == 1


def test_speculative_output_is_that_of_full_depth(offramp, trained):
    speculative = json.loads(generate(offramp, trained, "--speculative", "--json").stdout)
    assert speculative["text"] == json.loads(generate(offramp, trained, "--json").stdout)["text"]


def test_seeds_decide_what_is_drawn(offramp, trained):
    def drawn(seed):
        return generate(offramp, trained, "--temperature", 1.5, "--seed", seed).stdout

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_a_stop_string_ends_the_text(offramp, trained):
    whole = continued(generate(offramp, trained))
    stopped = continued(generate(offramp, trained, "--stop", whole[3:5]))
    assert stopped == whole[: whole.index(whole[3:5])]


@pytest.mark.parametrize("prompt", ["The quick", "- The", "--threshold"])
def test_a_prompt_may_come_from_standard_input_or_begin_with_a_dash(
    offramp, trained, monkeypatch, prompt
):
    flags = ("--max-new-tokens", 4, "--threshold", "-1:0.5", "--json")
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    read = offramp("generate", trained, "-", *flags)
    assert read.returncode == 0, read.stderr
    if prompt == "--threshold":
        return
    typed = offramp("generate", trained, prompt, *flags)
    assert typed.returncode == 0, typed.stderr
    assert json.loads(read.stdout)["text"] == json.loads(typed.stdout)["text"]


def test_drafting_has_flags(offramp, trained):
    flags = ("--speculative", "--max-drafts", 3, "--no-adaptive", "--lookup", 0, "--json")
    drafted = json.loads(generate(offramp, trained, *flags).stdout)
    assert drafted["acceptance_rate"] is not None
    assert drafted["text"] == json.loads(generate(offramp, trained, "--json").stdout)["text"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([PROMPT, "--audit", "0.1"], "audit: expected a threshold"),
        ([PROMPT, "--audit", "0", "--threshold", "0.5"], "audit: expected a share above 0"),
        ([PROMPT, "--audit", "nan", "--threshold", "0.5"], "audit: expected a share above 0"),
        ([PROMPT, "--audit-log", "x.json", "--threshold", "0.5"], "audit_log: expected --audit"),
        (
            [PROMPT, "--audit", "1", "--threshold", "0.5", "--audit-log", "/"],
            "expected the name of a file",
        ),
        ([PROMPT, "--keep-promise", "0.1", "--threshold", "0.5"], "keep_promise: expected --audit"),
        ([*PROMISE, "0", "--threshold", "0.5"], "keep_promise: expected a number between 0 and 1"),
        (
            [*PROMISE, "nan", "--threshold", "0.5"],
            "keep_promise: expected a number between 0 and 1",
        ),
        ([*PROMISE, "0.1", "--speculative"], "audit: expected a threshold"),
        ([PROMPT, "--audit", "1", "--promise-risk", "nll-gap"], "promise_risk: expected keep"),
        (("",), "prompt: expected at least 1 token, got none"),
        (("x" * 5000,), "prompt: expected at most"),
        (("The", "--max-new-tokens", "0"), "max_new_tokens: expected at least 1, got 0"),
        (("The", "--stop-token", "<nothing>"), "stop_token: expected a token of the model"),
        (("The", "--threshold", "x"), "threshold: expected a number"),
        (("The", "--threshold", "0.5:0.5:0.5"), "thresholds: expected 2"),
        (("The", "--confidence", "gate", "--threshold", "0.5"), "gate"),
        (("The", "--confidence", "", "--threshold", "0.5"), "confidence: expected one of"),
        (("The", "--speculative", "--draft-exit", "3"), "draft_exit: expected one of the exits"),
        (("The", "--speculative", "--threshold", "0.5"), "threshold: expected none with"),
        (("The", "--decay", "4"), "decay: expected a threshold too, got only decay 4"),
        (("The", "--chat"), "chat: expected a model with a chat template"),
        (("The", "--temperature", "-1"), "temperature: expected at least 0"),
    ],
)
def test_bad_input_is_one_sentence(offramp, trained, arguments, said):
    result = offramp("generate", trained, *arguments)
    assert result.returncode == 2, result.stdout
    assert said.replace("_", "-") in result.stderr.replace("_", "-")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_says_once_where_rounding_may_change_the_text(
    offramp, checkpoint, tmp_path, dtype
):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    flags = ("--dtype", dtype, "--speculative", "--max-new-tokens", 8, "--json")
    result = offramp("generate", tmp_path, "quick", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the text may differ from that without drafts") == (
        dtype == "bfloat16"
    )
    assert json.loads(result.stdout)["lossless"] == (dtype == "float32")
