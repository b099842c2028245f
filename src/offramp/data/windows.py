"""The windows of a text that a model reads, and their order over steps and ranks."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.data.tokens import TokenShards
from offramp.errors import ConfigError


def batches(
    ids: Int[Tensor, " N"],
    *,
    seq_len: int,
    batch_size: int,
    drop_last: bool = False,
    order: torch.Generator | None = None,
    first: Sequence[int] = (),
) -> Iterator[tuple[Int[Tensor, "B S"], Int[Tensor, "B T"]]]:
    """Yield (inputs, targets) of contiguous windows that do not overlap.

    ``first`` are ids that begin the inputs of every window and have no target; the targets are
    those of the last T inputs.

    The windows are in the order of the text, or in a random order drawn from ``order``. Every
    token except the first is a target once. With ``drop_last``, incomplete windows and batches
    are dropped, as in the seed document's protocol; otherwise they come last, with smaller
    shapes.
    """
    predictions = len(ids) - 1
    whole = max(predictions, 0) // seq_len
    inputs = ids[: whole * seq_len].view(whole, seq_len)
    targets = ids[1 : whole * seq_len + 1].view(whole, seq_len)
    end = whole // batch_size * batch_size if drop_last else whole
    rows = torch.arange(whole) if order is None else torch.randperm(whole, generator=order)
    for start in range(0, end, batch_size):
        chosen = rows[start : min(start + batch_size, end)]
        yield _begin(inputs[chosen], first), targets[chosen]
    if not drop_last and predictions > whole * seq_len:
        rest = ids[whole * seq_len :]
        yield _begin(rest[None, :-1], first), rest[None, 1:]


def _begin(inputs: Int[Tensor, "B T"], first: Sequence[int]) -> Int[Tensor, "B S"]:
    """Put tokens before every row."""
    if not first:
        return inputs
    return torch.cat((inputs.new_tensor(first).expand(len(inputs), -1), inputs), dim=1)


class TokenWindows:
    """The complete windows of a text with random access, in memory or on disk.

    Window i contains tokens i * seq_len to (i + 1) * seq_len - 1; its targets are shifted by
    one token. An incomplete last window is dropped. ``first`` is that of ``batches``.
    """

    def __init__(
        self,
        tokens: Int[Tensor, " N"] | TokenShards,
        *,
        seq_len: int,
        first: Sequence[int] = (),
    ) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len: expected at least 1, got {seq_len}")
        self.tokens, self.seq_len, self.first = tokens, seq_len, tuple(first)

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.seq_len

    def __getitem__(self, index: int) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
        """Return (inputs, targets) of one window."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index}: expected one of {len(self)}")
        start = index % len(self) * self.seq_len
        stop = start + self.seq_len + 1
        tokens = self.tokens
        ids = tokens[start:stop] if isinstance(tokens, Tensor) else tokens.read(start, stop)
        return ids[:-1], ids[1:]

    def batch(
        self, indices: Int[Tensor, " B"] | Sequence[int]
    ) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B T"]]:
        """Return (inputs, targets) of these windows; ``indices`` must not be empty."""
        windows = [self[int(index)] for index in indices]
        inputs, targets = (torch.stack(part) for part in zip(*windows, strict=True))
        return _begin(inputs, self.first), targets


def num_batches(num_windows: int, *, batch_size: int) -> int:
    """Return the number of complete batches in an epoch."""
    return num_windows // batch_size


def batch_indices(
    num_windows: int,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
) -> Iterator[Int[Tensor, " B"]]:
    """Return the windows that a rank reads at each step of an epoch, from step ``start`` on.

    The order depends only on (seed, epoch), so a run can resume at any step without replaying
    earlier ones. ``batch_size`` is the number of windows over all ranks: the global batch does
    not depend on ``world_size``, and each rank reads a contiguous part of it. An incomplete
    batch is dropped.

    Raises ConfigError immediately if ``world_size`` does not divide ``batch_size`` or if ``rank``
    is out of range.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("world_size", world_size, 1),
        ("epoch", epoch, 0),
        ("start", start, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
    if batch_size % world_size:
        raise ConfigError(
            f"batch_size: expected a multiple of the world size {world_size}, got {batch_size}"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    order = _order(num_windows, seed=seed, epoch=epoch) if shuffle else torch.arange(num_windows)
    share = batch_size // world_size
    steps = range(start, num_batches(num_windows, batch_size=batch_size))
    firsts = (step * batch_size + rank * share for step in steps)
    return (order[first : first + share] for first in firsts)


def _order(num_windows: int, *, seed: int, epoch: int) -> Int[Tensor, " N"]:
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(num_windows, generator=generator)
