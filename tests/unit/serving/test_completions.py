"""/v1/completions and /v1/chat/completions of a tiny model: each answer is that of generate."""

import json

import pytest

from offramp.commands.generate import generate
from offramp.generation.config import GenerateConfig

PROMPT = "the quick brown "
MODES = [
    {},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 1.1, "top_p": 0.8, "seed": 2**63 - 1},
    {"threshold": 0.1},
    {"threshold": [0.2, 0.05], "missing_kv": "recompute"},
    {"threshold": 0.5, "confidence": "margin"},
    {"speculative": True},
    {"speculative": True, "draft_exit": 2, "temperature": 0.7, "seed": 1},
    {"stop": ["o"]},
    {"stop": " ", "max_tokens": 30},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.5, "seed": 2},
    {"repetition_penalty": 100, "threshold": [0.3, 0.05], "missing_kv": "recompute"},
    {"temperature": 1e-300, "top_p": 5e-324, "seed": 9, "threshold": 0.1},
    {"threshold": 0.2, "decay": 4.0, "confidence": "margin"},
    {"stop_token_ids": [3, 5], "max_tokens": 40, "temperature": 1.5, "seed": 11},
    {"speculative": True, "draft_threshold": 0.01, "max_drafts": 2, "stop": ["fo", "x"]},
    {"speculative": True, "temperature": 1.3, "top_k": 4, "repetition_penalty": 1.2, "seed": 3},
]


