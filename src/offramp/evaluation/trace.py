"""The trace: the prediction and confidence of every exit for every token, from one pass."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.evaluation.reader import ChunkReader
from offramp.exits.confidence import confidence_named
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.files import writing
from offramp.models.base import EarlyExitModel, whole_step
from offramp.reading import parsing, read_arrays

_PER_EXIT = ("nll", "argmax", "kl", "expected_kl")
_PER_TOKEN = ("sequence", "position")


@dataclass(frozen=True, kw_only=True, repr=False)
class ExitTrace:
    """Arrays over (exits, tokens) in the order in which the tokens were read.

    It describes ``missing_kv="recompute"``: every state was computed with exact keys and values.
    An array is None if it was not requested, or if a file of an earlier version does not have it.
    """

    num_layers: int
    exit_layers: tuple[int, ...]
    targets: NDArray[np.int64]
    "(N,) The token to predict."
    nll: NDArray[np.float32]
    "(E, N) Negative log-likelihood of the target, in nats."
    argmax: NDArray[np.int64]
    "(E, N) The most likely token at the exit."
    confidence: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """(E, N) scores by the name of the measure. The last layer has no gate: there ``gate`` is 1 and
    ``gain`` 0."""
    sequence: NDArray[np.int32] | None = None
    "(N,) The number of the token's window, from 0."
    position: NDArray[np.int32] | None = None
    "(N,) The position in the window from which the token is predicted, from 0."
    kl: NDArray[np.float32] | None = None
    "(E, N) KL(p_L || p_e) in nats."
    expected_kl: NDArray[np.float32] | None = None
    "(E - 1, E - 1, N) KL(p_L || p_j) as the ``gain`` gate at exit i predicts it; NaN for j < i."

    def __repr__(self) -> str:
        measures = ", ".join(self.confidence) or "no confidence"
        return f"ExitTrace({self.num_tokens:,} tokens, exits {self.exit_layers}, {measures})"

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens, N."""
        return len(self.targets)

    def scores(self, confidence: str) -> NDArray[np.float32]:
        """Return the (E, N) scores of a measure. Raises ConfigError if it was not recorded."""
        if confidence not in self.confidence:
            recorded = ", ".join(self.confidence) or "none"
            raise ConfigError(
                f"confidence: expected a measure of the trace ({recorded}), got {confidence!r}"
            )
        return self.confidence[confidence]

    def ppl(self, exit_layer: int) -> float:
        """Return the perplexity if every token left at this exit."""
        return perplexity(float(self.nll[self._row(exit_layer)].mean(dtype=np.float64)))

    def at(self, exit_layers: Sequence[int]) -> "ExitTrace":
        """Return the trace of the same tokens with a subset of the exits."""
        rows = [self._row(layer) for layer in exit_layers]
        confidence = {name: scores[rows] for name, scores in self.confidence.items()}
        if "patience" in confidence:  # it depends on which exits there are
            confidence["patience"] = _patience(self.argmax[rows])
        early = rows[:-1]
        expected = self.expected_kl
        return replace(
            self,
            exit_layers=tuple(exit_layers),
            nll=self.nll[rows],
            argmax=self.argmax[rows],
            confidence=confidence,
            kl=None if self.kl is None else self.kl[rows],
            expected_kl=None if expected is None else expected[np.ix_(early, early)],
        )

    def tokens(self, chosen: NDArray[Any] | slice) -> "ExitTrace":
        """Return the trace of the chosen tokens; ``chosen`` is a mask, indices or a slice."""
        names = (*_PER_EXIT, *_PER_TOKEN, "targets")
        arrays = {name: getattr(self, name) for name in names}
        return replace(
            self,
            confidence={name: scores[:, chosen] for name, scores in self.confidence.items()},
            **{name: array[..., chosen] for name, array in arrays.items() if array is not None},
        )

    def _row(self, exit_layer: int) -> int:
        if exit_layer not in self.exit_layers:
            raise ConfigError(
                f"exit layer: expected one of the trace's, {self.exit_layers}, got {exit_layer}"
            )
        return self.exit_layers.index(exit_layer)

    def save(self, path: Path) -> None:
        """Write the trace as an uncompressed ``.npz`` file; a CheckpointError if that fails."""
        arrays: dict[str, Any] = {"targets": self.targets}
        for name in (*_PER_EXIT, *_PER_TOKEN):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        arrays |= {f"confidence.{name}": scores for name, scores in self.confidence.items()}
        layers = np.asarray([self.num_layers, *self.exit_layers])
        with writing(path):
            np.savez(path, layers=layers, **arrays)

    @classmethod
    def load(cls, path: Path) -> "ExitTrace":
        """Read a trace that ``save`` wrote. Raises CheckpointError if the file is damaged."""
        arrays, prefix = read_arrays(path, "a trace"), "confidence."
        with parsing(path, "a trace"):
            num_layers, *exit_layers = arrays.pop("layers").tolist()
            return cls(
                num_layers=num_layers,
                exit_layers=tuple(exit_layers),
                confidence={
                    name.removeprefix(prefix): arrays.pop(name)
                    for name in list(arrays)
                    if name.startswith(prefix)
                },
                **arrays,
            )


