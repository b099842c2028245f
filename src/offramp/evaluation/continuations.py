"""Score continuations of contexts with exits on, as decoding would choose their tokens.

Decoding runs a prompt at full depth. The prompt's last token predicts the first new token; each new
token then runs until its exit, where it predicts the next one. A continuation is scored in the same
way: its context is the prompt. So the probability of a continuation is the probability with which
decoding at temperature 1 samples it, and it is greedy if greedy decoding chooses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import CheckpointError, ConfigError
from offramp.evaluation.reader import CHUNK_LOGITS
from offramp.evaluation.routed import Leaving
from offramp.generation.exit_rule import ExitRule
from offramp.models.base import EarlyExitModel, require_blocks, whole_step
from offramp.models.missing_kv import MissingKV
from offramp.models.propagate import run_propagated


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Token ids of a context and of a continuation to score, at least one of each."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, ids in (("context", self.context), ("tokens", self.tokens)):
            if not ids:
                raise ConfigError(f"{name}: expected at least 1 token, got none")

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model reads: all but the last one."""
        return (*self.context, *self.tokens[:-1])


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """How likely the tokens of a continuation are, and which exits predicted them."""

    log_probs: tuple[float, ...]
    "Log-probability of each token, in nats."
    greedy: bool
    "Whether each token is the most likely one where it is predicted."
    exit_layers: tuple[int, ...]
    """The layer whose logits predict each token: the last layer for the first token, then the exit
    at which the token before it leaves."""


@torch.inference_mode()
def score_continuations(
    model: EarlyExitModel,
    continuations: Sequence[Continuation],
    *,
    rule: ExitRule | None = None,
    missing_kv: MissingKV = "propagate",
) -> list[ContinuationScore]:
    """Score the continuations in one batch; those with the same inputs share a row of it.

    ``rule`` decides where tokens leave; None is full depth. Raises ConfigError if ``missing_kv`` is
    "propagate" and the model can only run as a whole, and CheckpointError for logits that are not
    numbers.
    """
    rows: dict[tuple[tuple[int, ...], int], int] = {}
    places = [
        rows.setdefault((each.inputs, len(each.context)), len(rows)) for each in continuations
    ]
    batch = _Batch([ids for ids, _ in rows], [context for _, context in rows], model.device)
    if rule is None or not batch.routed.any():
        states, layers = _at_full_depth(model, batch)
    elif missing_kv == "propagate":
        require_blocks(model, "missing_kv")
        states, layers = _propagated(model, batch, rule)
    else:
        states, layers = _recomputed(model, batch, rule)
    which = torch.tensor(
        [
            batch.starts[row] + token
            for row, each in zip(places, continuations, strict=True)
            for token in range(len(each.tokens))
        ],
        device=model.device,
    )
    targets = torch.tensor(
        [token for each in continuations for token in each.tokens], device=model.device
    )
    log_probs, greedy = _read(model, states, layers, which, targets)
    exits, sizes = layers[which], [len(each.tokens) for each in continuations]
    return [
        ContinuationScore(
            log_probs=tuple(found.tolist()),
            greedy=bool(chosen.all()),
            exit_layers=tuple(left.tolist()),
        )
        for found, chosen, left in zip(
            log_probs.cpu().split(sizes),
            greedy.cpu().split(sizes),
            exits.cpu().split(sizes),
            strict=True,
        )
    ]


class _Batch:
    """Rows of tokens, and the places in them whose tokens predict a token of a continuation.

    The first of these places in a row is the last token of the context. Rows are padded at their
    end, where no token of a causal model sees it.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], contexts: Sequence[int], device: torch.device
    ) -> None:
        longest = max(map(len, rows))
        self.inputs = torch.tensor(
            [[*ids, *[0] * (longest - len(ids))] for ids in rows], device=device
        )
        pairs = [
            (row, column, column >= context)
            for row, (ids, context) in enumerate(zip(rows, contexts, strict=True))
            for column in range(context - 1, len(ids))
        ]
        self.rows, self.columns, self.routed = (
            torch.tensor(values, device=device) for values in zip(*pairs, strict=True)
        )
        "(N,) Row and column of each place, and whether its token may leave early."
        counts = [len(ids) - context + 1 for ids, context in zip(rows, contexts, strict=True)]
        self.starts = [sum(counts[:row]) for row in range(len(counts))]
        "Index of the first place of each row."

    def at(self, h: Tensor) -> Tensor:
        """Return the states (N, S) at the places, from those of all tokens (B, T, S)."""
        return h[self.rows, self.columns]


def _at_full_depth(model: EarlyExitModel, batch: _Batch) -> tuple[Tensor, Tensor]:
    [(_, h)] = model.states_at(batch.inputs, [model.num_layers], step=whole_step(batch.inputs))
    return batch.at(h), torch.full_like(batch.rows, model.num_layers)


def _propagated(model: EarlyExitModel, batch: _Batch, rule: ExitRule) -> tuple[Tensor, Tensor]:
    """Return each place's state and layer where its token left; later tokens see what it left."""
    leaves, needs_previous = _leaving(model, rule, int(batch.routed.sum()))
    rows, columns = batch.rows[batch.routed], batch.columns[batch.routed]

    def of_all(layer: int, h: Tensor, previous: Tensor) -> Tensor:
        leaving = torch.zeros_like(batch.inputs, dtype=torch.bool)
        leaving[rows, columns] = leaves(layer, h[rows, columns], previous[rows, columns])
        return leaving

    h, layers = run_propagated(
        model,
        batch.inputs,
        of_all,
        step=whole_step(batch.inputs),
        needs_previous_state=needs_previous,
    )
    return batch.at(h), batch.at(layers)


