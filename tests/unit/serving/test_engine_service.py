"""The engine behind the event loop: requests that are left, refused, or that fail."""

import asyncio
import math
from contextlib import aclosing

import pytest
from starlette.testclient import TestClient

from offramp.calibration.thresholds import StoredThresholds
from offramp.commands.audit import AuditLog
from offramp.errors import (
    CertificateError,
    ConfigError,
    GenerationError,
    OfframpError,
    QueueFullError,
)
from offramp.serving.app import make_app
from offramp.serving.config import ServeConfig
from offramp.serving.engine_service import EngineService
from offramp.serving.info import name_of
from offramp.serving.openapi import document
from offramp.serving.values import Ask, Message, Piece, Started, UnavailableError

LIMITS = {"slots": 2, "capacity": 64, "waiting": 2}


def run(opened, work, *, stored=None, **limits):
    """Run ``work(service)`` with a service that is closed afterwards."""

    async def whole():
        service = EngineService(opened, ServeConfig(**LIMITS | limits), stored=stored)
        await service.start()
        try:
            async with asyncio.timeout(60):
                return await work(service)
        finally:
            await service.close()

    return asyncio.run(whole())


def ask(prompt="the fox", **options):
    return Ask(prompt=prompt, options=options)


async def ids_of(service, request):
    found = []
    async with aclosing(service.answer(request)) as answer:
        async for piece in answer:
            if isinstance(piece, Piece):
                found += [token.id for token in piece.tokens]
    return found


async def settled(service):
    """Wait until the engine has nothing to do."""
    while service.engine.busy or service.load().running or service.load().waiting:
        await asyncio.sleep(0.005)


def test_many_at_once_get_what_each_gets_alone(opened):
    asks = [
        ask(f"{n} dogs", max_new_tokens=3 + n % 7, seed=n, temperature=n % 2) for n in range(10)
    ]

    async def work(service):
        alone = [await ids_of(service, each) for each in asks]
        together = await asyncio.gather(*(ids_of(service, each) for each in asks))
        return alone, together

    alone, together = run(opened, work, waiting=10)
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 3