def perplexity(mean_nll: float) -> float:
    """Return exp of the mean negative log-likelihood (nats per token)."""
    with np.errstate(over="ignore"):  # a model that diverged has infinite PPL
        return float(np.exp(mean_nll))


def _check_layers(layers: Sequence[int], last: int, *, kl: bool) -> None:
    if not all(1 <= layer <= last for layer in layers):
        raise ConfigError(f"layers: expected layers from 1 to {last}, got {layers}")
    if kl and last not in layers:
        raise ConfigError(f"layers: expected the last, {last}, for kl, got {layers}")


@torch.inference_mode()
def collect_trace(
    model: EarlyExitModel,
    batches: Iterable[tuple[Int[Tensor, "B S"], Int[Tensor, "B T"]]],
    *,
    layers: Sequence[int] | None = None,
    measures: Sequence[str] = ("max_prob",),
    fitted: FittedExits = NOTHING_FITTED,
    kl: bool = False,
    on_tokens: Callable[[int], None] | None = None,
    on_states: Callable[[Mapping[int, Tensor]], None] | None = None,
) -> ExitTrace:
    """Run the model once over (inputs, targets) and record every exit.

    ``layers`` are the layers to record (default: the model's exits) and ``measures`` the
    confidence measures; some of them need ``fitted``. ``kl`` records the divergence from the last
    layer, which must be one of the layers. After each batch ``on_tokens`` is called with its
    number of tokens, and ``on_states`` with its states, (B T, D) by layer.

    Raises CheckpointError at the first batch in which the logits or a confidence of an exit are
    not numbers, as with NaN weights or an overflow of the precision.
    """
    layers = tuple(model.exit_layers if layers is None else sorted(layers))
    _check_layers(layers, model.num_layers, kl=kl)
    chosen = {name: confidence_named(name) for name in measures}
    wanted = {*layers}
    if any(measure.needs_previous_state for measure in chosen.values()):
        wanted |= {layer - 1 for layer in layers}
    read = ChunkReader(model=model, layers=layers, measures=chosen, fitted=fitted, kl=kl)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    sequences = 0
    for inputs, targets in batches:
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        states = {
            layer: predicting(h, targets).flatten(0, 1)
            for layer, h in model.states_at(inputs, sorted(wanted), step=whole_step(inputs))
        }
        if on_states:
            on_states({layer: states[layer] for layer in layers})
        for name, part in read.batch(states, targets.flatten()):
            parts[name].append(part.cpu())
            _check_numbers(name, parts[name][-1], layers, model)
        rows, length = targets.shape
        index = torch.arange(sequences, sequences + rows, dtype=torch.int32)
        parts["sequence"].append(index.repeat_interleave(length))
        parts["position"].append(torch.arange(length, dtype=torch.int32).repeat(rows))
        parts["targets"].append(targets.flatten().cpu())
        sequences += rows
        if on_tokens:
            on_tokens(targets.numel())
    if not parts:
        raise CorpusError("corpus: expected at least 2 tokens, got too few to predict any")
    arrays = {name: torch.cat(tensors, dim=-1).numpy() for name, tensors in parts.items()}
    return ExitTrace(
        num_layers=model.num_layers,
        exit_layers=layers,
        confidence={name: arrays.pop(f"confidence.{name}") for name in chosen},
        **arrays,
    )


def _check_numbers(name: str, part: Tensor, layers: Sequence[int], model: EarlyExitModel) -> None:
    """Raise a CheckpointError that names the exits with NaN in ``part`` (E, n), if there are any.

    Only losses and confidences are checked: an array of ``gain`` has NaN where it has no value.
    """
    measure = name.removeprefix("confidence.")
    if name != "nll" and measure == name:
        return
    if not part.isnan().any():
        return
    bad = [f"{layers[row]}" for row in part.isnan().any(dim=1).nonzero()[:, 0].tolist()]
    where = f"exit layer {', '.join(bad)} of {model.num_layers}"
    what = "logits" if name == "nll" else f"{measure} scores"
    raise CheckpointError(
        f"{where}: expected {what} that are finite numbers, got nan: check the weights of the "
        f"model and its precision ({str(model.dtype).removeprefix('torch.')})"
    )


def predicting(h: Float[Tensor, "B S D"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """Return the states that predict a target: inputs may begin with tokens without one."""
    return h if h.shape[1] == targets.shape[1] else h[:, -targets.shape[1] :]


def _patience(argmax: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (E, N): for each exit, how many exits in a row up to it predict the same token."""
    counts = np.ones(argmax.shape, dtype=np.float32)
    for index in range(1, len(argmax)):
        same = argmax[index] == argmax[index - 1]
        counts[index] += same * counts[index - 1]
    return counts