def events(response):
    """The chunks of a stream, which ends as it must."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def alone(opened, prompt, body, *, chat=False):
    names = {
        "max_tokens": "max_new_tokens",
        "stop": "stop_strings",
        "stop_token_ids": "stop_tokens",
    }
    options = {names.get(name, name): value for name, value in body.items()}
    if "stop_strings" in options:
        stop = options["stop_strings"]
        options["stop_strings"] = (stop,) if isinstance(stop, str) else tuple(stop)
    for name in ("threshold", "stop_tokens"):
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    found = generate(opened, prompt, GenerateConfig(**options), chat=chat)
    assert found.text is not None
    return found


def ids_of(tokens, *, drafts=False):
    return [(token["id"], drafts or token["exit_layer"]) for token in tokens]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_streamed_and_whole_answers_are_those_of_generate(client, opened, mode):
    body = {"max_tokens": 20, **mode}
    expected = alone(opened, PROMPT, body)
    drafts = "speculative" in mode  # how many depends on measured times; the text does not
    tokens = [(token.id, drafts or token.exit_layer) for token in expected.completion.tokens]

    whole = client.post("/v1/completions", json={"prompt": PROMPT, **body}).json()
    [choice] = whole["choices"]
    assert choice["text"] == expected.completion.text
    reason = "length" if expected.completion.finish_reason == "length" else "stop"
    assert choice["finish_reason"] == reason
    assert ids_of(whole["offramp"]["tokens"], drafts=drafts) == tokens
    assert whole["usage"]["prompt_tokens"] == len(PROMPT)
    assert whole["usage"]["completion_tokens"] == len(tokens)

    chunks = events(client.post("/v1/completions", json={"prompt": PROMPT, **body, "stream": True}))
    streamed = [token for chunk in chunks for token in chunk["offramp"]["tokens"]]
    assert ids_of(streamed, drafts=drafts) == tokens
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.completion.text
    *others, last = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert (set(others), last) == ({None}, reason)
    timed = ("tokens_per_s", "seconds_to_first_token", "acceptance_rate")
    figures = [chunks[-1]["offramp"] | {"tokens": []}, whole["offramp"] | {"tokens": []}]
    if not drafts:
        assert strip(figures[0], timed) == strip(figures[1], timed)
        assert figures[0]["mean_layers"] == pytest.approx(expected.mean_layers)
    assert figures[0]["missing_kv"] == expected.missing_kv
    assert chunks[-1]["offramp"]["tokens"] == []


def strip(figures, names):
    return {name: value for name, value in figures.items() if name not in names}


def test_chat_is_generate_with_the_template(client, opened):
    message = {"role": "user", "content": "13 dogs"}
    expected = alone(opened, "13 dogs", {"max_tokens": 12}, chat=True)
    body = {"messages": [message], "max_completion_tokens": 12}
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["object"] == "chat.completion"
    said = whole["choices"][0]["message"]
    assert (said["role"], said["content"]) == ("assistant", expected.completion.text)
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == expected.completion.text
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_conversation_and_parts_of_text(client):
    parts = [{"type": "text", "text": text} for text in ("over ", "13")]
    messages = [
        {"role": "system", "content": "the fox"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "dogs"},
        {"role": "user", "content": "", "name": "x"},
    ]
    found = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    said = "system the fox.user over 13.assistant dogs.user ."
    assert found.json()["usage"]["prompt_tokens"] == len(said)


def test_several_prompts_and_token_ids(client, opened):
    ids = opened.tokenizer.encode(PROMPT).ids
    each = [
        client.post("/v1/completions", json={"prompt": one, "max_tokens": 8}).json()
        for one in (PROMPT, "13 lazy", ids)
    ]
    texts = [found["choices"][0]["text"] for found in each]
    assert texts[0] == texts[2]
    both = client.post("/v1/completions", json={"prompt": [PROMPT, "13 lazy"], "max_tokens": 8})
    content = both.json()
    assert [choice["text"] for choice in content["choices"]] == texts[:2]
    assert [choice["index"] for choice in content["choices"]] == [0, 1]
    own = [choice["offramp"]["tokens"] for choice in content["choices"]]
    assert [ids_of(tokens) for tokens in own] == [
        ids_of(found["offramp"]["tokens"]) for found in each[:2]
    ]
    assert content["usage"]["completion_tokens"] == 16
    body = {"prompt": [ids, ids[:4]], "max_tokens": 8, "stream": True}
    chunks = events(client.post("/v1/completions", json=body))
    first = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == 0]
    assert "".join(first) == texts[0]


def test_usage_comes_last_in_a_stream_if_it_is_wanted(client):
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    assert all("usage" not in chunk for chunk in events(client.post("/v1/completions", json=body)))
    body["stream_options"] = {"include_usage": True}
    last = events(client.post("/v1/completions", json=body))[-1]
    usage = {"prompt_tokens": 16, "completion_tokens": 3, "total_tokens": 19}
    assert (last["choices"], last["usage"]) == ([], usage)


def test_log_probabilities_are_those_of_the_logits_where_a_token_left(client):
    body = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 3}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"] == [0, 1, 2, 3, 4, 5]
    for token, own, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert len(top) == 3
        assert top[token] == own == max(top.values())  # greedy
    none = client.post("/v1/completions", json={**body, "logprobs": None}).json()
    assert none["choices"][0]["logprobs"] is None
    assert none["choices"][0]["text"] == choice["text"]


@pytest.mark.parametrize("mode", [{}, {"threshold": 0.1}, {"speculative": True}], ids=str)
def test_log_probabilities_in_a_chat(client, mode):
    body = {"messages": [{"role": "user", "content": "13"}], "max_tokens": 5, "logprobs": True}
    body |= {"top_logprobs": 2, **mode}
    [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 5
    for token in content:
        assert token["top_logprobs"][0]["logprob"] == token["logprob"] <= 0
        assert token["bytes"] == list(token["token"].encode())
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [each for part in parts if part for each in part["content"]] == content


def test_a_text_that_fills_its_slot_ends_there(client):
    body = {"prompt": "x" * 60}
    found = client.post("/v1/completions", json=body).json()
    assert found["usage"]["completion_tokens"] == 5  # 64 - 60, and the last needs no place
    assert found["choices"][0]["finish_reason"] == "length"


def test_the_model_is_described(client, opened):
    [model] = client.get("/v1/models").json()["data"]
    about = model["offramp"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "offramp")
    assert (about["num_layers"], about["exit_layers"]) == (4, [1, 2, 4])
    assert set(about["flops_pct"]) == {"1", "2", "4"}
    assert about["flops_pct"]["1"] < about["flops_pct"]["2"] < about["flops_pct"]["4"]
    assert about["default_confidence"] == "max_prob"
    assert "gain" not in about["confidences"]
    assert (about["max_tokens"], about["chat"], about["certificate"]) == (48, True, None)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/other").status_code == 404


def test_metrics_count_tokens_exits_and_times(client):
    def value(name):
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = value("offramp_tokens_total"), value("offramp_exits_total")
    body = {"prompt": PROMPT, "max_tokens": 9, "threshold": 0.0}
    client.post("/v1/completions", json=body)
    assert value("offramp_tokens_total") - before[0] == 9
    assert value("offramp_exits_total") - before[1] == 9
    assert value('offramp_exits_total{exit_layer="1"}') >= 8
    assert value("offramp_first_token_seconds_count") >= 1
    assert value('offramp_requests_total{outcome="done"}') >= 1
    assert value("offramp_requests_running") == value("offramp_requests_waiting") == 0
