"""Making a CUDA graph, against stand-ins for what PyTorch offers on a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from offramp.models.native.static import capture


@pytest.fixture
def gpu(monkeypatch):
    """PyTorch's CUDA graphs, whose events are noted; ``fails`` makes a capture fail."""
    events = []
    made = SimpleNamespace(events=events, fails=False)

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    class Graph:
        def replay(self):
            events.append("replay")

    @contextmanager
    def stream(side):
        events.append("aside")
        yield

    @contextmanager
    def graph(held, *, pool, capture_error_mode):
        events.append(f"capture into {pool}")
        yield
        if made.fails:
            raise RuntimeError("operation not permitted")

    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


def test_a_graph_is_made_after_a_run_aside_and_then_only_replayed(gpu):
    x = torch.zeros(1)

    def part():
        gpu.events.append("run")
        return x.add_(1)

    run = capture.runner(part, capture=True, pool="pool")
    assert gpu.events == ["wait", "aside", "run", "wait", "capture into pool", "run"]
    del gpu.events[:]
    assert run() is x
    assert run() is x
    assert gpu.events == ["replay", "replay"]


def test_a_part_that_cannot_be_captured_runs_without_a_graph(gpu):
    gpu.fails = True

    def part():
        return torch.ones(1)

    with pytest.warns(UserWarning, match="runs without one, more slowly: operation not permitted"):
        run = capture.runner(part, capture=True, pool=None)
    assert run is part


def test_a_part_runs_as_it_is_on_a_cpu(gpu):
    def part():
        return None

    assert capture.runner(part, capture=False) is part
    assert gpu.events == []
    assert torch.cuda.is_available() or capture.new_pool() is None
