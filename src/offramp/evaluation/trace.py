"""The trace: what each exit said about each token, from one pass of the model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.errors import ConfigError, CorpusError
from offramp.exits.confidence import CONFIDENCE
from offramp.models.base import EarlyExitModel, states_at, whole_step


@dataclass(frozen=True, kw_only=True)
class ExitTrace:
    """Arrays over (exits, tokens) in the order in which the tokens were read.

    It describes ``missing_kv="recompute"``: every state was computed with exact keys and
    values below it.
    """

    num_layers: int
    exit_layers: tuple[int, ...]
    targets: NDArray[np.int64]
    "(N,) the token to predict."
    nll: NDArray[np.float32]
    "(E, N) negative log-likelihood of the target, in nats."
    argmax: NDArray[np.int64]
    "(E, N) the exit's first choice."
    confidence: dict[str, NDArray[np.float32]]
    "(E, N) for each measure, by its name."

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens, N."""
        return len(self.targets)

    def ppl(self, exit_layer: int) -> float:
        """Perplexity if every token left at this exit."""
        return perplexity(float(self.nll[self._row(exit_layer)].mean(dtype=np.float64)))

    def at(self, exit_layers: Sequence[int]) -> "ExitTrace":
        """The same tokens seen by fewer exits."""
        rows = [self._row(layer) for layer in exit_layers]
        return ExitTrace(
            num_layers=self.num_layers,
            exit_layers=tuple(exit_layers),
            targets=self.targets,
            nll=self.nll[rows],
            argmax=self.argmax[rows],
            confidence={name: scores[rows] for name, scores in self.confidence.items()},
        )

    def _row(self, exit_layer: int) -> int:
        if exit_layer not in self.exit_layers:
            raise ConfigError(
                f"exit layer: expected one of the trace's, {self.exit_layers}, got {exit_layer}"
            )
        return self.exit_layers.index(exit_layer)

    def save(self, path: Path) -> None:
        """Write an uncompressed ``.npz``."""
        arrays: dict[str, Any] = {
            "targets": self.targets,
            "nll": self.nll,
            "argmax": self.argmax,
        }
        arrays |= {f"confidence.{name}": scores for name, scores in self.confidence.items()}
        layers = np.asarray([self.num_layers, *self.exit_layers])
        np.savez(path, layers=layers, **arrays)

    @classmethod
    def load(cls, path: Path) -> "ExitTrace":
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            num_layers, *exit_layers = stored["layers"].tolist()
            prefix = "confidence."
            return cls(
                num_layers=num_layers,
                exit_layers=tuple(exit_layers),
                targets=stored["targets"],
                nll=stored["nll"],
                argmax=stored["argmax"],
                confidence={
                    name.removeprefix(prefix): stored[name]
                    for name in stored.files
                    if name.startswith(prefix)
                },
            )


def perplexity(mean_nll: float) -> float:
    """exp of the mean negative log-likelihood (nats a token)."""
    with np.errstate(over="ignore"):  # infinite, as for a model that diverged
        return float(np.exp(mean_nll))


@torch.inference_mode()
def collect_trace(
    model: EarlyExitModel,
    batches: Iterable[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]],
    *,
    layers: Sequence[int] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> ExitTrace:
    """Run the model once over (inputs, targets) and record every exit.

    ``layers`` are the layers to record (default: the model's exits); ``on_tokens`` is told
    after each batch how many tokens it had.
    """
    layers = tuple(model.exit_layers if layers is None else sorted(layers))
    if not all(1 <= layer <= model.num_layers for layer in layers):
        raise ConfigError(f"layers: expected layers from 1 to {model.num_layers}, got {layers}")
    target_parts: list[Tensor] = []
    nll_parts: list[Tensor] = []
    argmax_parts: list[Tensor] = []
    confidence_parts: dict[str, list[Tensor]] = {name: [] for name in CONFIDENCE}
    for inputs, targets in batches:
        inputs, wanted = inputs.to(model.device), targets.to(model.device).flatten()
        nll, argmax = [], []
        scores: dict[str, list[Tensor]] = {name: [] for name in CONFIDENCE}
        for layer, h in states_at(model, inputs, layers, step=whole_step(inputs)):
            logits = model.unembed(h, layer).flatten(0, 1).float()  # (B T, V)
            nll.append(F.cross_entropy(logits, wanted, reduction="none"))
            argmax.append(logits.argmax(dim=-1))
            for name, measure in CONFIDENCE.items():
                scores[name].append(measure(logits))
        target_parts.append(wanted.cpu())
        nll_parts.append(torch.stack(nll).cpu())
        argmax_parts.append(torch.stack(argmax).cpu())
        for name in CONFIDENCE:
            confidence_parts[name].append(torch.stack(scores[name]).cpu())
        if on_tokens:
            on_tokens(len(wanted))
    if not target_parts:
        raise CorpusError("corpus: expected at least 2 tokens, got too few to predict any")
    return ExitTrace(
        num_layers=model.num_layers,
        exit_layers=layers,
        targets=torch.cat(target_parts).numpy(),
        nll=torch.cat(nll_parts, dim=1).numpy(),
        argmax=torch.cat(argmax_parts, dim=1).numpy(),
        confidence={name: torch.cat(parts, 1).numpy() for name, parts in confidence_parts.items()},
    )
