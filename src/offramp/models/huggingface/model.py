"""Hugging Face causal language models behind the waist.

``HuggingFaceModel`` wraps any causal language model of ``transformers`` and copies none of its
weights. How its blocks, norm and head are found: ``blocks.py``; how its blocks are run:
``block_runner.py``. Nothing else knows the library's insides.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.models.base import Step, states_at, walk, whole_step
from offramp.models.exit_heads import ExitHead, ExitHeads, adapter_of, has_lm_head
from offramp.models.head_kinds import EXIT_HEAD_KINDS, ExitHeadKind
from offramp.models.huggingface.layout import Layout, accepted, watch
from offramp.models.huggingface.runner import BlockRunner, close
from offramp.models.kv_cache import KVCache
from offramp.models.sources import Source


class HuggingFaceModel(nn.Module):
    """A causal language model of ``transformers`` with exits; implements the waist (base.py).

    ``backbone`` is the model itself. ``exit_layers`` None puts exits at a quarter, a half and
    three quarters of the depth. The exits begin by saying what the final norm and head would.

    A model whose blocks are of an unknown layout still gives its states (``states_at``), and so
    can be traced, swept and tuned; ``embed``, ``run_layers`` and ``project_kv`` raise
    UnsupportedArchitectureError.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        exit_layers: Iterable[int] | None = None,
        exit_head: ExitHeadKind = "shared",
    ) -> None:
        super().__init__()
        config = backbone.config.get_text_config()
        self.backbone = backbone
        self.source: Source | None = None
        "The checkpoint that the backbone came from."
        self.model_type: str = config.model_type
        self.num_layers: int = config.num_hidden_layers
        self.max_length: int = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.exit_layers = resolve_exit_layers(exit_layers, self.num_layers)
        if exit_head not in EXIT_HEAD_KINDS:
            raise ConfigError(
                f"exit_head: expected one of {', '.join(EXIT_HEAD_KINDS)}, got {exit_head!r}"
            )
        self.exit_head: ExitHeadKind = exit_head
        training = backbone.training
        backbone.eval()
        self._layout, self._runner, self._why_no_blocks = _known(backbone, config, self.max_length)
        backbone.train(training)
        self._scale, self._softcap = _after_head(self.model_type, config, self._layout)
        self.hidden_size = self._layout.last_state.shape[-1]
        self.vocab_size = self._layout.head.out_features
        self.exits = ExitHeads(num_layers=self.num_layers)
        self.exits.trained = False
        if exit_head != "shared":
            for layer in self.exit_layers[:-1]:
                self.exits[str(layer)] = self._new_head()
        self.train(training)

    # The waist.

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._layout.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the LM head's weights."""
        return self._layout.head.weight.dtype

    def embed(self, input_ids: Int[Tensor, "B T"], *, step: Step) -> Float[Tensor, "B T D"]:
        """What the model gives its first block: embeddings, with all that it does to them."""
        return self._blocks().embed(input_ids, step)

    def run_layers(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Blocks start+1 .. stop; tokens not ``active`` keep their state."""
        return self._blocks().run(h, start, stop, step, active)

    def project_kv(self, h: Float[Tensor, "B T D"], start: int, stop: int, *, step: Step) -> None:
        """Write only the keys and values of blocks start+1 .. stop into the step's cache."""
        assert step.cache is not None, "project_kv needs a cache"
        self._blocks().project_kv(h, start, stop, step)

    def unembed(
        self,
        h: Float[Tensor, "B T D"],
        exit_layer: int,
        *,
        vocab: Int[Tensor, " W"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits at any layer 1..L; one without a head of its own uses the final norm and head."""
        own = self.exits.at(exit_layer)
        head = self._layout.head if own is None or own.lm_head is None else own.lm_head
        norm = self._layout.norm if own is None else own
        h = h if norm is None else norm(h)
        for module in self._layout.after_norm:
            h = module(h)
        if vocab is None:
            logits = F.linear(h, head.weight, head.bias)
        else:
            logits = F.linear(
                h, head.weight[vocab], None if head.bias is None else head.bias[vocab]
            )
        return _scaled(logits, self._scale, self._softcap)

    def states_at(
        self, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, state) at each of ``layers``, ascending, (B, T, D) each."""
        if self._runner is not None:
            yield from walk(self, input_ids, layers, step=step)
        else:
            yield from self._states_of_whole_pass(input_ids, sorted(layers), step)

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for this model, of its dtype and on its device."""
        try:
            return self._blocks().make_cache(batch_size, capacity)
        except UnsupportedArchitectureError as error:
            raise UnsupportedArchitectureError(
                f"{self.model_type}: no KVCache for this model, since {error}; without one, "
                "training, traces and sweeps work"
            ) from None

    # Beyond the waist.

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the full model."""
        states = states_at(self, input_ids, [self.num_layers], step=whole_step(input_ids))
        [(layer, h)] = states
        return self.unembed(h, layer)

    @property
    def why_no_blocks(self) -> str:
        """Why the blocks cannot be run one by one; empty where they can."""
        return self._why_no_blocks

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the LM head; some old architectures have none."""
        return self._layout.norm

    def normalised(self, h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What the way to the LM head begins with, of states of the last layer."""
        out: Tensor = h if self._layout.norm is None else self._layout.norm(h)
        return out

    def freeze_backbone(self) -> None:
        """Let only the exits' own heads learn."""
        self.backbone.requires_grad_(False)

    def _blocks(self) -> BlockRunner:
        if self._runner is None:
            raise UnsupportedArchitectureError(
                f"{self.model_type}: the blocks of this model cannot be run one by one, since "
                f"{self._why_no_blocks}; training exits, traces and sweeps work, by whole passes"
            )
        return self._runner

    def _states_of_whole_pass(
        self, input_ids: Tensor, layers: list[int], step: Step
    ) -> Iterator[tuple[int, Tensor]]:
        if step.cache is not None:
            self._blocks()
        last: list[Tensor] = []
        ways = [*([self._layout.norm] if self._layout.norm else []), *self._layout.after_norm]
        base = self.backbone.base_model
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
        if states is None or len(states) != self.num_layers + 1:
            raise UnsupportedArchitectureError(
                f"{self.model_type}: expected {self.num_layers + 1} hidden states, got "
                f"{0 if states is None else len(states)}, so this model cannot be used"
            )
        # the first is the embedding and the last is normalised; or (Mamba) there is no embedding
        embedded = not (last and torch.equal(states[-2], last[0]))
        after = [*(states[1:] if embedded else states[:-1])]
        if last:
            after[-1] = last[0]
        for layer in layers:
            yield layer, after[layer - 1]

    def _new_head(self) -> ExitHead:
        lm_head, size = self._layout.head, self.hidden_size
        like: Any = {"device": lm_head.weight.device, "dtype": lm_head.weight.dtype}

        def norm() -> nn.Module:
            return deepcopy(self._layout.norm) if self._layout.norm else nn.LayerNorm(size, **like)

        adapter = adapter_of(self.exit_head, size)
        adapter = None if adapter is None else adapter.to(**like)
        own = deepcopy(lm_head) if has_lm_head(self.exit_head) else None
        return ExitHead(norm=norm(), adapter=adapter, lm_head=own).requires_grad_(True)


def resolve_exit_layers(layers: Iterable[int] | None, num_layers: int) -> tuple[int, ...]:
    """Ascending, each once, and the last layer among them; None: at each quarter of the depth."""
    chosen = [num_layers * i // 4 for i in (1, 2, 3)] if layers is None else list(layers)
    for layer in chosen if layers is not None else ():
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"exit_layers: expected layers from 1 to {num_layers}, got {layer}")
    return tuple(sorted({*chosen, num_layers} - {0}))


def _known(backbone: Any, config: Any, longest: int) -> tuple[Layout, BlockRunner | None, str]:
    """The ways through the model, what runs its blocks, and why nothing can."""
    if backbone.config._attn_implementation not in ("eager", "sdpa"):
        backbone.set_attn_implementation("eager")
    layout = watch(backbone, config)
    if not layout.blocks:
        return layout, None, layout.why_no_blocks
    runner = BlockRunner(backbone, layout, longest=longest)
    why = runner.disagreement()
    return layout, None if why else runner, why


def _scaled(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _after_head(model_type: str, config: Any, layout: Layout) -> tuple[float, float | None]:
    """What the model does to its head's output: a factor and a soft cap."""
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    said = layout.logits
    for ways in ((scale, softcap), (1.0, softcap), (1.0, None)):  # what the config says, first
        if close(_scaled(layout.head_output.float(), *ways).to(said.dtype), said):
            return ways
    raise UnsupportedArchitectureError(
        f"{model_type}: what it does to its logits after the LM head is not understood, "
        "so exits cannot be read"
    )
