"""offramp serve, as it is typed, with OpenAI's own client; and its end by SIGTERM."""

import asyncio
import importlib.util
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

openai = pytest.importorskip("openai")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
PROMPT = "The quick brown"
MODES = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"threshold": 0.3},
    {"threshold": "0:0", "missing_kv": "recompute"},
    {"speculative": True},
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_load"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_load"]


@pytest.fixture(scope="module")
def server(script, trained) -> Iterator[object]:
    options = ("--slots", "4", "--waiting", "64", "--capacity", "1024", "--threads", "1")
    options += ("--max-new-tokens", "1000", "--grace", "20")
    found = script.Server(str(trained), *options)
    yield found
    if found.process.poll() is None:
        found.stop()


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


def flags(mode):
    for name, value in mode.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield value


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_answers_are_those_of_generate_token_for_token(offramp, trained, client, mode):
    said = offramp("generate", trained, PROMPT, "--max-new-tokens", 12, "--json", *flags(mode))
    expected = json.loads(said.stdout)
    own = {name: mode[name] for name in ("temperature", "seed") if name in mode}
    extra = {name: value for name, value in mode.items() if name not in own}
    if extra.get("threshold") == "0:0":
        extra["threshold"] = [0, 0]
    asked = {"model": "model", "prompt": PROMPT, "max_tokens": 12, "extra_body": extra, **own}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == expected["text"]
    # which exit drafted a token depends on what drafting cost: it pauses where it does not pay
    names = ("id",) if extra.get("speculative") else ("id", "exit_layer")
    tokens = [[token[name] for name in names] for token in expected["tokens"]]
    assert [[t[name] for name in names] for t in answer.offramp["tokens"]] == tokens
    assert answer.offramp["missing_kv"] == expected["missing_kv"]
    streamed, text = [], ""
    for chunk in client.completions.create(**asked, stream=True):
        streamed += [[t[name] for name in names] for t in chunk.offramp["tokens"]]
        text += chunk.choices[0].text
    assert (streamed, text) == (tokens, expected["text"])
    if "missing_kv" not in mode and "speculative" not in mode:
        assert answer.offramp["mean_layers"] == pytest.approx(expected["mean_layers"])


def test_openais_client_reads_models_usage_log_probabilities_and_errors(client):
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == ("model", "offramp")
    assert client.models.retrieve("model").offramp["exit_layers"] == [1, 2, 4]
    stream = client.completions.create(
        model="model",
        prompt=PROMPT,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=2,
    )
    *chunks, last = stream
    assert last.usage.completion_tokens == 5
    assert sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks) == 5
    with pytest.raises(openai.NotFoundError, match="model: expected model, got 'other'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="n: expected nothing but 1, got 2") as refused:
        client.completions.create(model="model", prompt="x", n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="messages: expected a model with a chat"):
        client.chat.completions.create(model="model", messages=[{"role": "user", "content": "x"}])


def test_many_clients_at_once_are_never_mixed_up(script, server, trained):
    bodies = [script.body_of(n, tokens=8 + n % 5, thresholds=[0.3, 0.1]) for n in range(64)]
    process = server.process.pid
    found = asyncio.run(script.load(server.port, bodies, seconds=0.5, slow=2, process=process))
    assert not found.errors
    assert found.mixed_up == 0
    assert len(found.answers) == 64
    assert script.wrong_answers(str(trained), bodies[:12], found) == 0


def test_sigterm_lets_open_requests_finish_and_takes_no_new_ones(script, server, client):
    """The last test of this server."""
    body = {"prompt": PROMPT, "max_tokens": 900, "stream": True}

    async def work():
        reader, writer, status = await script.post(server.port, body)
        assert status == 200
        again = await asyncio.open_connection("127.0.0.1", server.port)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        _, other, refused = await script.post(server.port, body)
        other.close()
        chunks = [chunk async for chunk in script.events(reader)]
        writer.close()
        again[1].close()
        return refused, chunks

    refused, chunks = asyncio.run(work())
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert sum(len(chunk["offramp"]["tokens"]) for chunk in chunks) == 900
    assert refused == 503
    assert server.ended(30) == 0


@pytest.fixture
def within(offramp, trained, monkeypatch):
    """Run ``offramp serve`` with a client in the place of the network; return what it says."""
    monkeypatch.delenv("OFFRAMP_API_KEY", raising=False)

    def serve(work, *arguments, **env):
        def instead(app, bound, config, *, on_ready):
            with TestClient(app, base_url="http://127.0.0.1") as client:
                on_ready()
                work(client)
            return True

        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("offramp.serving.server.run", instead)
        result = offramp("serve", trained, "--port", 0, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return serve


def test_the_key_comes_from_the_environment(within):
    def work(client):
        assert client.get("/v1/models").status_code == 401
        headers = {"authorization": "Bearer secret"}
        [model] = client.get("/v1/models", headers=headers).json()["data"]
        assert model["id"] == "mine"

    said = within(work, "--host", "0.0.0.0", "--name", "mine", OFFRAMP_API_KEY="secret")
    assert said.startswith("Serving mine at http://0.0.0.0:")
    assert int(said.strip().rpartition(":")[2]) > 0


def test_mistakes_are_one_sentence(offramp, trained, tmp_path, monkeypatch):
    monkeypatch.delenv("OFFRAMP_API_KEY", raising=False)

    def refused(*arguments):
        result = offramp("serve", trained, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    assert "api-key: expected one, since other machines" in refused("--host", "0.0.0.0")
    assert "host: expected an address" in refused("--host", "nowhere.invalid")
    assert "api-key: expected at least 1 character" in refused("--api-key", "a b")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert "wrong.json" in refused("--certificate", wrong)
    assert offramp("serve", tmp_path / "nothing", "--port", 0).returncode == 2


def test_a_missing_library_names_the_extra(offramp, trained, monkeypatch):
    monkeypatch.setattr("offramp.cli.serve.find_spec", lambda name: None)
    result = offramp("serve", trained)
    assert result.returncode == 2
    assert (
        'expected fastapi, which is not installed; install it by pip install "offramp[serve]"'
        in (result.stderr)
    )


def test_a_certificate_of_the_model_caps_requests(offramp, trained, within, tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "certificate.json"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    made = offramp("calibrate", trained, "--corpus", text, "--epsilon", 0.5, "--out", file)
    assert made.returncode == 0, made.stderr
    stored = json.loads(file.read_text())

    def work(client):
        about = client.get("/v1/models").json()["data"][0]["offramp"]
        assert about["certificate"]["thresholds"] == stored["thresholds"]
        ask = {"prompt": PROMPT, "max_tokens": 4}
        answer = client.post("/v1/completions", json=ask).json()
        assert answer["offramp"]["confidence"] == stored["confidence"]
        refused = client.post("/v1/completions", json={**ask, "threshold": -1e9})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("threshold: expected at least")

    within(work, "--certificate", file)
