"""What ``offramp tune`` trains, and how. Imports no PyTorch."""

import math
from dataclasses import dataclass

from offramp.errors import ConfigError
from offramp.models.head_kinds import ExitHeadKind
from offramp.training.config import TrainConfig
from offramp.training.frozen_config import FrozenConfig, Objective

JOINT_LR = 1e-5
DISTILL_LR, UNFROZEN_DISTILL_LR = 1e-3, 1e-4
DISTILL_BATCH = 2
"""Windows a step of the distillation of a model with shared keys and values."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Which exits to train, and how."""

    exit_layers: tuple[int, ...] | None = None
    "Exit layers, such as 8,12,16,20 (default: at each quarter of the depth)."
    exit_head: ExitHeadKind = "adapter"
    """What an exit has of its own: shared (nothing), norm, adapter, full (norm and LM head) or
    specialist (norm, small adapter and LM head)."""
    objective: Objective | None = None
    """Imitate the final layer (distill, the default), predict the text (text; the default with
    --unfreeze), or both."""
    unfreeze: bool = False
    "Train everything jointly, the backbone too."
    loss_weights: str | None = None
    "With --unfreeze: weights by layer, such as 8=0.5,30=1 (default: 1 at every exit)."
    tokens: int | None = None
    "Read only this many tokens of the text."
    epochs: int | None = None
    "Passes over the text (default: 4; with --unfreeze 1)."
    lr: float | None = None
    "Peak learning rate (default: 1e-3; with --unfreeze 1e-5)."
    seq_len: int = 256
    "Tokens a window."
    seed: int = 0
    "Seed of the exits' parameters and of the order of the text."
    kv_source: int | None = None
    """Let all blocks above this layer share keys and values of the state after it, so that exits
    there leave nothing out. They are fitted by least squares; then the attention above the layer
    (with --unfreeze everything) learns to predict what the model predicted, and then the exits
    learn."""
    gates: bool = True
    """Fit a gain and a gate gate to each exit, by which generate, sweep and calibrate decide where
    tokens leave. Without them they use max_prob, which costs an LM head at each exit."""
    distill_epochs: int | None = None
    "With --kv-source: passes over the text of the distillation (default: 1; 0: only the fit)."
    distill_lr: float | None = None
    "With --kv-source: peak learning rate of it (default: 1e-3; with --unfreeze 1e-4)."

    def __post_init__(self) -> None:
        if self.kv_source is not None:
            self._check_source()
            return
        for name in ("distill_epochs", "distill_lr"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}: expected --kv-source with it, got {getattr(self, name)} alone"
                )
        self._check_tokens()
        if self.unfreeze and self.objective == "distill":
            raise ConfigError(
                "objective: expected text or both with --unfreeze, which gives the final layer "
                "itself something to learn, got distill"
            )
        if self.loss_weights is not None and not self.unfreeze:
            raise ConfigError(
                "loss_weights: expected --unfreeze with it (frozen, exits do not share anything "
                f"that learns), got {self.loss_weights!r} alone"
            )
        _ = self.joint((1,)) if self.unfreeze else self.frozen()

    def _check_tokens(self) -> None:
        if self.tokens is not None and self.tokens < 2:
            raise ConfigError(f"tokens: expected at least 2, got {self.tokens}")

    def _check_source(self) -> None:
        """Check the fields with shared keys and values."""
        assert self.kv_source is not None
        if self.kv_source < 1:
            raise ConfigError(f"kv_source: expected at least 1, got {self.kv_source}")
        if self.loss_weights is not None:
            raise ConfigError(
                "loss_weights: expected none with --kv-source, whose model is distilled, "
                f"got {self.loss_weights!r}"
            )
        if self.distill_epochs is not None and self.distill_epochs < 0:
            raise ConfigError(f"distill_epochs: expected at least 0, got {self.distill_epochs}")
        if self.distill_lr is not None and not (
            math.isfinite(self.distill_lr) and self.distill_lr > 0
        ):
            raise ConfigError(f"distill_lr: expected a number above 0, got {self.distill_lr}")
        if self.distill_epochs == 0 and (self.unfreeze or self.distill_lr is not None):
            given = "--unfreeze" if self.unfreeze else "--distill-lr"
            raise ConfigError(
                f"distill_epochs: expected at least 1 with {given}, which is about the "
                "distillation, got 0"
            )
        self._check_tokens()
        _ = self.frozen(), self.distillation()

    def distillation(self) -> TrainConfig | None:
        """How a model with shared keys and values is distilled; None for the fit alone."""
        if self.distill_epochs == 0:
            return None
        usual = UNFROZEN_DISTILL_LR if self.unfreeze else DISTILL_LR
        return TrainConfig(
            seq_len=self.seq_len,
            batch_size=DISTILL_BATCH,
            epochs=self.distill_epochs or 1,
            lr=usual if self.distill_lr is None else self.distill_lr,
            schedule="cosine",
            seed=self.seed,
        )

    def frozen(self) -> FrozenConfig:
        """How the exits are trained on a frozen backbone."""
        given = {"epochs": self.epochs, "lr": self.lr}
        return FrozenConfig(
            objective=self.objective or "distill",
            seq_len=self.seq_len,
            seed=self.seed,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def joint(self, exit_layers: tuple[int, ...]) -> TrainConfig:
        """How everything is trained at once."""
        return TrainConfig(
            loss_weights=self.loss_weights or ",".join(f"{layer}=1" for layer in exit_layers),
            distill=1.0 if self.objective == "both" else 0.0,
            seq_len=self.seq_len,
            batch_size=4,
            epochs=self.epochs if self.epochs is not None else 1,
            lr=JOINT_LR if self.lr is None else self.lr,
            schedule="cosine",
            seed=self.seed,
        )
