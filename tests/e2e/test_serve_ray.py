"""offramp serve on a Ray cluster: a replica that is killed loses no answer without an error."""

import asyncio
import importlib.util
import os
import signal
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray.serve")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
PROMPTS = ["The quick", "A quick brown", "The lazy dog", "fox jumps over"]
TOKENS = 100
MARK, MARKED = "OFFRAMP_TEST_CLUSTER", uuid.uuid4().hex
"""An environment variable that the processes of this file's cluster inherit."""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("serve_load_for_ray", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def address():
    """The address of a cluster of one machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(MARK, MARKED)
        patch.setenv("RAY_worker_niceness", "0")  # on a busy machine its 15 starts nothing
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False}
        )
        yield cluster.address
        cluster.shutdown()


def replicas() -> list[psutil.Process]:
    """The processes of the replicas on this file's cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
            if "ServeReplica:offramp" in title and process.environ().get(MARK) == MARKED:
                found.append(process)
        except psutil.Error:
            continue
    return found


async def answer(script, port: int, number: int) -> tuple[str, list[int]]:
    """What becomes of a streamed request: how it ends, and the ids that it got."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": TOKENS, "stream": True}
    ids: list[int] = []
    end = "no end"
    async with asyncio.timeout(90):
        reader, writer, status = await script.post(port, body)
        if status != 200:
            writer.close()
            return f"error {status}", ids
        async for part in script.events(reader):  # a ValueError if it is cut off
            if "error" in part:
                end = "error in the stream"
                break
            ids += [token["id"] for token in part["offramp"]["tokens"]]
            if part["choices"][0]["finish_reason"]:
                end = "whole"
        writer.close()
    return end, ids


async def load(script, port: int, seconds: float, kill_after: float):
    """Ask from 4 clients for a while, and kill a replica in between.

    It is stopped for a second before, so that it holds answers that have begun.
    """
    found: list[tuple[int, str, list[int]]] = []
    began = time.monotonic()

    async def one(number: int) -> None:
        while time.monotonic() - began < seconds:
            found.append((number, *await answer(script, port, number)))

    clients = [asyncio.create_task(one(number)) for number in range(4)]
    await asyncio.sleep(kill_after)
    killed = replicas()[0]
    os.kill(killed.pid, signal.SIGSTOP)
    await asyncio.sleep(1)
    os.kill(killed.pid, signal.SIGKILL)
    await asyncio.gather(*clients)
    return found, killed.pid


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_killed_replica_loses_no_request_in_silence(script, trained, address):
    options = ("--slots", "2", "--waiting", "20", "--capacity", "128", "--replicas", "2")
    server = script.Server(str(trained), "--ray", address, *options)
    try:
        assert len(replicas()) == 2
        port = server.port

        async def work():
            alone = [await answer(script, port, number) for number in range(len(PROMPTS))]
            assert {end for end, _ in alone} == {"whole"}
            for _ in range(4):  # until the killed one had begun an answer
                found, pid = await load(script, port, seconds=8, kill_after=2)
                deadline = time.monotonic() + 90
                while True:  # two replicas again, the killed one not among them
                    alive = [each.pid for each in replicas()]
                    if len(alive) == 2 and pid not in alive:
                        break
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.5)
                if any(end != "whole" for _, end, _ in found):
                    break
            after = [await answer(script, port, number) for number in range(len(PROMPTS))]
            return alone, found, after

        alone, found, after = asyncio.run(work())
        ends = [end for _, end, _ in found]
        assert "no end" not in ends
        assert ends.count("whole") >= 4
        assert 1 <= len(ends) - ends.count("whole") <= 4, ends
        for number, end, ids in found:
            expected = alone[number][1]
            assert ids == (expected if end == "whole" else expected[: len(ids)])
        assert after == alone
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as health:
            assert health.status == 200
    finally:
        if server.process.poll() is None:
            assert server.stop() == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--replicas", "2"), "replicas: expected --ray ADDRESS with it, got --replicas 2"),
        (("--replicas", "0", "--ray", "auto"), "replicas: expected at least 1, got 0"),
        (("--ray", "ray://127.0.0.1:9"), "ray: expected auto or HOST:PORT on a machine"),
        (("--ray", "somewhere"), "ray: expected auto or HOST:PORT on a machine"),
        (("--ray", "127.0.0.1:9"), "nothing answers at 127.0.0.1:9"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(offramp, trained, option, said):
    done = offramp("serve", trained, "--port", 0, *option)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.filterwarnings("default")
def test_without_ray_serve_one_sentence_names_the_extra(offramp, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = offramp("serve", trained, "--port", 0, "--ray", "auto")
    assert done.returncode == 2
    assert 'pip install "offramp[serve-ray]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
