"""The training loss: a weighted sum of the exits' cross-entropies, in chunks of tokens.

The logits of several exits over a large vocabulary are never in memory together. For each chunk
of tokens at each exit, the forward pass computes the logits, the loss and the gradients, and then
frees the logits; the backward pass only scales the gradients. The gradients equal those of the
plain loss, no matrix product is computed twice, and the memory is that of one chunk of logits and
one gradient of the head. (Liger's fused linear cross-entropy does the same for one linear head on
a GPU; this one supports any callable head, several exits, and self-distillation.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Unembed = Callable[[Tensor, int], Tensor]

CHUNK_LOGITS = 4_000_000
"""Largest number of logits of a chunk; 16 MB in float32, about the size of a processor's cache."""
MIN_CHUNK = 512
"""Smallest number of tokens of a chunk; with fewer, matrix products are inefficient."""


def weighted_exit_loss(
    states: Mapping[int, Float[Tensor, "B T D"]],
    unembed: Unembed,
    targets: Int[Tensor, "B T"],
    weights: Mapping[int, float],
    parameters: Sequence[Tensor],
    *,
    vocab_size: int,
    distill: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[int, Float[Tensor, ""]]]:
    """Return the sum of weight x CE over the layers, in nats per token, and the CE of each layer.

    ``parameters`` are those of the heads that need a gradient (``head_parameters`` finds them).
    The CEs by layer are detached. With ``distill``, every layer below the deepest of ``states``
    adds distill x weight x temperature^2 x KL(p_deepest || p_layer) at that temperature; the
    teacher is detached (Hinton et al. 2015; Zhang et al. 2019, "Be Your Own Teacher").
    """
    layers = sorted(weights)
    plan = _Plan(
        layers=tuple(layers),
        weights=tuple(weights[layer] for layer in layers),
        unembed=unembed,
        chunk_tokens=max(MIN_CHUNK, CHUNK_LOGITS // vocab_size),
        vocab_size=vocab_size,
        distill=distill,
        temperature=temperature,
    )
    flat = [states[layer].flatten(0, 1) for layer in layers]
    total, *parts = cast(
        "tuple[Tensor, ...]",
        _ChunkedLoss.apply(plan, targets.flatten(), *flat, *parameters),  # type: ignore[no-untyped-call]
    )
    return total, dict(zip(layers, parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class _ChunkLoss:
    """One layer's loss on a chunk; ``grad`` is the gradient of ``loss`` by ``logits``."""

    index: int
    logits: Tensor
    grad: Tensor
    loss: Tensor
    cross_entropy: Tensor


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The arguments of the loss that are not differentiated."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    unembed: Unembed
    chunk_tokens: int
    vocab_size: int
    distill: float
    temperature: float

    def chunk(
        self, states: Sequence[Tensor], targets: Tensor, tokens: int, room: Tensor
    ) -> Iterator[_ChunkLoss]:
        """Yield the loss of each layer on a chunk of a batch of ``tokens`` tokens.

        ``room`` is a buffer for the gradient by the logits of one layer at a time. Allocating
        this memory for each layer would take as long as the softmax.
        """
        teacher: Tensor | None = None
        if self.distill and len(states) > 1:
            with torch.no_grad():
                logits = self.logits(states[-1], len(states) - 1)
                teacher = F.softmax(logits / self.temperature, dim=-1)
        for index, (h, weight) in enumerate(zip(states, self.weights, strict=True)):
            logits = self.logits(h, index)
            taught = teacher if index < len(states) - 1 else None
            yield self.loss(index, weight, logits, targets, taught, tokens, room)

    def logits(self, h: Tensor, index: int) -> Tensor:
        """Return the logits (n, V) of states (n, D), in float32 or a wider type."""
        logits = self.unembed(h[None], self.layers[index]).squeeze(0)  # [0] would copy its gradient
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def loss(
        self,
        index: int,
        weight: float,
        logits: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        tokens: int,
        room: Tensor,
    ) -> _ChunkLoss:
        """Return the loss and its gradient by explicit formulas.

        The gradient is p, minus 1 at the target, and T (q_T - p_T) for a teacher p_T. Autograd
        would pass over the logits five more times. The log of the normaliser is computed at the
        largest logit, whose probability is at least 1 / V.
        """
        grad = torch.softmax(logits, dim=-1, out=room[: len(logits)])
        normaliser = logits.amax(dim=-1, keepdim=True) - grad.amax(dim=-1, keepdim=True).log()
        cross_entropy = (normaliser - logits.gather(1, targets[:, None])).sum()
        grad[torch.arange(len(targets), device=grad.device), targets] -= 1.0
        loss = cross_entropy
        if teacher is not None:
            student = F.log_softmax(logits / self.temperature, dim=-1)
            gap = F.kl_div(student, teacher, reduction="sum")
            loss = loss + self.distill * self.temperature**2 * gap
            grad += student.exp_().sub_(teacher).mul_(self.distill * self.temperature)
        return _ChunkLoss(
            index=index,
            logits=logits,
            grad=grad.mul_(weight / tokens),
            loss=weight * loss / tokens,
            cross_entropy=cross_entropy / tokens,
        )


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients of the states and heads in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, targets: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(plan.layers)
        states, parameters = tensors[:count], tensors[count:]
        wanted = ctx.needs_input_grad[2:]
        tokens = len(targets)
        dtype = torch.promote_types(states[0].dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=targets.device)
        parts = [torch.zeros_like(total) for _ in states]
        grads: list[Tensor | None] = [
            torch.empty_like(tensor) if want else None
            for tensor, want in zip(states, wanted[:count], strict=True)
        ]
        grads += [
            torch.zeros_like(tensor) if want else None
            for tensor, want in zip(parameters, wanted[count:], strict=True)
        ]
        room = states[0].new_empty(min(tokens, plan.chunk_tokens), plan.vocab_size, dtype=dtype)
        for start in range(0, tokens, plan.chunk_tokens):
            rows = slice(start, min(start + plan.chunk_tokens, tokens))
            with torch.set_grad_enabled(any(wanted)):
                pieces = [state[rows].detach().requires_grad_(any(wanted)) for state in states]
                for part in plan.chunk(pieces, targets[rows], tokens, room):
                    total += part.loss
                    parts[part.index] += part.cross_entropy
                    if any(wanted):
                        _accumulate(part, pieces[part.index], parameters, rows, grads)
        ctx.mark_non_differentiable(*parts)
        ctx.grads = grads
        return total, *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if held is None else held.mul_(grad) for held in ctx.grads]
        del ctx.grads
        return None, None, *scaled


def _accumulate(
    part: _ChunkLoss,
    piece: Tensor,
    parameters: Sequence[Tensor],
    rows: slice,
    grads: list[Tensor | None],
) -> None:
    """Add one chunk's gradients to the state's rows and to the heads' parameters."""
    first = len(grads) - len(parameters)
    needed = [place for place in range(first, len(grads)) if grads[place] is not None]
    inputs = [piece, *(parameters[place - first] for place in needed)]
    of_piece, *of_parameters = torch.autograd.grad(
        part.logits, inputs, part.grad, allow_unused=True
    )
    held = grads[part.index]
    if held is not None:
        held[rows] = of_piece
    for place, found in zip(needed, of_parameters, strict=True):
        held = grads[place]
        if held is not None and found is not None:
            held += found


def head_parameters(
    unembed: Unembed,
    layers: Iterable[int],
    parameters: Mapping[str, Tensor],
    *,
    hidden_size: int,
) -> tuple[str, ...]:
    """Return the names of the parameters that ``unembed`` uses and that need a gradient."""
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    if not trained:
        return ()
    some = next(iter(trained.values()))
    h = torch.zeros(1, 1, hidden_size, device=some.device, dtype=some.dtype)
    with torch.enable_grad():
        loss = sum((unembed(h, layer).float().sum() for layer in layers), torch.zeros(()))
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return ()
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return tuple(name for name, grad in zip(trained, grads, strict=True) if grad is not None)
