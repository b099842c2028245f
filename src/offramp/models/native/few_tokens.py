"""Which code runs the native decoder's calls of a few tokens, and prompts on a CPU.

The blocks themselves (blocks.py) run all else.
"""

from typing import Any

import torch
from torch import Tensor, nn

from offramp.models.base import FEW_TOKENS, Step
from offramp.models.kv_cache import KVCache
from offramp.models.native.config import DecoderConfig
from offramp.models.native.fast.steps import FastSteps
from offramp.models.native.static.steps import StaticSteps


class FewTokens:
    """The steps of a few tokens with a cache: ``fast`` on a CPU, ``static`` on a GPU.

    ``use_static`` chooses: None for what fits the device, False for the blocks themselves on a GPU,
    True for the static steps on a CPU, where they run without graphs, for tests.
    """

    def __init__(self, blocks: nn.ModuleList, config: DecoderConfig) -> None:
        assert config.head_dim is not None
        self.fast = FastSteps(
            blocks,
            eps=config.rms_norm_eps,
            head_dim=config.head_dim,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            post=config.norm == "post",
        )
        self.static = StaticSteps(self.fast)
        self.use_static: bool | None = None

    def new_cache(self, batch_size: int, capacity: int, form: dict[str, Any]) -> KVCache:
        """Return an empty cache of this form; for the static steps it may have more positions."""
        if self._static_on(form["device"]):
            return self.static.caches.new(batch_size, capacity, form)
        return KVCache(batch_size=batch_size, capacity=capacity, **form)

    def of(
        self, h: Tensor, step: Step | None = None, *, some: bool = False
    ) -> FastSteps | StaticSteps | None:
        """Return what runs a call on states ``h``, which needs no step for logits; or None.

        ``some``: whether only some of the tokens run.
        """
        if step is not None and (step.cache is None or step.real is not None):
            return None
        if self._static_on(h.device):
            return self.static if self.static.fit(h) else None
        if self.fast.fit(h):
            return self.fast
        text = step is not None and not some and self.fast.fit_text(h, step)
        return self.fast if text else None

    def fills_beside(self, tokens: int, device: torch.device) -> bool:
        """Return whether these steps project keys and values of inactive tokens at no cost."""
        if self._static_on(device):
            return self.static.fills_beside(tokens)
        return self.compiled(device) and tokens <= FEW_TOKENS

    def compiled(self, device: torch.device) -> bool:
        """Return whether the compiled kernels run the blocks."""
        on_cpu = device.type == "cpu" and not self._static_on(device)
        return on_cpu and self.fast.fills_beside(1)

    def _static_on(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.use_static is None else self.use_static
