"""Read the states of a Hugging Face model in a pass of the whole model.

It is for models whose blocks cannot be run one by one.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedArchitectureError
from offramp.models.base import Step
from offramp.models.huggingface.calls import accepted
from offramp.models.huggingface.layout import Layout


def states_of_whole_pass(
    backbone: Any, layout: Layout, input_ids: Tensor, layers: Sequence[int], step: Step
) -> Iterator[tuple[int, Tensor]]:
    """Yield (layer, state) at each of ``layers``, ascending, (B, T, D) each."""
    last: list[Tensor] = []
    ways = [*([layout.norm] if layout.norm else []), *layout.after_norm]
    base = backbone.base_model
    first = next((module for module in ways if module in set(base.modules())), None)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        last[:] = [args[0]]

    with first.register_forward_pre_hook(note) if first else nullcontext():
        arguments = accepted(
            base,
            input_ids=input_ids,
            attention_mask=None if step.real is None else step.real.long(),
            position_ids=step.positions.expand(len(input_ids), -1),
        )
        out = base(**arguments, output_hidden_states=True, use_cache=False)
    states = out.hidden_states
    config = backbone.config.get_text_config()
    expected = config.num_hidden_layers + 1
    if states is None or len(states) != expected:
        raise UnsupportedArchitectureError(
            f"{config.model_type}: expected {expected} hidden states, got "
            f"{0 if states is None else len(states)}, so this model cannot be used"
        )
    # the first is the embedding and the last is normalised; or (Mamba) there is no embedding
    embedded = not (last and torch.equal(states[-2], last[0]))
    at: list[Tensor | None] = [*states] if embedded else [None, *states[:-1]]
    if last:
        at[-1] = last[0]
    for layer in layers:
        h = at[layer]
        if h is None:
            raise UnsupportedArchitectureError(
                f"{config.model_type}: the state before its first block cannot be read"
            )
        yield layer, h