def test_whoever_leaves_frees_the_slot_at_once(opened):
    async def work(service):
        answers = [service.answer(ask(max_new_tokens=50)) for _ in range(2)]
        for answer in answers:
            assert isinstance(await anext(answer), Started)
        waiting = asyncio.create_task(ids_of(service, ask(max_new_tokens=1)))
        await answers[0].aclose()
        assert len(await waiting) == 1
        await answers[1].aclose()
        await settled(service)
        assert service.engine.requests == []
        task = asyncio.create_task(ids_of(service, ask(max_new_tokens=50)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(service)
        return [await ids_of(service, ask(max_new_tokens=2)) for _ in range(3)]

    assert len(set(map(tuple, run(opened, work)))) == 1


def test_tokens_that_nobody_reads_become_one_piece(opened):
    async def work(service):
        answer = service.answer(ask(max_new_tokens=30))
        await anext(answer)
        await settled(service)
        await asyncio.sleep(0.05)
        return [piece async for piece in answer]

    [piece] = run(opened, work)
    assert len(piece.tokens) == 30
    assert piece.end.finish_reason == "length"


def test_one_more_than_may_wait_is_refused_and_the_others_go_on(opened):
    async def work(service):
        asks = [ids_of(service, ask(max_new_tokens=20)) for _ in range(9)]
        found = await asyncio.gather(*asks, return_exceptions=True)
        return found, await ids_of(service, ask(max_new_tokens=20))

    found, later = run(opened, work)
    refused = [each for each in found if isinstance(each, QueueFullError)]
    assert len(refused) == 5  # 2 slots and 2 that wait
    assert [each for each in found if each not in refused] == [later] * 4


def test_a_request_that_cannot_run_is_refused_and_others_are_not_harmed(opened):
    wrong = [
        ask(max_new_tokens=10_000),
        ask(threshold=(0.5,)),
        ask(""),
        ask((999,)),
        ask(no_such_option=1),
        ask((Message(role="assistant", content="x"),)),
    ]

    async def work(service):
        found = await asyncio.gather(
            *(ids_of(service, each) for each in wrong), return_exceptions=True
        )
        return found, await ids_of(service, ask(max_new_tokens=3))

    found, ids = run(opened, work, waiting=9)
    assert all(isinstance(each, OfframpError) for each in found), found
    assert len(ids) == 3


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(opened, monkeypatch):
    async def work(service):
        whole = service.engine.step
        fails = iter([True])

        def step():
            if next(fails, False):
                monkeypatch.setattr(service.engine, "_decode", broken)
                try:
                    return whole()
                finally:
                    monkeypatch.delattr(service.engine, "_decode")
            return whole()

        def broken(events):
            raise RuntimeError("no memory")

        service.engine.step = step
        answer = service.answer(ask(max_new_tokens=5))
        await anext(answer)
        later = [piece async for piece in answer]  # it waited, so it runs in the next step
        return later, await ids_of(service, ask(max_new_tokens=5))

    later, ids = run(opened, work)
    assert [token.id for piece in later for token in piece.tokens] == ids


def test_requests_in_a_slot_fail_with_the_step(opened):
    async def work(service):
        answer = service.answer(ask(max_new_tokens=40))
        await anext(answer)
        await anext(answer)

        def broken(events):
            service.engine._decode = whole
            raise RuntimeError("no memory")

        whole, service.engine._decode = service.engine._decode, broken
        with pytest.raises(GenerationError, match="expected a step that ends, got RuntimeError"):
            async for _ in answer:
                pass
        await settled(service)
        return await ids_of(service, ask(max_new_tokens=4))

    assert len(run(opened, work)) == 4


def test_what_runs_when_it_closes_fails(opened):
    async def work(service):
        answers = [service.answer(ask(max_new_tokens=50)) for _ in range(3)]
        for answer in answers:
            await anext(answer)
        await service.close()
        found = []
        for answer in answers:
            try:
                found.append([piece async for piece in answer][-1].end is not None)
            except UnavailableError:
                found.append(True)
        with pytest.raises(UnavailableError):
            await anext(service.answer(ask()))
        assert not service.load().healthy
        return found

    assert run(opened, work) == [True] * 3


def stored(**fields):
    return StoredThresholds(
        **{
            "thresholds": (0.5, math.inf),
            "confidence": "max_prob",
            "missing_kv": "recompute",
            "model_sha256": "0" * 64,
            "dtype": "float32",
            "sha256": "1" * 64,
            **fields,
        }
    )


def configs(opened, certificate, *asks):
    """The config that the engine gets for each, or the error."""

    async def work(service):
        found = []
        for each in asks:
            try:
                found.append(service._prepared(each)[1])
            except OfframpError as error:
                found.append(error)
        return found

    return run(opened, work, stored=certificate)


def test_a_certificate_decides_if_a_request_names_no_threshold(opened):
    [config, speculative] = configs(opened, stored(), ask(), ask(speculative=True))
    assert config.threshold == (0.5, math.inf)
    assert (config.confidence, config.missing_kv) == ("max_prob", "recompute")
    assert speculative.threshold is None  # at full depth


def test_a_certificate_caps_thresholds_confidence_and_missing_kv(opened):
    allowed = [
        ask(threshold=(0.5, math.inf)),
        ask(threshold=(0.9, math.inf)),
        ask(threshold=math.inf),
        ask(threshold=(0.6, math.inf), confidence="max_prob", missing_kv="recompute"),
    ]
    for config in configs(opened, stored(), *allowed):
        assert not isinstance(config, OfframpError), config
        assert (config.confidence, config.missing_kv) == ("max_prob", "recompute")
    refused = [
        (ask(threshold=0.9), "threshold: expected at least inf at exit 2"),
        (ask(threshold=(0.4999, math.inf)), "threshold: expected at least 0.5 at exit 1"),
        (ask(threshold=-math.inf), "threshold: expected at least 0.5"),
        (ask(confidence="margin"), "confidence: expected max_prob"),
        (ask(threshold=math.inf, confidence="entropy"), "confidence: expected max_prob"),
        (ask(speculative=True, confidence="margin"), "confidence: expected max_prob"),
        (ask(missing_kv="propagate"), "missing_kv: expected recompute"),
        (ask(threshold=(0.9, 1.0), decay=2.0), "decay: expected none with a certificate"),
        (ask(speculative=True, missing_kv="propagate"), "missing_kv: expected recompute"),
    ]
    found = configs(opened, stored(), *(each for each, _ in refused))
    for error, (_, said) in zip(found, refused, strict=True):
        assert isinstance(error, CertificateError), error
        assert str(error).startswith(said)
    [error] = configs(opened, stored(), ask(threshold=(0.9,)))
    assert isinstance(error, ConfigError)


def test_a_model_without_exits_runs_at_full_depth(make_opened):
    opened = make_opened(chat=False, exit_layers=())

    async def work(service):
        found = []
        for each in (ask(threshold=0.5), ask(speculative=True), ask(max_new_tokens=3)):
            try:
                found.append(await ids_of(service, each))
            except ConfigError as error:
                found.append(str(error))
        return service.about, found

    about, (threshold, speculative, ids) = run(opened, work)
    assert (about.exit_layers, about.confidences, about.default_confidence) == ((4,), (), None)
    assert about.flops_pct == {4: 100.0}
    assert threshold.startswith("threshold: expected a model with an exit")
    assert speculative.startswith("speculative: expected a model with an exit")
    assert len(ids) == 3
    paths = document(about, ServeConfig())["paths"]
    assert "/v1/chat/completions" not in paths
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name in ("threshold", "decay", "draft_threshold", "max_drafts"):
        assert body["properties"][name] == {"type": "null"}


def test_the_names_of_models(tmp_path):
    (tmp_path / "folder").mkdir()
    assert name_of(str(tmp_path / "folder")) == "folder"
    assert name_of("org/model") == "org/model"
    assert name_of("smollm2-135m") == "smollm2-135m"


def test_an_audit_of_requests_is_in_the_metrics(opened):
    log = AuditLog(share=1.0)
    service = EngineService(opened, ServeConfig(**LIMITS), audit=log)
    with TestClient(make_app(service, ServeConfig(**LIMITS), audit=log)) as client:
        body = {"model": "tiny", "prompt": "the ", "max_tokens": 8, "threshold": 0.0}
        answer = client.post("/v1/completions", json={**body, "confidence": "max_prob"})
        assert answer.status_code == 200, answer.text
        metrics = client.get("/metrics").text
    layers = [token["exit_layer"] for token in answer.json()["offramp"]["tokens"]]
    left = sum(layer < 4 for layer in layers)
    assert left == 7  # the first new token is that of the prompt
    assert f"offramp_audited {left}.0" in metrics
    assert log.content()["tokens"] == 8
    assert 'offramp_audit_upper{risk="disagreement"}' in metrics


def test_a_promise_is_kept_by_the_requests_together_and_is_in_the_metrics(opened):
    options = {**LIMITS, "audit": 1.0, "keep_promise": 0.5}
    log = AuditLog(share=1.0, keep_promise=0.5)
    config = ServeConfig(**options)
    service = EngineService(opened, config, audit=log)
    with TestClient(make_app(service, config, audit=log)) as client:
        body = {"model": "tiny", "prompt": "the ", "max_tokens": 20, "confidence": "max_prob"}
        layers, uppers = [], []
        for threshold in (None, 1.5, *([0.0] * 4)):
            answer = client.post("/v1/completions", json={**body, "threshold": threshold})
            assert answer.status_code == 200, answer.text
            layers.append([token["exit_layer"] for token in answer.json()["offramp"]["tokens"]])
            uppers.append(log.promised.upper)
        metrics = client.get("/metrics").text
    assert {layer for text in layers[:2] for layer in text} == {4}  # not bolder than is asked for
    assert min(min(text) for text in layers[2:]) == 1
    assert max(uppers) <= 0.5
    assert 'offramp_promise{risk="disagreement"} 0.5' in metrics
    assert f"offramp_promise_rung {float(log.rung)}" in metrics
    assert f"offramp_audit_alarms_total {float(log.watch.alarms)}" in metrics
    assert "offramp_audit_last_alarm_tokens" in metrics
    assert log.content()["tokens"] == 120


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_promise": 0.1}, "keep_promise: expected --audit SHARE"),
        ({"audit": 0.5, "keep_promise": 1.0}, "keep_promise: expected a number between 0 and 1"),
        ({"audit": 0.5, "keep_promise": math.nan}, "keep_promise: expected a number between"),
        ({"audit": 0.5, "promise_risk": "nll-gap"}, "promise_risk: expected keep_promise with it"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        ServeConfig(**options)


@pytest.mark.parametrize("share", [0.0, 1.5, math.nan])
def test_a_wrong_share_of_an_audit_is_refused(share):
    with pytest.raises(ConfigError, match="audit: expected a share above 0"):
        ServeConfig(audit=share)
