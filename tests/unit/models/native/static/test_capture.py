"""Making a CUDA graph, against stand-ins for what PyTorch offers on a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from offramp.models.native.static import capture

GPU = torch.device("cuda", 1)


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
    def device(place):
        events.append(str(place))
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
        "device": device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


def test_a_graph_is_made_after_a_run_aside_and_then_only_replayed(gpu):
    x = torch.zeros(1)

    def part():
        gpu.events.append("run")
        return x.add_(1)

    run = capture.captured(part, pool="pool", device=GPU)
    aside, captured = ["wait", "aside", "run", "wait"], ["capture into pool", "run"]
    assert gpu.events == ["cuda:1", *aside, *captured]
    del gpu.events[:]
    assert run() is x
    assert run() is x
    assert gpu.events == ["replay", "replay"]


def test_a_part_that_cannot_be_captured_runs_without_a_graph(gpu):
    gpu.fails = True

    def part():
        return torch.ones(1)

    with pytest.warns(UserWarning, match="runs without one, more slowly: operation not permitted"):
        run = capture.captured(part, pool=None, device=GPU)
    assert run is part


def test_a_pool_needs_a_gpu():
    assert torch.cuda.is_available() or capture.new_pool() is None
