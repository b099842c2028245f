"""What stands between a layer's state and its logits.

- ``shared``: the final norm and the LM head (no parameters of its own);
- ``norm``: a norm of its own, the shared LM head;
- ``full``: a norm and an LM head of its own.
"""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

ExitHeadKind = Literal["shared", "norm", "full"]
EXIT_HEAD_KINDS: tuple[str, ...] = get_args(ExitHeadKind)


class ExitHead(nn.Module):
    """An exit's own norm and, for kind ``full``, its own LM head."""

    def __init__(self, kind: ExitHeadKind, *, hidden_size: int, vocab_size: int, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.lm_head: nn.Linear | None = None
        if kind == "full":
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The normalised state that the LM head reads."""
        normalised: Tensor = self.norm(h)
        return normalised