def _recomputed(model: EarlyExitModel, batch: _Batch, rule: ExitRule) -> tuple[Tensor, Tensor]:
    """Return each place's state and layer where its token left; every state is exact."""
    leaves, needs_previous = _leaving(model, rule, int(batch.routed.sum()))
    early, last = model.exit_layers[:-1], model.num_layers
    before = {layer - 1 for layer in early} if needs_previous else set()
    layers = torch.full_like(batch.rows, last)
    states = previous = torch.empty(0)
    active, routed = batch.routed.clone(), batch.routed
    reached = model.states_at(
        batch.inputs, sorted({*model.exit_layers, *before}), step=whole_step(batch.inputs)
    )
    for layer, h in reached:
        here = batch.at(h)
        if layer in early:
            leaving = torch.zeros_like(routed)
            leaving[routed] = leaves(
                layer, here[routed], previous[routed] if needs_previous else here[routed]
            )
            leaving &= active
            states = states if len(states) else torch.empty_like(here)
            states[leaving], layers[leaving] = here[leaving], layer
            active &= ~leaving
        previous = here
    stayed = layers == last
    states[stayed] = previous[stayed]
    return states, layers


def _leaving(
    model: EarlyExitModel, rule: ExitRule, tokens: int
) -> tuple[Callable[[int, Tensor, Tensor], Tensor], bool]:
    """Return what says which of the tokens leave, and whether it reads the state before the exit.

    It reads a few tokens at a time, because a measure may need all logits of each.
    """
    size = max(1, CHUNK_LOGITS // model.vocab_size)
    parts = [
        Leaving(model, rule.policy, confidence=rule.confidence, fitted=rule.fitted)
        for _ in range(0, tokens, size)
    ]

    def leaves(layer: int, states: Tensor, previous: Tensor) -> Tensor:
        pieces = zip(parts, states.split(size), previous.split(size), strict=True)
        return torch.cat([part(layer, h[None], before[None])[0] for part, h, before in pieces])

    return leaves, parts[0].needs_previous_state


def _read(
    model: EarlyExitModel, states: Tensor, layers: Tensor, which: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-probability (M,) of each target at a place, and whether it is the likeliest.

    ``states`` (N, S) and ``layers`` (N,) are those of the places, ``which`` (M,) is the place that
    predicts each of ``targets`` (M,).
    """
    log_probs = torch.full(which.shape, torch.nan, dtype=torch.float64, device=which.device)
    greedy = torch.zeros_like(which, dtype=torch.bool)
    size = max(1, CHUNK_LOGITS // model.vocab_size)
    for layer in model.exit_layers:
        here = (layers == layer).nonzero()[:, 0]
        for part in here.split(size) if len(here) else ():
            logits = model.unembed(states[None, part], layer)[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            row = torch.full((len(states),), -1, device=which.device)
            row[part] = torch.arange(len(part), device=which.device)
            mine = row[which] >= 0
            read, wanted = row[which[mine]], targets[mine]
            log_probs[mine] = F.log_softmax(logits, dim=-1)[read, wanted].double()
            greedy[mine] = logits.argmax(dim=-1)[read] == wanted
    if log_probs.isnan().any():
        raise CheckpointError(
            "logits: expected finite numbers, got nan: check the weights of the model and its "
            f"precision ({str(model.dtype).removeprefix('torch.')})"
        )
    return log_probs, greedy
