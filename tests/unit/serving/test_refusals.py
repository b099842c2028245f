"""What the API refuses: one sentence in OpenAI's error object, whatever comes."""

import pytest

WRONG = [
    ({}, "prompt: expected"),
    ({"prompt": None}, "prompt: expected"),
    ({"prompt": 3}, "prompt: expected"),
    ({"prompt": []}, "prompt: expected"),
    ({"prompt": [1, "x"]}, "prompt: expected"),
    ({"prompt": [[]]}, "prompt: expected"),
    ({"prompt": [True]}, "prompt: expected"),
    ({"prompt": ""}, "prompt: expected at least 1 token"),
    ({"prompt": [999]}, "prompt: expected token ids from 0"),
    ({"prompt": [-1]}, "prompt: expected token ids from 0"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": "x" * 65}, "prompt: expected at most 64 tokens, got 65"),
    ({"prompt": ["x"] * 8}, "prompt: expected at most 7 prompts, got 8"),
    ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
    ({"max_tokens": 49}, "max_tokens: expected at most 48, got 49"),
    ({"max_tokens": "5"}, "max_tokens: expected a whole number"),
    ({"max_tokens": True}, "max_tokens: expected a whole number"),
    ({"max_tokens": 1.5}, "max_tokens: expected a whole number"),
    ({"prompt": "x" * 60, "max_tokens": 6}, "max_tokens: expected at most 5 with a prompt of 60"),
    ({"temperature": -1}, "temperature: expected at least 0"),
    ({"temperature": "hot"}, "temperature: expected a number"),
    ({"top_p": 0}, "top_p: expected above 0"),
    ({"top_p": 2}, "top_p: expected above 0 and at most 1"),
    ({"seed": -1}, "seed: expected at least 0"),
    ({"seed": 2**63}, "seed: expected a number below 2^63"),
    ({"stop": ""}, "stop: expected strings of at least 1 character"),
    ({"stop": ["a"] * 17}, "stop: expected at most 16 strings, got 17"),
    ({"stop": 5}, "stop: expected"),
    ({"stream": "yes"}, "stream: expected"),
    ({"stream_options": {"x": 1}}, "stream_options.x: expected no such field"),
    ({"logprobs": 21}, "logprobs: expected from 0 to 20, got 21"),
    ({"logprobs": True}, "logprobs: expected"),
    ({"threshold": "high"}, "threshold: expected"),
    ({"threshold": [0.5]}, "threshold: expected 2, one for each exit but the last, got 1"),
    ({"confidence": "surety"}, "confidence: expected one of"),
    ({"confidence": "gain", "threshold": 0.9}, "confidence: expected a fitted gain"),
    ({"missing_kv": "guess"}, "missing_kv: expected"),
    ({"missing_kv": "exact", "threshold": 0.5}, "missing_kv: expected propagate or recompute"),
    ({"speculative": True, "threshold": 0.5}, "threshold: expected none with speculative"),
    ({"speculative": True, "draft_exit": 3}, "draft_exit: expected one of the exits 1, 2, got 3"),
    ({"draft_exit": 1}, "draft_exit: expected speculative with it"),
    ({"speculative": True, "confidence": "patience"}, "confidence: expected a measure"),
    ({"draft_threshold": 0.5}, "draft_threshold: expected speculative with it"),
    ({"max_drafts": 2}, "max_drafts: expected speculative with it"),
    ({"speculative": True, "max_drafts": 16}, "max_drafts: expected from 1 to 15, got 16"),
    ({"speculative": True, "draft_threshold": "low"}, "draft_threshold: expected a number"),
    ({"top_k": -2}, "top_k: expected at least 1, got -2"),
    ({"top_k": 1.5}, "top_k: expected a whole number"),
    ({"top_k": 2**63}, "top_k: expected a number below 2^63"),
    ({"repetition_penalty": 0}, "repetition_penalty: expected from 0.01 to 100, got 0"),
    ({"repetition_penalty": "inf"}, "repetition_penalty: expected from 0.01 to 100, got inf"),
    ({"stop_token_ids": [999]}, "stop_token_ids: expected token ids from 0"),
    ({"stop_token_ids": 3}, "stop_token_ids: expected a list of whole numbers"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids[0]: expected a whole number"),
    ({"decay": 1}, "decay: expected a threshold too"),
    ({"decay": -1, "threshold": 0.5}, "decay: expected a number of at least 0"),
    ({"decay": 1, "threshold": 2}, "decay: expected thresholds from 0 to 1 with it"),
    ({"min_p": 0.1}, "'min_p': expected no such field"),
    ({"n": 2}, "n: expected nothing but 1, got 2"),
    ({"best_of": 3}, "best_of: expected nothing but 1"),
    ({"echo": True}, "echo: expected nothing but False"),
    ({"suffix": "end"}, "suffix: expected nothing but ''"),
    ({"logit_bias": {"5": 1}}, "logit_bias: expected nothing but {}"),
    ({"presence_penalty": 0.5}, "presence_penalty: expected nothing but 0"),
    ({"tools": [{}]}, "tools: expected nothing but []"),
    ({"thresold": 0.5}, "'thresold': expected no such field; perhaps threshold"),
    ({"\u202e\U0001f600": 1}, "expected no such field"),
    ({"x" * 10_000: 1}, "expected no such field"),
]
CHATS = [
    ([], "messages: expected at least 1"),
    ("hi", "messages: expected a list"),
    ([1], "messages[0]: expected an object"),
    ([{"role": "user"}], "messages[0].content: expected a string"),
    ([{"role": "king", "content": "x"}], "messages[0].role: expected system or"),
    ([{"content": "x"}], "messages[0].role: expected"),
    ([{"role": "user", "content": "x", "name": {}}], "messages[0].name: expected a string"),
    ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].'tool_calls'"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]: expected"),
    ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
    ([{"role": "assistant", "content": "x"}], "chat: expected a chat template that takes these"),
]


