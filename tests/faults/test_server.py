"""The server against requests that schemathesis makes from its OpenAPI document.

For longer, against a server that runs: see docs/serving.md.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from offramp.data.tokenizer import character_tokenizer
from offramp.errors import OfframpError
from offramp.models.native.config import DecoderConfig
from offramp.models.open import OpenedModel
from offramp.serving.app import make_app
from offramp.serving.bodies import ChatBody, CompletionBody, body_of
from offramp.serving.config import ServeConfig
from offramp.serving.engine_service import EngineService
from offramp.training.loop import new_model

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = max(20, int(os.environ.get("FUZZ", "1000")) // 50)


class ChatTokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages, **_):
        return "".join(f"{each['role']}:{each['content']}." for each in messages)


@pytest.fixture(scope="module")
def client():
    tokenizer = character_tokenizer("the quick brown fox jumps over the lazy dog")
    shape = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        exit_layers=(1, 2),
        max_position_embeddings=512,
    )
    opened = OpenedModel(
        name="tiny",
        model=new_model(shape, seed=0).to(torch.float32).eval(),
        tokenizer=tokenizer,
        runner="native",
        chat_tokenizer=ChatTokenizer(),
    )
    config = ServeConfig(max_new_tokens=4, capacity=512, max_body_bytes=50_000)
    service = EngineService(opened, config)
    with TestClient(make_app(service, config)) as found:
        yield found


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_breaks_the_server(client, mode):
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    mode = getattr(schemathesis.GenerationMode, mode.upper())

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(case=schema.as_strategy(generation_mode=mode))
    def check(case):
        arguments = case.as_transport_kwargs()
        arguments["url"] = arguments["url"].removeprefix("http://localhost")
        arguments.pop("cookies", None)
        if isinstance(arguments.get("data"), bytes | str):
            arguments["content"] = arguments.pop("data")
        answer = client.request(**arguments)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert isinstance(error["message"], str)
            assert "expected" in error["message"]

    check()
    assert client.get("/healthz").json() == {"status": "ok", "running": 0, "waiting": 0}


@settings(max_examples=EXAMPLES)
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    ),
    chat=st.booleans(),
)
def test_no_body_is_more_than_a_sentence(data, chat):
    said = ""
    try:
        body_of(ChatBody if chat else CompletionBody, data)
    except OfframpError as error:
        said = str(error)
    assert "\n" not in said
    said.encode()
