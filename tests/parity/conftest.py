import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offramp.models.native.static import capture


@pytest.fixture(
    params=[("pre", 4), ("pre", 2), ("post", 4), ("post", 1)],
    ids=["pre-norm", "pre-norm, 2 of 4 kv heads", "post-norm", "post-norm, 1 kv head"],
)
def model(request, make_model):
    norm, kv_heads = request.param
    return make_model(norm=norm, num_key_value_heads=kv_heads)


REFUSED = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "unique")


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if any(name.startswith(refused) for refused in REFUSED):
            raise AssertionError(f"{name} reads a number from the device")
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool and "index" in name:
                raise AssertionError(f"{name} by a mask reads how many are set")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graphs:
    """A stand-in for CUDA graphs: it records the operations of a part, and replays them.

    As in a graph, a replay reads and writes the tensors of the recording, and no Python runs. So a
    part that makes its inputs anew, or bakes a number in, gives the wrong result; one that reads a
    number from the device is refused when it is recorded. ``made`` and ``replayed`` count.
    """

    def __init__(self):
        self.made = self.replayed = 0
        self.names = set()

    def captured(self, part, *, pool, device):
        part()
        with Recording() as recording:
            out = part()
        self.made += 1
        self.names |= {func._schema.name for func, *_ in recording.calls}

        def replay():
            self.replayed += 1
            for func, args, kwargs, before in recording.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return out

        return replay


@pytest.fixture
def graphs(monkeypatch):
    """Let models whose ``few_tokens.static.capture`` is True record parts, for want of a GPU."""
    made = Graphs()
    monkeypatch.setattr(capture, "captured", made.captured)
    return made