def refused(response, status, said):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600
    return error


@pytest.mark.parametrize(("body", "said"), WRONG, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_one_sentence(client, body, said, stream):
    whole = {"prompt": "the fox", **body} if "prompt" not in body and body else body
    whole = {"stream": stream, **whole}
    error = refused(client.post("/v1/completions", json=whole), 400, said)
    assert error["type"] == "invalid_request_error"


def test_param_names_the_field(client):
    body = {"prompt": "x", "stop": ""}
    assert refused(client.post("/v1/completions", json=body), 400, "stop")["param"] == "stop"


@pytest.mark.parametrize(("messages", "said"), CHATS, ids=lambda value: str(value)[:50])
def test_wrong_messages(client, messages, said):
    refused(client.post("/v1/chat/completions", json={"messages": messages}), 400, said)


def test_both_limits_of_a_chat_must_be_the_same(client):
    body = {"messages": [{"role": "user", "content": "x"}]}
    body |= {"max_tokens": 3, "max_completion_tokens": 4}
    refused(client.post("/v1/chat/completions", json=body), 400, "max_tokens: expected 4")
    body |= {"max_tokens": 4, "top_logprobs": 1}
    refused(client.post("/v1/chat/completions", json=body), 400, "top_logprobs: expected logprobs")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": Infinity}',
        b"[" * 5_000,
        b'{"prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"user": ' + b"9" * 5_000 + b', "n": 2}',
    ],
    ids=lambda data: repr(data)[:40],
)
def test_malformed_json_is_one_sentence(client, data):
    headers = {"content-type": "application/json"}
    refused(client.post("/v1/completions", content=data, headers=headers), 400, "expected")


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me", "store": True, "metadata": {"a": [1]}, "service_tier": "auto"},
        {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0.0, "logit_bias": {}},
        {"temperature": None, "stop": None, "threshold": None, "suffix": None, "seed": None},
        {"max_tokens": 4.0, "seed": 7.0, "top_p": 1, "n": 1.0},
        {"model": "tiny", "stream_options": {"include_obfuscation": False}},
        {"top_k": -1, "repetition_penalty": 1, "stop_token_ids": []},
        {"stop_token_ids": [0.0], "top_k": 0.0},
        {"top_k": 0, "decay": None, "max_drafts": None},
    ],
    ids=str,
)
def test_harmless_fields_change_nothing(client, body):
    plain = {"prompt": "the fox", "max_tokens": 4}
    found = client.post("/v1/completions", json={**plain, **body})
    assert found.status_code == 200, found.text
    expected = client.post("/v1/completions", json=plain).json()["choices"]
    assert found.json()["choices"] == expected


def test_another_model_is_not_found(client):
    body = {"prompt": "x", "model": "gpt-4"}
    error = refused(client.post("/v1/completions", json=body), 404, "model: expected tiny")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_other_paths_and_methods_are_refused_by_json(client):
    refused(client.get("/v1/nothing"), 404, "path: expected one of the API")
    refused(client.get("/page/../app.py"), 404, "path")
    refused(client.get("/page/%2e%2e%2fapp.py"), 404, "path")
    answer = client.get("/v1/completions")
    refused(answer, 405, "method")
    assert answer.headers["allow"] == "POST"
    refused(client.post("/healthz"), 405, "method")


def test_only_json_is_read(client):
    refused(client.post("/v1/completions", content=b"{}"), 415, "content-type: expected")
    form = client.post("/v1/completions", data={"prompt": "x"})
    refused(form, 415, "got 'application/x-www-form-urlencoded'")
    zipped = client.post("/v1/completions", json={}, headers={"content-encoding": "gzip"})
    refused(zipped, 415, "content-encoding")


def test_a_body_may_be_only_so_large_with_and_without_its_length(client):
    big = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=big, headers=headers)
    refused(answer, 413, "body: expected at most 20,000 bytes, got 30,014")
    parts = (big[at : at + 1000] for at in range(0, len(big), 1000))
    refused(client.post("/v1/completions", content=parts, headers=headers), 413, "got more")
    lied = {**headers, "content-length": "99999999999999999999999999"}
    assert client.post("/v1/completions", content=b"{}", headers=lied).status_code == 413
