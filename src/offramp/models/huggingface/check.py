"""Compare blocks that run one by one with the whole Hugging Face model.

``disagreement`` compares a few tokens in the model itself. What only a longer sequence shows
(windows, chunks, rotary factors that change, padding, a cache that is filled in parts) is compared
in a small random model of the same architecture, once per config: ``trial``.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from offramp.data.hub import one_line
from offramp.models.base import Step, whole_step
from offramp.models.huggingface.calls import close, plain_pass
from offramp.models.huggingface.layout import TOKENS, decoder_config, longest_of, watch
from offramp.models.huggingface.library import quiet
from offramp.models.huggingface.runner import BlockRunner
from offramp.models.huggingface.shared import KeysValues
from offramp.models.huggingface.small import small_config
from offramp.models.huggingface.step_cache import Shape, StepCache

LENGTH, PROMPT, CHUNK, SHORTER = 36, 12, 7, 5
"""Tokens of the longer sequence, of its prompt, and of the next call; the other row has fewer."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the small model showed: clauses after "since", empty where all is equal."""

    why_no_blocks: str = ""
    why_no_cache: str = ""


@torch.no_grad()
def disagreement(runner: BlockRunner) -> str:
    """Return why blocks that run one by one do not give the model's states; empty if they do.

    In that case it also tests whether they run with a cache, and sets the runner's
    ``why_no_cache``.
    """
    layout = runner.layout
    ids, last = layout.ids, len(layout.blocks)
    step = Step(positions=torch.arange(TOKENS, device=ids.device)[None])
    try:
        h = runner.embed(ids, step)
        given = runner.given(h, step, shapes := _Shapes(step, TOKENS, {}))
        h = runner.through(h, 0, last, given)
    except Exception as error:  # depends on the architecture
        return f"its blocks fail when they are run one by one: {one_line(error)}"
    if not close(h, layout.last_state):
        return "its blocks give other states when they are run one by one"
    runner.shapes = {index: _shape(*pairs[0]) for index, pairs in shapes.seen.items()}
    if not shapes.seen or any(len(pairs) > 1 for pairs in shapes.seen.values()):
        runner.why_no_cache = "its blocks do not pass their keys and values once to a cache"
        return ""
    for name, pair in given.shared.items():
        source = next((i for i, [own] in shapes.seen.items() if _are(pair, own)), None)
        if source is None:
            runner.why_no_cache = "its blocks share something else than their keys and values"
            return ""
        runner.sources[name] = source
    try:
        equal = _equal_with_cache(
            runner, (ids[0], ids[0, :-2]), (h[0], h[0, :-2]), prompt=4, chunk=0
        )
    except Exception as error:
        runner.why_no_cache = f"its blocks fail with a cache: {one_line(error)}"
        return ""
    if not equal:
        runner.why_no_cache = "its blocks give other states with a cache"
    return ""


def trial(backbone: Any) -> Trial:
    """Compare a small random model of the same architecture, once per config."""
    config = backbone.config
    attention = config._attn_implementation
    try:
        with quiet():
            small = small_config(config)
        key = json.dumps(small.to_dict(), sort_keys=True, default=repr)
    except Exception as error:
        return _unknown(error)
    kind: Any = type(backbone)
    return _trial(kind, attention, key, _Unhashed(small))


def _unknown(error: Exception) -> Trial:
    return Trial(why_no_blocks=f"a small copy of it cannot be tested: {one_line(error)}")


class _Unhashed:
    """A value that all others equal, so that a cache ignores it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=64)
def _trial(kind: Any, attention: str, key: str, small: _Unhashed) -> Trial:
    try:
        with quiet(), torch.no_grad():
            lm = random_model(kind, small.value, attention)
    except Exception as error:
        return _unknown(error)
    try:
        config = decoder_config(lm)
        runner = BlockRunner(lm, watch(lm, config), longest=longest_of(config))
        if why := disagreement(runner):
            return Trial(why_no_blocks=why)
        return _compare(runner)
    except Exception as error:
        return Trial(why_no_blocks=f"its blocks fail in a small copy of it: {one_line(error)}")


def random_model(kind: Any, config: Any, attention: str | None = None) -> Any:
    """Return a float32 model whose parameters, norms and biases included, are all random."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        options = {} if attention is None else {"attn_implementation": attention}
        lm = kind._from_config(config, **options).eval().float()
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm


@torch.no_grad()
def _compare(runner: BlockRunner) -> Trial:
    length = min(LENGTH, runner.longest.positions)
    random = torch.Generator().manual_seed(0)
    most = min(290, runner.layout.head.out_features)
    device = runner.layout.head.weight.device
    long, short = rows = tuple(
        torch.randint(3, most, (n,), generator=random, device="cpu").to(device)
        for n in (length, length - SHORTER)
    )
    modules = runner.layout.block_modules
    of_long, of_short = (
        [runner.layout.state_of(out) for out in plain_pass(runner.lm, ids[None], modules)]
        for ids in rows
    )
    step = whole_step(long[None])
    h = runner.embed(long[None], step)
    for layer, expected in enumerate(of_long):
        h = runner.run(h, layer, layer + 1, step)
        if not close(h, expected):
            return Trial(
                why_no_blocks=f"its blocks give other states in a sequence of {length} tokens (in "
                "a small copy of it) when they are run one by one"
            )
    for left in (True, False):
        ids, real = padded(long, short, left=left)
        step = whole_step(ids, real=real)
        h = runner.run(runner.embed(ids, step), 0, len(of_long), step)
        if not (close(h[0], of_long[-1][0]) and close(h[1][real[1]], of_short[-1][0])):
            return Trial(why_no_blocks="its blocks give other states in a padded batch")
    if runner.why_no_cache:
        return Trial(why_no_cache=runner.why_no_cache)
    last = (of_long[-1][0], of_short[-1][0])
    try:
        equal = _equal_with_cache(runner, rows, last, prompt=PROMPT, chunk=CHUNK)
        equal = equal and _projects(runner, long, of_long)
    except Exception as error:
        return Trial(why_no_cache=f"its blocks fail with a cache: {one_line(error)}")
    return Trial(why_no_cache="" if equal else "its blocks give other states with a cache")


def padded(long: Tensor, short: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return two rows as one batch (2, T), and False where the second is padding."""
    gap = len(long) - len(short)
    pad = torch.full_like(long[:gap], 11)
    ids = torch.stack((long, torch.cat((pad, short) if left else (short, pad))))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :gap] = not left
    if not left:
        real[1, len(short) :] = False
    return ids, real


def _equal_with_cache(
    runner: BlockRunner,
    rows: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    *,
    prompt: int,
    chunk: int,
) -> bool:
    """Return whether two rows with a cache give the states ``expected`` (T, D) of each.

    They start as a padded prompt, go on by ``chunk`` tokens and then one by one, and after a crop
    by two tokens in the reverse order of rows.
    """
    long, short = rows
    device, last = long.device, len(runner.layout.blocks)
    behind = torch.tensor([[0], [len(long) - len(short)]], device=device)
    cache = runner.make_cache(2, len(long))

    def equal(ids: Tensor, step: Step, order: tuple[int, ...] = (0, 1)) -> bool:
        h = runner.run(runner.embed(ids, step), 0, last, step)
        real = torch.ones_like(ids, dtype=torch.bool) if step.real is None else step.real
        return all(
            close(h[at, real[at]], expected[row][step.positions[at, real[at]]])
            for at, row in enumerate(order)
        )

    ids, real = padded(long[:prompt], short[: prompt - int(behind[1])], left=True)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    if not equal(ids, Step(positions=positions, real=real, cache=cache)):
        return False
    bounds = sorted({prompt, prompt + chunk, *range(prompt + chunk, len(long) + 1)})
    for start, stop in pairwise(bounds):
        positions = torch.arange(start, stop, device=device)[None] - behind
        ids = torch.stack([row[at] for row, at in zip(rows, positions, strict=True)])
        if not equal(ids, Step(positions=positions, cache=cache)):
            return False
    cut = len(short) - 2
    cache.crop(cut)
    positions = torch.arange(cut, len(short), device=device)[None].expand(2, -1)
    step = Step(positions=positions, cache=cache, rows=torch.tensor([1, 0], device=device))
    return equal(torch.stack((short[cut:], long[cut : len(short)])), step, (1, 0))


def _projects(runner: BlockRunner, ids: Tensor, states: list[Tensor]) -> bool:
    """Return whether ``project_kv`` writes the keys and values that ``run`` writes."""
    caches = [runner.make_cache(1, len(ids)) for _ in range(2)]
    positions = torch.arange(len(ids), device=ids.device)[None]
    steps = [Step(positions=positions, cache=cache) for cache in caches]
    h, _ = (runner.embed(ids[None], step) for step in steps)
    runner.run(h, 0, len(states), steps[0])
    for layer, state in enumerate((h, *states[:-1])):
        runner.project_kv(state, layer, layer + 1, steps[1])
    return close(caches[1].keys, caches[0].keys) and close(caches[1].values, caches[0].values)


class _Shapes(StepCache):
    """Records the keys and values of each block without storing them."""

    __slots__ = ("seen",)

    def __init__(self, step: Step, end: int, shapes: Mapping[int, Shape]) -> None:
        super().__init__(step, end, shapes)
        self.seen: dict[int, list[KeysValues]] = defaultdict(list)

    @property
    def used(self) -> bool:
        """True, so that every block passes its keys and values."""
        return True

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Return the keys and values unchanged."""
        self.seen[self.block].append((k, v))
        return k, v


def _shape(k: Tensor, v: Tensor) -> Shape:
    return k.shape[1], k.shape[-1], v.shape[-1]


def _are(pair: KeysValues, own: KeysValues) -> bool:
    return pair[0] is own[0] and pair[1] is own[1]
