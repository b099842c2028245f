"""Read the states of a Hugging Face model in a pass of the whole model.

It is for models whose blocks cannot be run one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from offramp.data.hub import one_line
from offramp.errors import UnsupportedArchitectureError
from offramp.models.base import Step
from offramp.models.checks import check_ids
from offramp.models.huggingface.calls import accepted, close, plain_pass
from offramp.models.huggingface.layout import Layout, decoder_config


def states_of_whole_pass(
    backbone: Any, layout: Layout, input_ids: Tensor, layers: Sequence[int], step: Step
) -> Iterator[tuple[int, Tensor]]:
    """Yield (layer, state) at each of ``layers``, ascending, (B, T, D) each.

    Rows with padding run alone and without it, since many architectures attend to padding, count
    it as positions or mix it into a recurrent state. States of padding are zeros.
    """
    if step.real is None or bool(step.real.all()):
        states = _states(backbone, layout, input_ids)
        yield from ((layer, _at(states, layer, backbone)) for layer in layers)
        return
    rows = [
        _states(backbone, layout, ids[real][None])
        for ids, real in zip(input_ids, step.real, strict=True)
    ]
    for layer in layers:
        known = [_at(states, layer, backbone)[0] for states in rows]
        h = known[0].new_zeros(*input_ids.shape, known[0].shape[-1])
        yield layer, h.masked_scatter(step.real[..., None], torch.cat(known))


def _at(states: Sequence[Tensor | None], layer: int, backbone: Any) -> Tensor:
    h = states[layer]
    if h is None:
        kind = decoder_config(backbone).model_type
        raise UnsupportedArchitectureError(
            f"{kind}: the state before its first block cannot be read"
        )
    return h


def _states(backbone: Any, layout: Layout, input_ids: Tensor) -> list[Tensor | None]:
    """Return the states (B, T, D) before the first block, if it is known, and after each."""
    last: list[Tensor] = []
    ways = [*([layout.norm] if layout.norm else []), *layout.after_norm]
    base = backbone.base_model
    first = next((module for module in ways if module in set(base.modules())), None)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        last[:] = [args[0]]

    config = decoder_config(backbone)
    with first.register_forward_pre_hook(note) if first else nullcontext():
        options = accepted(base, use_cache=False)
        try:
            out = base(input_ids=input_ids, output_hidden_states=True, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # depends on the architecture
            check_ids(input_ids, layout.head.out_features)
            raise UnsupportedArchitectureError(
                f"{config.model_type}: a pass of the whole model over {input_ids.shape[0]} x "
                f"{input_ids.shape[1]} tokens fails: {one_line(error)}"
            ) from error
    states = out.hidden_states
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
    return at


@torch.no_grad()
def require_whole(backbone: Any, layout: Layout, unembed: Callable[[Tensor], Tensor]) -> None:
    """Raise UnsupportedArchitectureError unless states of whole passes give the model's logits.

    The states are also compared with the outputs of the blocks, if these are known.
    """
    kind = decoder_config(backbone).model_type
    states = _states(backbone, layout, layout.ids)
    for layer, state in enumerate(states):
        if state is not None and state.shape != layout.last_state.shape:
            raise UnsupportedArchitectureError(
                f"{kind}: expected a hidden state (B, T, D) after each block, got one of shape "
                f"{tuple(state.shape)} at {layer} for 1 x {layout.ids.shape[1]} tokens"
            )
    last = states[-1]
    if last is None or not close(unembed(last), layout.logits):
        raise UnsupportedArchitectureError(
            f"{kind}: unknown computation between the last state and the logits, so logits at "
            "exits cannot be computed"
        )
    outputs = plain_pass(backbone, layout.ids, layout.block_modules)
    for layer, output in enumerate(outputs, start=1):
        state = states[layer]
        if state is None or state.shape != output.shape or not close(state, output):
            raise UnsupportedArchitectureError(
                f"{kind}: the hidden state after block {layer} is not the output of this block, "
                "so this model cannot be used"
            )
