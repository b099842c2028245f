"""Tensors of fixed shape and place from which the static steps read the tokens of a call."""

import weakref

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offramp.models.base import Step


def padded(count: int) -> int:
    """Return the smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


class Inputs:
    """The states, slots, rows and activity of up to B x T tokens.

    Padding has the slot ``spare``, which is written and never read. ``whole`` inputs are those of
    all rows of the cache in order.
    """

    def __init__(
        self, shape: tuple[int, int], *, width: int, spare: int, whole: bool, like: Tensor
    ) -> None:
        batch, device = shape[0], like.device
        with torch.inference_mode(False):  # so that they can be filled in every mode
            self.h = torch.zeros(*shape, width, dtype=like.dtype, device=device)
            self.slots = torch.full(shape, spare, device=device)
            self.rows = torch.arange(batch, device=device) * whole
            self.active = torch.zeros(shape, dtype=torch.bool, device=device)
        self.spare = spare
        self._step: weakref.ref[Step] | None = None

    def fill(
        self, h: Float[Tensor, "B T D"], step: Step, active: Bool[Tensor, "B T"] | None
    ) -> None:
        """Copy the tokens of a call into these tensors; the step's own only once in a row."""
        batch, tokens = h.shape[:2]
        with torch.no_grad():
            if self._step is None or self._step() is not step:
                if self.slots.shape != (batch, tokens):
                    self.slots.fill_(self.spare)
                self.slots[:batch, :tokens].copy_(step.positions)
                if step.rows is not None:
                    self.rows[:batch].copy_(step.rows)
                self._step = weakref.ref(step)
            self.h[:batch, :tokens].copy_(h)
            if active is not None:
                self.active[:batch, :tokens].copy_(active)
