"""Hugging Face causal language models with the interface of ``TrainableModel``.

``HuggingFaceModel`` wraps any causal language model of ``transformers`` without copying its
weights. ``layout`` finds its blocks, norm and head, and ``runner`` runs its blocks. No other code
depends on the internals of the library.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.models import checks
from offramp.models.base import Step, TrainableModel, walk, whole_step
from offramp.models.exit_heads import ExitHeads
from offramp.models.head_kinds import EXIT_HEAD_KINDS, ExitHeadKind
from offramp.models.huggingface.check import disagreement, trial
from offramp.models.huggingface.head import after_head, new_exit_head, scaled
from offramp.models.huggingface.layout import (
    Layout,
    Longest,
    decoder_config,
    longest_of,
    watch,
)
from offramp.models.huggingface.runner import BlockRunner
from offramp.models.huggingface.whole import require_whole, states_of_whole_pass
from offramp.models.kv_cache import KVCache
from offramp.models.layer_names import layers_by_name
from offramp.models.router import RouterSpec
from offramp.models.sources import Source


class HuggingFaceModel(nn.Module):
    """A causal language model of ``transformers`` with exits; a ``TrainableModel`` (base.py).

    ``backbone`` is the wrapped model. ``exit_layers`` None puts exits at a quarter, a half and
    three quarters of the depth. New exits give the same logits as the final norm and head.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        exit_layers: Iterable[int] | None = None,
        exit_head: ExitHeadKind = "shared",
    ) -> None:
        super().__init__()
        config = decoder_config(backbone)
        self.backbone = backbone
        self.source: Source | None = None
        "The checkpoint that the backbone came from."
        self.model_type: str = config.model_type
        self.num_layers: int = config.num_hidden_layers
        self._longest = longest_of(config)
        self.max_length: int = self._longest.positions
        self.exit_layers = resolve_exit_layers(exit_layers, self.num_layers)
        if exit_head not in EXIT_HEAD_KINDS:
            raise ConfigError(
                f"exit_head: expected one of {', '.join(EXIT_HEAD_KINDS)}, got {exit_head!r}"
            )
        self.exit_head: ExitHeadKind = exit_head
        training = backbone.training
        backbone.eval()
        self._layout, self._runner, self.why_no_blocks = _known(backbone, config, self._longest)
        self._scale, self._softcap = after_head(config, self._layout)
        self.hidden_size = self._layout.last_state.shape[-1]
        self.vocab_size = self._layout.head.out_features
        self.complete_from = self._runner.complete_from if self._runner else self.num_layers
        self.cache_layers = self.complete_from
        self.exits = ExitHeads(num_layers=self.num_layers)
        self.exits.trained = False
        if self._runner is None:
            require_whole(backbone, self._layout, lambda h: self.unembed(h, self.num_layers))
        if exit_head != "shared":
            for layer in self.exit_layers[:-1]:
                self.exits[str(layer)] = new_exit_head(self._layout, exit_head)
        backbone.train(training)
        self.train(training)

    # EarlyExitModel.

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._layout.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the LM head's weights."""
        return self._layout.head.weight.dtype

    def embed(self, input_ids: Int[Tensor, "B T"], *, step: Step) -> Float[Tensor, "B T D"]:
        """Return the state before the first block: embeddings, after any scaling and the like."""
        try:
            return self._blocks().embed(input_ids, step)
        except (IndexError, RuntimeError):
            checks.check_ids(input_ids, self.vocab_size)
            raise

    def run_layers(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run blocks start+1 .. stop; tokens not ``active`` keep their state."""
        checks.check_call(self, h, start, stop, active)
        return self._blocks().run(h, start, stop, step, active)

    def project_kv(self, h: Float[Tensor, "B T D"], start: int, stop: int, *, step: Step) -> None:
        """Write only the keys and values of blocks start+1 .. stop into the step's cache."""
        checks.require_cache(step)
        checks.check_call(self, h, start, stop)
        self._blocks().project_kv(h, start, stop, step)

    def unembed(
        self,
        h: Float[Tensor, "B T D"],
        exit_layer: int,
        *,
        vocab: Int[Tensor, " W"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return logits at any layer 1..L, by its own norm and head or else by the final ones."""
        checks.check_states(h, self.hidden_size)
        checks.check_exit_layer(exit_layer, self.num_layers)
        own = self.exits.at(exit_layer)
        head = self._layout.head if own is None or own.lm_head is None else own.lm_head
        norm = self._layout.norm if own is None else own
        h = h if norm is None else norm(h)
        for module in self._layout.after_norm:
            h = module(h)
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if vocab is not None:
            weight, bias = weight[vocab], None if bias is None else bias[vocab]
        logits = F.linear(h, weight, bias)
        return scaled(logits, self._scale, self._softcap)

    def fills_beside(self, tokens: int) -> bool:
        """Return False: blocks of ``transformers`` do not project keys and values of others."""
        return False

    def rounds_alike(self) -> bool:
        """Return False: products of several rows are summed in another order than those of one."""
        return False

    def router(self, cache: KVCache, spec: RouterSpec) -> None:
        """Return None: blocks of ``transformers`` run one by one."""

    def states_at(
        self, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, state) at each of ``layers``, ascending, (B, T, D) each."""
        if self._runner is not None:
            yield from walk(self, input_ids, layers, step=step)
        else:
            if step.cache is not None:
                self._blocks()
            self._longest.require(input_ids.shape[1])
            yield from states_of_whole_pass(
                self.backbone, self._layout, input_ids, sorted(layers), step
            )

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for this model, of its dtype and on its device."""
        try:
            return self._blocks().make_cache(batch_size, capacity)
        except UnsupportedArchitectureError as error:
            raise UnsupportedArchitectureError(
                f"{self.model_type}: this model cannot use a KVCache, since {error}; training, "
                "traces and sweeps work without one"
            ) from None

    @property
    def exits_trained(self) -> bool:
        """Whether the exits were trained."""
        return self.exits.trained

    def silence_untrained(self) -> None:
        """Do not warn about untrained exits."""
        self.exits.warned = True

    def to_transformers(self) -> Any:
        """Return the backbone."""
        return self.backbone

    # TrainableModel.

    block_modules: tuple[nn.Module, ...] = ()
    "Empty: the blocks run with arguments that were recorded in a pass of the whole backbone."

    def with_exits(self, layers: Iterable[int], kind: ExitHeadKind) -> "HuggingFaceModel":
        """Return a model of the same backbone, which is not copied, with these exits."""
        if self.exit_head == "shared" and self._layout.norm is None:
            raise ConfigError(
                f"exit_head: expected norm, adapter, full or specialist in a model of "
                f"{self.model_type}, which has no final norm that exits could share, got shared"
            )
        model = HuggingFaceModel(self.backbone, exit_layers=layers, exit_head=kind)
        model.exits.start_from(self.exits, self._layout.norm, self._layout.head)
        model.source = self.source
        return model.train(self.training)

    def normalised(self, h: Float[Tensor, "*B S"]) -> Float[Tensor, "*B D"]:
        """Return last-layer states after the final norm; unchanged in a model without one."""
        out: Tensor = h if self._layout.norm is None else self._layout.norm(h)
        return out

    def freeze_backbone(self) -> None:
        """Make only the exits' own heads require a gradient."""
        self.backbone.requires_grad_(False)

    def layers_of_parameters(self) -> dict[str, int]:
        """Return the layer of each parameter, from a recorded pass of the backbone."""
        layout = self._layout
        if not layout.block_modules:
            raise UnsupportedArchitectureError(
                f"{self.model_type}: the layers of its parameters are unknown, since "
                f"{self.why_no_blocks}"
            )
        called = (*layout.below, *layout.block_modules, *layout.above, self.exits)
        placed = {id(each) for module in called for each in module.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in placed:
                raise UnsupportedArchitectureError(
                    f"{self.model_type}: the layer of the parameter {name} is unknown, since no "
                    "module that contains it was called"
                )
        return layers_by_name(self, below=layout.below, blocks=layout.block_modules)

    # Not part of the protocols.

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the full model."""
        [(layer, h)] = self.states_at(input_ids, [self.num_layers], step=whole_step(input_ids))
        return self.unembed(h, layer)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the LM head; some old architectures have none."""
        return self._layout.norm

    def _blocks(self) -> BlockRunner:
        if self._runner is None:
            raise UnsupportedArchitectureError(
                f"{self.model_type}: the blocks of this model cannot be run one by one, since "
                f"{self.why_no_blocks}; training exits, traces and sweeps work with whole passes"
            )
        return self._runner


def as_huggingface(model: TrainableModel) -> HuggingFaceModel:
    """Return the same model and exits, run by ``transformers``; see ``to_transformers``."""
    if isinstance(model, HuggingFaceModel):
        return model
    own = HuggingFaceModel(
        model.to_transformers(), exit_layers=model.exit_layers, exit_head=model.exit_head
    )
    own.exits.load_state_dict(model.exits.state_dict())
    own.exits.trained = model.exits_trained
    return own.eval()


def resolve_exit_layers(layers: Iterable[int] | None, num_layers: int) -> tuple[int, ...]:
    """Return sorted unique layers with the last layer; for None, each quarter of the depth."""
    chosen = [num_layers * i // 4 for i in (1, 2, 3)] if layers is None else list(layers)
    for layer in chosen if layers is not None else ():
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"exit_layers: expected layers from 1 to {num_layers}, got {layer}")
    return tuple(sorted({*chosen, num_layers} - {0}))


def _known(backbone: Any, config: Any, longest: Longest) -> tuple[Layout, BlockRunner | None, str]:
    """Return the layout of the model, its block runner, and the reason if there is none."""
    if backbone.config._attn_implementation not in ("eager", "sdpa"):
        backbone.set_attn_implementation("eager")
    layout = watch(backbone, config)
    if not layout.blocks:
        return layout, None, layout.why_no_blocks
    runner = BlockRunner(backbone, layout, longest=longest)
    why = disagreement(runner)
    if not why:
        tried = trial(backbone)
        why, runner.why_no_cache = tried.why_no_blocks, runner.why_no_cache or tried.why_no_cache
    return layout, None if why else runner, why
