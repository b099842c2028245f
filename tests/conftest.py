"""Shared fixtures. The shapes and types in the annotations of whatever handles tensors are
checked in every test. (Not in report/: beartype takes no int for a float, and altair's own
annotations do not hold at run time.)
"""

# ruff: noqa: E402

from jaxtyping import install_import_hook

CHECKED = ("models", "exits", "evaluation", "data", "training")
install_import_hook(  # before the first import of offramp
    [f"offramp.{name}" for name in CHECKED], "beartype.beartype"
)

from collections.abc import Callable

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from offramp.models.transformer import DecoderConfig, Transformer
from offramp.training import new_model

torch.set_num_threads(1)
hypothesis.settings.register_profile("offramp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("offramp")

VOCABULARY = 13

MakeModel = Callable[..., Transformer]
MakeIds = Callable[..., Tensor]


@pytest.fixture
def make_model() -> MakeModel:
    """Make a tiny random decoder, float64 so that parity is exact to rounding.

    Norm weights are random too: with ones, a wrong norm would go unnoticed.
    """

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> Transformer:
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 24,
        }
        model = new_model(DecoderConfig(**{**shape, **fields}), seed=seed)
        random = torch.Generator().manual_seed(seed + 1)
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=random)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def make_ids() -> MakeIds:
    """Make random token ids, (batch, length)."""

    def make(batch: int, length: int, *, seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randint(VOCABULARY, (batch, length), generator=random)

    return make
