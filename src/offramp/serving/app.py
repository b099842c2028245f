"""The HTTP API as a FastAPI app, for any ``Service``."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from offramp.calibration.certificate import finite_or_word
from offramp.commands.audit import AuditLog
from offramp.errors import OfframpError
from offramp.schema import shown
from offramp.serving.bodies import ChatBody, CommonBody, CompletionBody, body_of
from offramp.serving.config import ServeConfig
from offramp.serving.errors import HTTPError, http_error, json_response
from offramp.serving.forms import ChatForm, CompletionForm, Form
from offramp.serving.gate import Gate, Open
from offramp.serving.metrics import CONTENT_TYPE, Metrics
from offramp.serving.openapi import describe
from offramp.serving.pages import add_page
from offramp.serving.reply import Reply
from offramp.serving.values import Ask, ModelInfo, Service
from offramp.version import __version__


def make_app(
    service: Service,
    config: ServeConfig | None = None,
    *,
    hosts: Collection[str] | None = None,
    audit: AuditLog | None = None,
) -> FastAPI:
    """Return the API of a service: OpenAI's completions, metrics, and the page.

    ``config`` holds the limits, the key and the origins. ``hosts`` are the names by which requests
    may call the server; None allows any. ``audit`` is what the service records into.
    ``app.state.opened`` counts the open requests.
    """
    config = config or ServeConfig()
    opened, metrics = Open(), Metrics(service.load, audit)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="offramp",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.opened = opened
    _add_errors(app)
    _add_models(app, service)
    _add_state(app, service, opened, metrics)
    _add_completions(app, service, config, opened=opened, metrics=metrics)
    add_page(app)
    app.add_middleware(Gate, opened=opened, api_key=config.api_key, hosts=hosts)
    if config.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    describe(app, service, config)
    return app


def _add_completions(
    app: FastAPI, service: Service, config: ServeConfig, *, opened: Open, metrics: Metrics
) -> None:
    def reply(body: CommonBody, asks: list[Ask], form: Form) -> Response:
        return Reply(
            service,
            asks,
            form,
            stream=body.stream,
            usage=body.stream_options.include_usage,
            seconds=config.request_seconds,
            opened=opened,
            metrics=metrics,
        )

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = body_of(CompletionBody, await _read(request, config))
        model, asks = _named(body, service.about), body.asks()
        if len(asks) > service.about.most_prompts:
            most = service.about.most_prompts
            raise HTTPError(400, f"prompt: expected at most {most} prompts, got {len(asks)}")
        logprobs = body.logprobs is not None
        return reply(body, asks, CompletionForm(model, logprobs=logprobs, prompts=len(asks)))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = body_of(ChatBody, await _read(request, config))
        model = _named(body, service.about)
        return reply(body, body.asks(), ChatForm(model, logprobs=body.logprobs))


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model_json(service.about)]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if model != service.about.id:
            raise _no_model(model, service.about)
        return json_response(_model_json(service.about))


def _add_state(app: FastAPI, service: Service, opened: Open, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def health() -> Response:
        load = service.load()
        status = "stopping" if opened.draining else "ok" if load.healthy else "broken"
        content = {"status": status, "running": load.running, "waiting": load.waiting}
        return json_response(content, status=200 if status == "ok" else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_errors(app: FastAPI) -> None:
    """Answer every error by OpenAI's error object."""

    @app.exception_handler(HTTPError)
    async def http(_: Request, error: HTTPError) -> Response:
        return error.response()

    @app.exception_handler(OfframpError)
    async def wrong(_: Request, error: OfframpError) -> Response:
        return http_error(error).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        method, path = shown(request.method), shown(request.url.path)
        said = {
            404: f"path: expected one of the API, such as /v1/completions, got {path}",
            405: f"method: expected another one for {path}, got {method}",
        }
        message = said.get(error.status_code, str(error.detail))
        return HTTPError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        return HTTPError(400, "body: expected all of it, but the client left").response()

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return HTTPError(500, "server: it failed; its log says why").response()


async def _read(request: Request, config: ServeConfig) -> bytes:
    """Return the body of a request. Raises HTTPError for one that is not JSON or too large."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(
            415, f"content-type: expected application/json, got {shown(kind) if kind else 'none'}"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPError(415, "content-encoding: expected none, got one")
    most = config.max_body_bytes
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise HTTPError(413, f"body: expected at most {most:,} bytes, got {int(length[:20]):,}")
    found = bytearray()
    try:
        async with asyncio.timeout(config.read_seconds):
            async for part in request.stream():
                found += part
                if len(found) > most:
                    raise HTTPError(413, f"body: expected at most {most:,} bytes, got more")
    except TimeoutError:
        raise HTTPError(
            408, f"body: expected all of it within {config.read_seconds:g} seconds, got less"
        ) from None
    return bytes(found)


def _named(body: CommonBody, about: ModelInfo) -> str:
    """Return the model's name. Raises HTTPError if a request names another."""
    if body.model not in (None, about.id):
        raise _no_model(body.model, about)
    return about.id


def _no_model(model: str | None, about: ModelInfo) -> HTTPError:
    said = f"model: expected {about.id}, got {shown(model)}"
    return HTTPError(404, said, code="model_not_found")


def _model_json(about: ModelInfo) -> Mapping[str, Any]:
    cap = about.certificate
    certificate = None
    if cap is not None:
        certificate = asdict(cap) | {"thresholds": finite_or_word(cap.thresholds)}
    return {
        "id": about.id,
        "object": "model",
        "created": about.created,
        "owned_by": "offramp",
        "offramp": {
            "num_layers": about.num_layers,
            "exit_layers": about.exit_layers,
            "exits_trained": about.exits_trained,
            "confidences": about.confidences,
            "default_confidence": about.default_confidence,
            "flops_pct": {str(layer): pct for layer, pct in about.flops_pct.items()},
            "max_tokens": about.max_tokens,
            "chat": about.chat,
            "certificate": certificate,
        },
    }
