"""A tiny model behind the app, and a service without one."""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import pytest
import torch
from starlette.testclient import TestClient

from offramp.data.tokenizer import character_tokenizer
from offramp.models.native.config import DecoderConfig
from offramp.models.open import OpenedModel
from offramp.serving.app import make_app
from offramp.serving.config import ServeConfig
from offramp.serving.engine_service import EngineService
from offramp.serving.values import Ask, Ending, Load, ModelInfo, NewToken, Piece, Started
from offramp.training.loop import new_model

TEXT = "the quick brown fox jumps over 13 lazy dogs. é"


class ChatTokenizer:
    """What transformers' tokenizer does of a template."""

    chat_template = "a template"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        if messages[0]["role"] == "assistant":
            raise ValueError("expected a user first")
        return "".join(f"{each['role']} {each['content']}." for each in messages)


def open_tiny(*, chat=True, **shape) -> OpenedModel:
    tokenizer = character_tokenizer(TEXT)
    fields = {"num_hidden_layers": 4, "exit_layers": (1, 2), "max_position_embeddings": 96, **shape}
    model = new_model(
        DecoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            **fields,
        ),
        seed=5,
    )
    return OpenedModel(
        name="tiny",
        model=model.to(torch.float32).eval(),
        tokenizer=tokenizer,
        runner="native",
        chat_tokenizer=ChatTokenizer() if chat else None,
    )


@pytest.fixture(scope="package")
def opened() -> OpenedModel:
    return open_tiny()


@pytest.fixture(scope="package")
def client(opened) -> Iterator[TestClient]:
    """The API of the tiny model, with 3 slots."""
    config = ServeConfig(slots=3, capacity=64, waiting=4, max_new_tokens=48, max_body_bytes=20_000)
    app = make_app(EngineService(opened, config), config)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def make_opened():
    return open_tiny


INFO = ModelInfo(
    id="fake",
    created=1,
    num_layers=4,
    exit_layers=(2, 4),
    exits_trained=True,
    confidences=("max_prob",),
    default_confidence="max_prob",
    flops_pct={2: 60.0, 4: 110.0},
    max_tokens=100,
    capacity=200,
    vocab_size=10,
    most_prompts=8,
    chat=False,
)
END = Ending(
    finish_reason="length",
    mean_layers=3.0,
    flops_pct=75.0,
    missing_kv="propagate",
    confidence="max_prob",
    acceptance_rate=None,
    tokens_per_s=10.0,
    seconds_to_first_token=0.5,
)


class FakeService:
    """Answers each request by ``text``, a character a piece; ``hold`` keeps the last one back.

    ``size`` repeats each character; ``error`` is raised after so many pieces as ``after``.
    """

    def __init__(self, text="abc", *, error=None, after=0, hold=None, size=1, about=INFO):
        self.text, self.error, self.after, self.hold, self.size = text, error, after, hold, size
        self.about = about
        self.asks: list[Ask] = []
        self.closed = 0
        self.healthy = True

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.started = False

    def load(self) -> Load:
        return Load(running=len(self.asks) - self.closed, waiting=0, healthy=self.healthy)

    async def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece, None]:
        self.asks.append(ask)
        try:
            if self.error and not self.after:
                raise self.error
            yield Started(prompt_tokens=7)
            for n, character in enumerate(self.text):
                if self.error and n == self.after:
                    raise self.error
                if self.hold is not None and n == len(self.text) - 1:
                    await self.hold.wait()
                await asyncio.sleep(0)
                token = NewToken(
                    id=n, text=character * self.size, exit_layer=2 + 2 * (n % 2), confidence=0.5
                )
                last = n == len(self.text) - 1
                yield Piece(tokens=(token,), end=END if last else None)
        finally:
            self.closed += 1


@pytest.fixture
def fake() -> type[FakeService]:
    return FakeService


@pytest.fixture
def client_of():
    """Make a client of a service; the app closes with the test."""
    made = []

    def make(service, **options) -> TestClient:
        config = ServeConfig(**options)
        client = TestClient(make_app(service, config), base_url="http://127.0.0.1")
        client.__enter__()
        made.append(client)
        return client

    yield make
    for client in made:
        client.__exit__(None, None, None)
