"""The native decoder's steps of a few tokens on a GPU: fixed shapes, replayed as CUDA graphs.

Eager PyTorch launches each of the small kernels of a token by itself, which takes longer than they
run. Here all blocks up to the next exit, and each exit's head, are one graph. Graphs are made when
they are first needed, for 1, 2, 4, 8 or 16 rows, and as many tokens of a row; fewer are padded. The
slots that a token may read are those up to the largest position of the call, rounded up to a power
of two, so that there are few graphs. On a CPU the same functions run as they are, for tests.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from offramp.models.base import FEW_TOKENS, Step
from offramp.models.checks import require_cache
from offramp.models.exit_heads import ExitHead
from offramp.models.kv_cache import KVCache
from offramp.models.native.fast.products import Weight
from offramp.models.native.fast.steps import FastSteps
from offramp.models.native.fast.tokens import Tables
from offramp.models.native.fast.weights import Weights
from offramp.models.native.quantised import linear
from offramp.models.native.static import capture
from offramp.models.native.static.caches import FEWEST_SLOTS, Caches, OfCache
from offramp.models.native.static.inputs import Inputs, padded
from offramp.models.native.static.segment import Form, Memory, Segment


class StaticSteps:
    """Runs calls of a few tokens with a cache, without gradients, in fixed shapes.

    It takes the weights of ``fast``, which runs the same calls on a CPU. Graphs of blocks are kept
    with their cache, and those of heads here. They read parameters where they are, so they follow
    a change in place; those of tensors that were replaced are dropped: see ``BlockWeights``.
    """

    def __init__(self, fast: FastSteps) -> None:
        self._fast = fast
        self.capture: bool | None = None
        "Whether parts run as CUDA graphs; None: on a GPU."
        self.caches = Caches()
        self._heads: dict[Any, tuple[Any, Tensor, capture.Part]] = {}
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the graphs; a copy makes its own."""
        return {**vars(self), "_heads": {}, "_pool": None, "caches": Caches()}

    def fit(self, h: Tensor) -> bool:
        """Return whether these steps run calls on ``h`` (B, T, D).

        They are of few tokens, without gradients, and in the precision of the weights, which are
        not quantised: the products of those are not made for a GPU.
        """
        return (
            h.shape[0] * h.shape[1] <= FEW_TOKENS
            and not torch.is_grad_enabled()
            and self._dtype is h.dtype
        )

    def fills_beside(self, tokens: int) -> bool:
        """Return whether ``run`` projects keys and values of inactive tokens at no cost."""
        return tokens <= FEW_TOKENS and self._dtype is not None

    @property
    def _dtype(self) -> torch.dtype | None:
        """The precision of the weights; None if they are quantised, or shards of a parallel run."""
        block: Any = self._fast.blocks[0]
        weight = block.self_attn.q_proj.weight
        return weight.dtype if type(weight) in (Tensor, nn.Parameter) else None

    def run(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        end: int,
        tables: Tables,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run blocks start+1 .. stop. Keys are at positions 0 .. end - 1, which ``tables`` cover.

        All tokens run; those that are not ``active`` keep their state.
        """
        if start == stop:
            return h

        def part(segment: Segment, weights: Weights) -> Tensor:
            return segment.run(weights.blocks, start, stop, active=active is not None)

        key = ("run", start, stop, active is not None)
        out = self._on_cache(key, part, h, step, end, tables, active)
        assert out is not None
        return out[: h.shape[0], : h.shape[1]].clone()

    def project_kv(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        end: int,
        tables: Tables,
    ) -> None:
        """Write only the keys and values of blocks start+1 .. stop that have their own."""
        stop = min(stop, len(require_cache(step).keys))
        if start >= stop:
            return

        def part(segment: Segment, weights: Weights) -> None:
            segment.project_kv(weights.blocks, start, stop)

        self._on_cache(("project_kv", start, stop), part, h, step, end, tables, None)

    def logits(
        self,
        h: Float[Tensor, "B T D"],
        norm: nn.Module | ExitHead,
        weight: Weight,
        vocab: Int[Tensor, " W"] | None,
    ) -> Float[Tensor, "B T _"]:
        """Return the logits of a few tokens, by a norm or exit head and an LM head's weight.

        Only the logits of the tokens in ``vocab`` are computed; None for all.
        """
        rows = weight if vocab is None else self._fast.rows.of(weight, vocab)
        count = h.shape[0] * h.shape[1]
        tensors = (*norm.parameters(), rows if isinstance(rows, Tensor) else rows.values)
        places = [tensor.data_ptr() for tensor in tensors]
        key = (id(norm), vocab is None, padded(count), h.dtype, h.device)
        held = self._heads.get(key)
        if held is None or held[0][0] != places:
            with torch.inference_mode(False):
                x = torch.zeros(padded(count), h.shape[-1], dtype=h.dtype, device=h.device)
            run = self._runner(lambda: linear(norm(x), rows), h)
            kept = (places, norm, [tensor.detach() for tensor in tensors])
            held = self._heads[key] = (kept, x, run)
        _, x, run = held
        x[:count].copy_(h.reshape(count, -1))
        out = run()
        assert out is not None
        return out[:count].clone().view(*h.shape[:2], -1)

    def _on_cache(
        self,
        key: tuple[Any, ...],
        part: Callable[[Segment, Weights], Tensor | None],
        h: Tensor,
        step: Step,
        end: int,
        tables: Tables,
        active: Tensor | None,
    ) -> Tensor | None:
        """Run a part of the blocks on the tokens of a call; return its result, still padded."""
        cache = require_cache(step)
        of, whole = self._of(cache, tables), step.rows is None
        batch, tokens = h.shape[:2]
        shape = (batch if whole else padded(batch), padded(tokens))
        inputs = of.inputs.get((shape, whole))
        if inputs is None:
            about: Any = {"width": h.shape[-1], "spare": cache.capacity, "like": h}
            inputs = of.inputs[shape, whole] = Inputs(shape, whole=whole, **about)
        inputs.fill(h, step, active)
        slots = min(cache.capacity, max(FEWEST_SLOTS, padded(end)))
        key = (*key, shape, whole, slots)
        run = of.parts.get(key)
        if run is None:
            memory, weights, form = of.memory, of.weights, self._form  # and not the cache itself

            def with_segment() -> Tensor | None:
                segment = Segment(inputs, memory, form, end=slots, whole=whole)
                return part(segment, weights)

            run = of.parts[key] = self._runner(with_segment, h)
        return run()

    def _of(self, cache: KVCache, tables: Tables) -> OfCache:
        weights = self._fast.weights.of(cache)
        kept: OfCache | None = cache.memo.get(OfCache)
        if kept is None or not kept.current(weights, cache, tables):
            memory = Memory(
                keys=cache.keys,
                values=cache.values,
                lengths=cache.lengths,
                cos=tables[0],
                sin=tables[1],
            )
            kept = OfCache(weights=weights, memory=memory)
            self.caches.keep(cache, kept)
        return kept

    def _runner(self, part: capture.Part, h: Tensor) -> capture.Part:
        if not (h.is_cuda if self.capture is None else self.capture):
            return part
        if self._pool is None:
            self._pool = capture.new_pool()
        return capture.captured(part, pool=self._pool, device=h.device)

    @property
    def _form(self) -> Form:
        fast = self._fast
        return Form(eps=fast.eps, head_dim=fast.head_dim, kv_heads=fast.kv_heads, post=fast.post)
