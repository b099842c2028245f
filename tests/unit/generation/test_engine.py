"""The engine: each request gets what it gets alone, whatever happens to the others."""

import random
import tracemalloc

import pytest
import torch

from offramp.data.tokenizer import character_tokenizer
from offramp.errors import (
    ConfigError,
    GenerationError,
    QueueFullError,
    UnsupportedArchitectureError,
)
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.generate import generate, generate_batch
from offramp.models.huggingface.model import HuggingFaceModel

MODES = [
    {},
    {"threshold": 0.3},
    {"threshold": 0.35, "missing_kv": "recompute"},
    {"threshold": 0.3, "confidence": "saturation"},
    {"threshold": 2.0, "confidence": "patience"},
    {"speculative": True, "draft_threshold": -1.0, "adaptive": False},
    {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2},
    {"threshold": 0.25, "decay": 2.0},
]


@pytest.fixture
def model(make_model):
    """A model that the kernels run, if they were built, and whose exits some tokens take."""
    return make_model(
        num_hidden_layers=4,
        exit_layers=(1, 2),
        hidden_size=32,
        num_key_value_heads=2,
        dtype=torch.float32,
    )


def engine(model, **options):
    return Engine(model, EngineConfig(**{"slots": 3, "capacity": 64, **options}))


def alone(model, request):
    return about(generate(model, request.prompt, request.config))


def found(request):
    assert request.state == "finished"
    return about(request.completion.tokens)


def about(tokens):
    """Ids, exits, and confidences, whose last digits depend on who computes the softmax."""
    return [(t.id, t.exit_layer, pytest.approx(t.confidence, rel=1e-5)) for t in tokens]


def some_requests(count, modes=MODES, *, longest=30, new=20, seed=0):
    rng = random.Random(seed)
    for n in range(count):
        prompt = [rng.randrange(13) for _ in range(rng.randrange(1, longest))]
        yield prompt, GenerateConfig(max_new_tokens=rng.randrange(1, new), **modes[n % len(modes)])


def drive(engine, todo, *, seed=0):
    """Submit requests at random moments and step until all are done."""
    rng, todo, requests = random.Random(seed), list(todo), []
    while todo or engine.busy:
        while todo and rng.random() < 0.4:
            requests.append(engine.submit(*todo.pop(0)))
        engine.step()
    return requests


# What a row gets.


@pytest.mark.parametrize("max_wait", [0, 2])
def test_rows_that_join_and_leave_at_random_get_bit_for_bit_what_they_get_alone(model, max_wait):
    if not model.rounds_alike():
        pytest.skip("the kernels were not built")
    many = engine(model, slots=8, prefill_tokens=5, max_wait=max_wait)
    requests = drive(many, some_requests(16))
    for request in requests:
        assert found(request) == alone(model, request)
    assert len({layer for request in requests for _, layer, _ in found(request)}) == 3


@pytest.mark.parametrize("fields", [{}, {"kv_source_layer": 2}, {"kv_source_layer": 1}])
def test_rows_get_the_same_tokens_without_kernels(make_model, fields):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 3), **fields)
    requests = drive(engine(model, max_wait=2), some_requests(8, new=10))
    for request in requests:
        assert [each[:2] for each in found(request)] == [each[:2] for each in alone(model, request)]


def test_with_one_slot_requests_run_one_after_another(model):
    requests = drive(engine(model, slots=1), some_requests(5))
    for request in requests:
        assert found(request) == alone(model, request)


def test_a_joining_prompt_runs_in_parts_beside_rows_that_decode(model):
    both = engine(model, prefill_tokens=4)
    first = both.submit([1, 2], GenerateConfig(max_new_tokens=30))
    both.step()
    second = both.submit([3] * 30)
    states = []
    while second.state != "decoding":
        before = len(first.completion.tokens)
        both.step()
        states.append(second.state)
        assert len(first.completion.tokens) == before + 1
    assert states.count("prefill") >= model.num_layers - 2  # one block for each step


def test_a_request_stops_by_its_own_rules(model):
    tokenizer = character_tokenizer("abcdefghijkl")
    many = Engine(model, EngineConfig(slots=2, capacity=64), tokenizer=tokenizer)
    whole = many.submit([3, 1], GenerateConfig(max_new_tokens=20))
    list(many.run())
    text = whole.completion.text
    stop = text[3:5]  # across two tokens
    requests = [
        many.submit([3, 1], GenerateConfig(max_new_tokens=20, stop_strings=(stop,))),
        many.submit(
            [3, 1], GenerateConfig(max_new_tokens=20, stop_tokens=(whole.completion.ids[2],))
        ),
        many.submit([3, 1], GenerateConfig(max_new_tokens=5)),
    ]
    sent = dict.fromkeys(requests, "")
    for event in many.run():
        sent[event.request] += event.token.text
    reasons = [request.completion.finish_reason for request in requests]
    assert reasons == ["stop_string", "stop_token", "length"]
    assert sent[requests[0]] == text[: text.index(stop)]
    assert all(sent[request] == request.completion.text for request in requests)


