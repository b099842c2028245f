"""The stand-in of the hub, and models to push."""

import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hub_stand_in import TOKEN, Hub, handler


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) as listening:
        listening.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield hub
        listening.shutdown()


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> Hub:
    """The stand-in, empty, with a token that may write and an empty cache."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for part in (server.repositories, server.objects, server.calls, server.fail):
        part.clear()
    return server


@pytest.fixture(scope="session")
def text(checkpoint) -> Path:
    return checkpoint / "text.txt"


@pytest.fixture(scope="session")
def frozen(offramp, checkpoint, text, tmp_path_factory) -> Path:
    """Exits on a frozen backbone, whose folder offramp.json names."""
    out = tmp_path_factory.mktemp("private-place") / "tuned"
    flags = ("--exits", "1,2", "--exit-head", "norm", "--epochs", 1, "--tokens", 400)
    result = offramp("tune", checkpoint, "--corpus", text, *flags, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def unfrozen(offramp, checkpoint, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("private-place") / "unfrozen"
    flags = ("--exits", "2", "--unfreeze", "--epochs", 1, "--seq-len", 32, "--tokens", 400)
    result = offramp("tune", checkpoint, "--corpus", text, *flags, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def quantised(offramp, frozen, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("private-place") / "int8"
    result = offramp("quantise", frozen, "--weights", "int8", "--out", out)
    assert result.returncode == 0, result.stderr
    return out
