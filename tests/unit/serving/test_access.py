"""Keys, origins, hosts, the state of the server, and errors of its service."""

import json

import pytest

from offramp.errors import ConfigError, GenerationError, QueueFullError
from offramp.serving.config import ServeConfig
from offramp.serving.values import UnavailableError

BODY = {"prompt": "x", "max_tokens": 3}


def error_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secre"]
)
def test_another_key_is_401_before_anything_is_read(fake, client_of, given):
    service = fake()
    client = client_of(service, api_key="secret")
    headers = {} if given is None else {"authorization": given}
    for call in (
        lambda: client.post("/v1/completions", json=BODY, headers=headers),
        lambda: client.post("/v1/completions", content=b"x" * 2_000_000, headers=headers),
        lambda: client.get("/v1/models", headers=headers),
        lambda: client.get("/v1/models/fake", headers=headers),
        lambda: client.get("/v1/nothing", headers=headers),
        lambda: client.get("/metrics", headers=headers),
    ):
        answer = call()
        error = error_of(answer, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "secret" not in answer.text.replace("Basic secret", "")
    assert service.asks == []


def test_the_key_opens(fake, client_of):
    client = client_of(fake(), api_key="secret")
    headers = {"authorization": "bearer secret"}
    assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
    assert client.get("/metrics", headers=headers).status_code == 200
    assert client.get("/healthz").status_code == 200  # for load balancers
    assert client.get("/openapi.json").status_code == 200


def test_a_key_is_needed_where_other_machines_reach_the_server():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        ServeConfig(host=host).require_key()
    for host in ("0.0.0.0", "::"):
        ServeConfig(host=host, api_key="k").require_key()
        with pytest.raises(ConfigError, match="api-key: expected one, since other machines"):
            ServeConfig(host=host).require_key()


@pytest.mark.parametrize(
    "field",
    [
        {"api_key": ""},
        {"api_key": "a b"},
        {"api_key": "clé"},
        {"api_key": "a\n"},
        {"port": -1},
        {"port": 1 << 16},
        {"slots": 0},
        {"waiting": -1},
        {"max_body_bytes": 1},
        {"max_new_tokens": 0},
        {"request_seconds": float("nan")},
        {"write_seconds": 0},
        {"grace": -1},
        {"cors": ("example.org",)},
        {"name": " "},
        {"name": "a\x1b[2J"},
    ],
    ids=str,
)
def test_options_out_of_range(field):
    with pytest.raises(ConfigError, match=next(iter(field)).replace("_key", ".key")):
        ServeConfig(**field)


def test_the_key_is_in_no_repr():
    assert "secret" not in repr(ServeConfig(api_key="secret"))


def test_web_pages_of_other_origins_may_not_call_unless_they_are_named(fake, client_of):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    ask["access-control-request-headers"] = "authorization,content-type"
    closed = client_of(fake(), api_key="k")
    assert "access-control-allow-origin" not in closed.options("/v1/models", headers=ask).headers
    open_ = client_of(fake(), api_key="k", cors=("https://a.example",))
    allowed = open_.options("/v1/completions", headers=ask)
    assert allowed.status_code == 200  # without the key, which a preflight never has
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    refused = open_.get("/v1/models", headers={"origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = open_.get("/healthz", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_server_without_a_key_is_called_by_its_own_name(fake):
    from starlette.testclient import TestClient

    from offramp.serving.app import make_app
    from offramp.serving.server import hosts_of

    config = ServeConfig(host="127.0.0.1")
    app = make_app(fake(), config, hosts=hosts_of(config))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for name in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"):
            assert client.get("/v1/models", headers={"host": name}).status_code == 200
        for name in ("evil.example", "localhost.evil.example:8000", ""):
            error_of(client.get("/v1/models", headers={"host": name}), 403)
    assert hosts_of(ServeConfig(api_key="k")) is None


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ConfigError("max_new_tokens: expected x"), 400, None),
        (QueueFullError("queue: expected fewer"), 429, "queue_full"),
        (UnavailableError("server: it stops"), 503, "unavailable"),
        (GenerationError("logits: expected finite numbers"), 500, "generation_failed"),
    ],
    ids=lambda value: str(value)[:12],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_service_before_a_text_begins(fake, client_of, error, status, code, stream):
    client = client_of(fake(error=error))
    answer = client.post("/v1/completions", json={**BODY, "stream": stream})
    found = error_of(answer, status)
    assert found["code"] == code
    assert found["message"] == str(error).replace("max_new_tokens", "max_tokens")
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_an_error_within_a_stream_is_its_last_event(fake, client_of):
    client = client_of(fake("abcd", error=GenerationError("logits: expected numbers"), after=2))
    parts = client.post("/v1/completions", json={**BODY, "stream": True}).text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    error = json.loads(parts[-3].removeprefix("data: "))["error"]
    assert (error["message"], error["code"]) == ("logits: expected numbers", "generation_failed")
    whole = client.post("/v1/completions", json=BODY)
    assert error_of(whole, 500)["type"] == "server_error"


def test_one_of_several_prompts_that_fails_ends_all(fake, client_of):
    service = fake(error=QueueFullError("queue: expected fewer"))
    client = client_of(service)
    body = {"prompt": ["a", "b", "c"]}
    error_of(client.post("/v1/completions", json=body), 429)
    assert len(service.asks) == service.closed == 3


def test_a_request_may_take_only_so_long(fake, client_of):
    import asyncio

    service = fake(hold=asyncio.Event())
    client = client_of(service, request_seconds=0.2)
    error = error_of(client.post("/v1/completions", json=BODY), 504)
    assert error["code"] == "timeout"
    parts = client.post("/v1/completions", json={**BODY, "stream": True}).text.split("\n\n")
    assert json.loads(parts[-3].removeprefix("data: "))["error"]["code"] == "timeout"
    assert service.closed == 2
    lines = client.get("/metrics").text.splitlines()
    assert 'offramp_requests_total{outcome="timeout"} 2.0' in lines
    assert "offramp_request_seconds_count 0.0" in lines  # of those that are done


def test_a_server_that_stops_takes_nothing_new(fake, client_of):
    client = client_of(fake())
    assert client.get("/healthz").json() == {"status": "ok", "running": 0, "waiting": 0}
    client.app.state.opened.draining = True
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (503, "stopping")
    answer = client.post("/v1/completions", json=BODY)
    assert error_of(answer, 503)["message"].startswith("server: expected one that runs")
    assert "retry-after" in answer.headers


def test_a_broken_engine_is_seen_in_healthz(fake, client_of):
    service = fake()
    client = client_of(service)
    service.healthy = False
    assert client.get("/healthz").status_code == 503


def test_the_page_loads_nothing_from_elsewhere(fake, client_of):
    client = client_of(fake())
    answer = client.get("/")
    if answer.status_code == 200:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/favicon.ico").status_code == 204
    for name in ("nothing.js", "__init__.py", "..%2f..%2flm.py", "page.css%00"):
        assert client.get(f"/page/{name}").status_code == 404