def test_a_text_that_fills_its_slot_ends_there(model):
    many = engine(model, capacity=10)
    requests = [many.submit([3] * n, GenerateConfig(max_new_tokens=50)) for n in (1, 9, 10)]
    list(many.run())
    assert [len(request.completion.ids) for request in requests] == [10, 2, 1]
    assert {request.completion.finish_reason for request in requests} == {"length"}


# Waiting for each other.


def test_no_token_waits_longer_than_the_bound(model):
    bound = 2
    many = engine(model, slots=8, max_wait=bound, prefill_tokens=None)
    for n in range(8):
        many.submit([n, n + 1], GenerateConfig(max_new_tokens=40, threshold=0.22 + 0.01 * n))
    since, longest, short = dict.fromkeys(many.requests, 0), 0, 0
    while many.busy:
        running = many.requests
        got = {event.request for event in many.step()}
        short += len(got) < len(running)
        for request in running:
            since[request] = 0 if request in got else since[request] + 1
            longest = max(longest, since[request])
    assert short > 5  # or none waited
    assert 1 <= longest <= bound


# Admission.


def test_requests_wait_in_their_order_and_one_too_many_is_refused(model):
    few = engine(model, slots=2, waiting=1)
    requests = [few.submit([n], GenerateConfig(max_new_tokens=3), id=str(n)) for n in range(3)]
    with pytest.raises(QueueFullError, match=r"^queue: expected at most 1 waiting requests, got"):
        few.submit([4])
    few.step()
    assert [request.state for request in requests] == ["decoding", "decoding", "waiting"]
    assert few.requests == requests
    with pytest.raises(QueueFullError):
        few.submit([4])
    list(few.run())
    assert {request.state for request in requests} == {"finished"}
    assert few.submit([4]).state == "waiting"


def test_without_a_queue_only_free_slots_take_requests(model):
    few = engine(model, slots=1, waiting=0)
    few.submit([1])
    with pytest.raises(QueueFullError):
        few.submit([1])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 11, {}, "^prompt: expected at most 10 tokens, the capacity of a slot, got 11$"),
        ([], {}, "^prompt: expected at least 1 token, got none$"),
        ([13], {}, "^prompt: expected token ids from 0 to 12, got 13$"),
        ([1], {"stop_strings": ("a",)}, "^stop_strings: expected a tokenizer too, got none$"),
        ([1], {"threshold": (0.1,)}, "^thresholds: expected 2"),
        ([1], {"confidence": "gain", "threshold": 0.1}, "expected a fitted gain at exit layer 1"),
        ([1], {"missing_kv": "exact"}, "^missing_kv: expected propagate or recompute"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_changes_nothing(model, prompt, options, message):
    few = engine(model, capacity=10)
    with pytest.raises(ConfigError, match=message):
        few.submit(prompt, GenerateConfig(**options))
    assert not few.busy


def test_an_id_belongs_to_one_request_until_it_is_done(model):
    few = engine(model)
    first = few.submit([1], GenerateConfig(max_new_tokens=2), id="a")
    with pytest.raises(
        ConfigError, match=r"^id: expected one that no unfinished request has, got 'a'$"
    ):
        few.submit([2], id="a")
    list(few.run())
    again = few.submit([1], GenerateConfig(max_new_tokens=2), id="a")
    assert not few.cancel(first)
    assert again.state == "waiting"
    assert few.submit([1]).id != few.submit([1]).id


@pytest.mark.parametrize("field", ["slots", "capacity", "waiting", "prefill_tokens", "max_wait"])
def test_options_out_of_range_are_one_sentence(field):
    with pytest.raises(ConfigError, match=rf"^{field}: expected at least [01], got -1$"):
        EngineConfig(**{field: -1})


# Cancelling.


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_cancelling_frees_the_slot_at_once(model, steps):
    few = engine(model, slots=1, prefill_tokens=4)
    request = few.submit([3] * 20, GenerateConfig(max_new_tokens=30, threshold=0.3))
    follower = few.submit([1, 2], GenerateConfig(max_new_tokens=9, threshold=0.3))
    for _ in range(steps):
        few.step()
    assert few.cancel(request.id)
    assert request.state == "cancelled"
    assert request.done
    assert not few.cancel(request)
    assert few.requests == [follower]
    few.step()
    assert follower.state == "decoding"
    list(few.run())
    assert found(follower) == alone(model, follower)
    assert not few.cancel(follower)
    assert not few.cancel("nobody")


def test_cancelling_during_prefill_leaves_the_others_as_they_are(model):
    few = engine(model, prefill_tokens=4)
    stays = few.submit([1, 2, 3], GenerateConfig(max_new_tokens=20))
    few.step()
    goes = few.submit([5] * 30)
    few.step()
    assert goes.state == "prefill"
    few.cancel(goes)
    later = few.submit([7] * 3, GenerateConfig(max_new_tokens=4))
    list(few.run())
    assert [found(stays), found(later)] == [alone(model, stays), alone(model, later)]


def test_cancelling_rows_at_random_changes_no_other_row(model):
    many = engine(model, slots=4, max_wait=3)
    rng, todo, requests = random.Random(1), list(some_requests(14, seed=1, new=12)), []
    while todo or many.busy:
        if todo:
            requests.append(many.submit(*todo.pop()))
        if many.requests and rng.random() < 0.2:
            many.cancel(rng.choice(many.requests))
        many.step()
    finished = [request for request in requests if request.state == "finished"]
    assert 3 < len(finished) < 14
    for request in finished:
        assert [each[0] for each in found(request)] == [each[0] for each in alone(model, request)]


# Faults.


def poison(model, token):
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("options", MODES[:3] + MODES[5:6])
def test_a_row_that_is_not_finite_fails_alone_and_leaves_its_slot_clean(
    make_model, kernels, options
):
    shape = {"hidden_size": 32, "dtype": torch.float32} if kernels else {}
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2), **shape)
    config = GenerateConfig(max_new_tokens=12, **options)
    fine = [[1, 2, 3], [4] * 9, [2] * 20]
    expected = [[token.id for token in generate(model, prompt, config)] for prompt in fine]
    used = {token for ids in (*fine, *expected) for token in ids}
    broken = next(token for token in range(13) if token not in used)
    poison(model, broken)
    few = engine(model, slots=2)
    first = [few.submit(fine[0], config), few.submit([broken] * 25, config)]
    events = [event for _ in range(3) for event in few.step()]
    assert first[1].state == "failed"
    assert isinstance(first[1].error, GenerationError)
    assert [event.token for event in events if event.request is first[1]] == [None]
    rest = [few.submit(prompt, config) for prompt in fine[1:]]
    list(few.run())
    assert [request.completion.ids for request in (first[0], *rest)] == expected


