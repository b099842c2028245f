"""The states of a frozen backbone, which are computed once and kept in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.models.base import TrainableModel, whole_step

KEPT_BYTES = 1 << 30
"""Largest memory of the kept states, in bytes; a longer text is read in several portions."""
WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class KeptStates:
    """The states of some tokens of a text, and the token that follows each."""

    states: Mapping[int, Float[Tensor, "N D"]]
    "States by layer; the last one is the model's last layer."
    targets: Int[Tensor, " N"]

    def tokens(self, rows: Int[Tensor, " M"]) -> "KeptStates":
        """Return the chosen tokens only."""
        return KeptStates(
            states={layer: h[rows] for layer, h in self.states.items()}, targets=self.targets[rows]
        )


def portions(model: TrainableModel, tokens: int, seq_len: int, *, layers: int) -> list[range]:
    """Return spans of complete windows of predicted tokens, with states within ``KEPT_BYTES``."""
    size = torch.empty((), dtype=model.dtype).element_size() * model.hidden_size * layers
    length = max(1, KEPT_BYTES // (size * seq_len)) * seq_len
    return [range(first, min(first + length, tokens)) for first in range(0, tokens, length)]


@torch.no_grad()
def keep_states(
    model: TrainableModel, ids: Tensor, span: range, seq_len: int, first_tokens: Sequence[int] = ()
) -> Iterator[tuple[int, KeptStates | None]]:
    """Yield (tokens done, None), and at the end the states; windows are those of ``batches``.

    ``first_tokens`` begin every window; their states are not kept.
    """
    layers = model.exit_layers
    kept: dict[int, Tensor] = {}
    done = 0
    while done < len(span):
        rest = len(span) - done
        rows = min(WINDOWS_AT_ONCE, rest // seq_len) or 1
        length = seq_len if rest >= seq_len else rest
        first = span.start + done
        inputs = ids[first : first + rows * length].view(rows, length).to(model.device)
        begun = inputs.new_tensor(first_tokens, dtype=inputs.dtype).expand(rows, -1)
        inputs = torch.cat((begun, inputs), dim=1) if len(first_tokens) else inputs
        for layer, h in model.states_at(inputs, layers, step=whole_step(inputs)):
            if layer not in kept:
                kept[layer] = torch.empty(len(span), h.shape[-1], dtype=h.dtype, device=h.device)
            kept[layer][done : done + rows * length] = h[:, len(first_tokens) :].flatten(0, 1)
        done += rows * length
        yield done, None
    targets = ids[span.start + 1 : span.stop + 1].to(model.device)
    yield done, KeptStates(states=kept, targets=targets)
