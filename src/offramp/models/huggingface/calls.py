"""Record every call of a module in a forward pass of a Hugging Face causal language model."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.data.hub import one_line
from offramp.errors import CheckpointError, UnsupportedArchitectureError


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of a module."""

    module: nn.Module
    arguments: Mapping[str, Any]
    output: Any

    @property
    def state(self) -> Any:
        """The first argument."""
        return next(iter(self.arguments.values()), None)

    @property
    def result(self) -> Any:
        """The output, or the first of several."""
        return self.output[0] if isinstance(self.output, tuple | list) else self.output


def watched_pass(lm: Any, ids: Tensor, kind: str) -> tuple[list[Call], Tensor, Any]:
    """Return all calls of modules, in the order in which they ended, the logits and the cache."""
    from transformers import DynamicCache

    calls: list[Call] = []
    embedded: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append(Call(module=module, arguments=named(module, args, kwargs), output=out))

    def lead(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1].clone()  # which the model may overwrite

    failed: Exception | None = None
    for cache in (DynamicCache(), None):
        calls.clear()
        embedded.clear()
        # before transformers 5.24 it was past_key_values
        where = {"cache": cache, "past_key_values": cache, "use_cache": cache is not None}
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(lm.get_input_embeddings().register_forward_hook(lead))
            for module in lm.modules():
                hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
            try:
                logits = lm(**accepted(lm, input_ids=ids, **where)).logits
                break
            except Exception as error:  # depends on the architecture
                failed = error
    else:
        raise UnsupportedArchitectureError(
            f"{kind}: expected a language model that needs only token ids, got one that fails: "
            f"{one_line(failed or ValueError())}"
        )
    wrong = {"nan": logits.isnan(), "inf": logits.isposinf()}  # a model may forbid tokens by -inf
    got = next((name for name, found in wrong.items() if found.any()), None)
    if got:  # or every comparison below would blame the architecture
        raise CheckpointError(
            f"{kind}: exit layer {lm.config.get_text_config().num_hidden_layers}, the last: "
            f"expected logits that are finite numbers, got {got}: check the weights of the model "
            f"and its precision ({str(logits.dtype).removeprefix('torch.')})"
        )
    if _sees_later_tokens(lm, ids, logits, embedded):
        raise UnsupportedArchitectureError(
            f"{kind}: expected a decoder-only (causal) language model, got one whose first token "
            "attends to later ones"
        )
    return calls, logits.detach(), cache


def plain_pass(lm: Any, ids: Tensor, blocks: Sequence[nn.Module], **options: Any) -> list[Tensor]:
    """Return the states after each block (B, T, D) in a pass of the whole model."""
    states: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        states[module] = out[0] if isinstance(out, tuple | list) else out

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(note))
        lm(**accepted(lm, input_ids=ids, use_cache=False, **options))
    return [states[block] for block in blocks]


def _sees_later_tokens(lm: Any, ids: Tensor, logits: Tensor, embedded: list[Tensor]) -> bool:
    """Return whether the first token's logits depend on later tokens."""
    try:
        [later] = torch.autograd.grad(logits[0, 0].float().sum(), embedded[:1], allow_unused=True)
        if later is not None and not later.isfinite().all():
            raise OverflowError
    except Exception:  # the pass overwrites what a gradient needs, or has no finite gradient
        with torch.no_grad():
            others = ids.flip(1).index_copy(1, torch.zeros_like(ids[0, :1]), ids[:, :1])
            again = lm(input_ids=others, **accepted(lm, use_cache=False)).logits
        return not torch.allclose(again[0, 0], logits[0, 0], rtol=1e-3, atol=1e-4)
    return later is None or bool(later[0, 1:].any())


def accepted(module: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Return the arguments that the module's ``forward`` has by name."""
    known = inspect.signature(module.forward).parameters
    return {name: value for name, value in arguments.items() if name in known}


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, in the order of the signature."""
    signature = inspect.signature(module.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of their type."""
    worst = (a.float() - b.float()).abs().max()
    return bool(worst <= (1e-3 if a.dtype in (torch.float32, torch.float64) else 0.1) * b.std())