def test_a_confidence_that_is_not_finite_fails_its_row_alone(make_model):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2))
    config = GenerateConfig(max_new_tokens=6, threshold=2.0)
    few = engine(model)
    requests = [few.submit([n], config) for n in (1, 2)]
    few.step()
    poison(model, requests[0].completion.ids[-1])
    if requests[0].completion.ids == requests[1].completion.ids:
        pytest.skip("both rows run the same token")
    few.step()
    assert requests[0].state == "failed"
    assert "exit layer 1: expected max_prob scores" in str(requests[0].error)
    assert requests[1].state == "decoding"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("options", MODES[1:3])
def test_after_an_error_inside_a_step_the_engine_can_be_used(model, error, options):
    config = GenerateConfig(max_new_tokens=9, **options)
    few = engine(model, slots=2)
    running = [few.submit([n], config) for n in (1, 2)]
    waits = few.submit([3, 4], config)
    few.step()
    few.step()
    run, calls = model.run_layers, []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return run(*args, **kwargs)

    model.run_layers = breaks
    with pytest.raises(error):
        list(few.run())
    model.run_layers = run
    assert {request.state for request in running} == {"failed"}
    assert f"got {error.__name__}" in str(running[0].error)
    assert waits.state == "waiting"
    list(few.run())
    assert [each[0] for each in found(waits)] == [each[0] for each in alone(model, waits)]


def test_a_consumer_that_raises_loses_nothing(model):
    few = engine(model)
    request = few.submit([1, 2], GenerateConfig(max_new_tokens=8))

    def consume():
        for _ in few.run():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    list(few.run())
    assert found(request) == alone(model, request)


def test_memory_stays_flat_over_many_requests(model):
    many = engine(model, slots=4)
    sizes, held = [], many.cache_bytes
    tracemalloc.start()
    for _ in range(3):
        drive(many, some_requests(12, longest=4, new=4))
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[2] - sizes[1] < 12_000  # a request would keep more than 1 KB
    assert many.cache_bytes == held == many.cache.keys.nbytes * 2


def test_a_model_that_runs_only_whole_is_refused_in_a_sentence(monkeypatch):
    """Its blocks are unknown, so no cache can be made: no request is taken, and nothing runs."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 13, "hidden_size": 16, "n_layer": 3, "n_head": 2}
    lm = transformers.AutoModelForCausalLM.from_config(transformers.BloomConfig(**shape))
    model = HuggingFaceModel(lm.eval(), exit_layers=(1,))
    assert model.why_no_blocks
    ran = []
    monkeypatch.setattr(type(lm), "forward", lambda *args, **about: ran.append(args))
    for start in (
        lambda: Engine(model),
        lambda: next(generate(model, [1, 2], GenerateConfig(max_new_tokens=2))),
        lambda: generate_batch(model, [[1, 2], [3]], GenerateConfig(max_new_tokens=2)),
    ):
        with pytest.raises(
            UnsupportedArchitectureError, match="cannot be run one by one"
        ) as caught:
            start()
        assert "\n" not in str(caught.value)
    assert not ran
