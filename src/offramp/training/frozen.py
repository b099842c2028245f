"""Train exits on a frozen backbone, whose states are computed once and kept in memory.

The exits learn to imitate the final layer (Hinton et al. 2015), to predict the text, or both.
Adapters begin with a least-squares map of each exit's states to the final ones, the closed form
of the tuned lens (Belrose et al. 2023).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import ConfigError, CorpusError, TrainingError
from offramp.exits.loss import weighted_exit_loss
from offramp.models.base import TrainableModel
from offramp.models.exit_heads import ExitHead
from offramp.training.frozen_config import FrozenConfig
from offramp.training.kept_states import KeptStates, keep_states, portions

FREQUENT, SAMPLED = 2048, 512
"""Numbers of tokens that imitation compares; see ``Compared``."""
RIDGE = 100
"""The penalty of the least squares, as a number of tokens with a mean square state."""


@dataclass(frozen=True, kw_only=True)
class TuneProgress:
    """The progress of a run, while it reads a text or after a step."""

    doing: Literal["fit", "distill", "states", "tune", "sample", "gates"]
    done: int
    total: int
    "Total number of tokens (fit, states, sample), steps (distill, tune) or gates."
    loss: Tensor | None = None
    "Loss of the last step in nats per token, summed over the exits."


OnProgress = Callable[[TuneProgress], None]


def tune_exits(
    model: TrainableModel,
    ids: Int[Tensor, " N"],
    config: FrozenConfig,
    *,
    first_tokens: Sequence[int] = (),
    on_progress: OnProgress = lambda progress: None,
) -> None:
    """Train the exits' own heads in place; the frozen backbone runs once over the text.

    ``first_tokens`` begin every window, and nothing is learnt from their states. Afterwards the
    backbone is frozen and the model is in eval mode. Raises ConfigError if the exits have no
    parameters of their own, CorpusError for fewer than 2 tokens, and TrainingError if the loss is
    not finite.
    """
    check_exits(model)
    model.freeze_backbone()
    model.eval()
    parameters = [p for p in model.exits.parameters() if p.requires_grad]
    if len(ids) < 2:
        raise CorpusError(f"corpus: expected at least 2 tokens, got {len(ids)}")
    seq_len = min(config.seq_len, max(1, model.max_length - len(first_tokens)))
    spans = portions(model, len(ids) - 1, seq_len, layers=len(model.exit_layers))
    steps = sum(config.epochs * math.ceil(len(span) / config.batch_size) for span in spans)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    half = config.precision == "bfloat16" or (config.precision == "auto" and has_bfloat16(model))
    # a cast weight is not kept from chunk to chunk: each chunk's graph is dropped
    autocast = partial(
        torch.autocast, model.device.type, torch.bfloat16, enabled=half, cache_enabled=False
    )
    model.exits.train()  # in training mode, exits do not warn that they are untrained
    step = read = 0
    for index, span in enumerate(spans):
        kept = None
        for done, found in keep_states(model, ids, span, seq_len, first_tokens):
            on_progress(TuneProgress(doing="states", done=read + done, total=len(ids) - 1))
            kept = found or kept
        assert kept is not None
        read += len(span)
        if index == 0:
            _begin(model, kept, config)
            compared = Compared(model, kept, generator)
        for rows in _orders(len(span), config, generator):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _rate(step, steps, config.warmup_steps)
            batch = kept.tokens(rows)
            with autocast():
                loss = _loss(model, batch, compared, parameters, config)
            if not torch.isfinite(loss):
                raise TrainingError(f"step {step}: expected a finite loss, got {float(loss)}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_progress(TuneProgress(doing="tune", done=step, total=steps, loss=loss.detach()))
    model.exits.trained = True
    model.eval()


def _loss(
    model: TrainableModel,
    batch: KeptStates,
    compared: "Compared",
    parameters: Sequence[Tensor],
    config: FrozenConfig,
) -> Tensor:
    """Return the loss of a batch in nats per token, summed over the exits."""
    if config.objective == "distill":
        temperature = config.distill_temperature
        return imitation_loss(model, batch, compared, distill_temperature=temperature)
    return text_loss(model, batch, parameters, imitate=config.objective == "both")


def check_exits(model: TrainableModel) -> None:
    """Raise a ConfigError unless there are early exits with parameters of their own."""
    if len(model.exit_layers) < 2:
        raise ConfigError("exit_layers: expected at least one below the last layer, got none")
    if not len(model.exits):
        raise ConfigError(
            "exit_head: expected norm, adapter, full or specialist, which have parameters to "
            f"train, got {model.exit_head}"
        )


def has_bfloat16(model: TrainableModel) -> bool:
    """Return whether bfloat16 products are faster here and the model is in another precision."""
    if model.dtype != torch.float32:
        return False
    if model.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # only in newer versions
    found = capabilities() if capabilities is not None and model.device.type == "cpu" else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@torch.no_grad()
def _begin(model: TrainableModel, kept: KeptStates, config: FrozenConfig) -> None:
    """Draw the adapters with the seed, and fit the linear maps to the final states."""
    *early, last = kept.states
    wanted = model.normalised(kept.states[last]).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for layer in early:
            head = cast(ExitHead, model.exits[str(layer)])
            if head.adapter is None:
                continue
            head.adapter.reset_parameters()
            x = head.norm(kept.states[layer]).float()
            if config.objective != "text" and head.adapter.direct_proj is not None:
                a = least_squares(x, wanted - x)
                head.adapter.direct_proj.weight.copy_(a.T)


def least_squares(x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "D D"]:
    """Return the A that minimises |x A - y|^2 plus a penalty on the size of A."""
    gram = (x.T @ x).double()
    ridge = RIDGE * gram.diagonal().mean() / len(x)
    gram.diagonal().add_(ridge)
    solved: Tensor = torch.linalg.solve(gram, (x.T @ y).double())
    return solved.to(y.dtype)


class Compared:
    """Chooses the tokens of the vocabulary that imitation compares.

    These are the tokens with the largest probabilities of the final layer, and a random sample of
    all others, which is drawn at each step.
    """

    def __init__(self, model: TrainableModel, kept: KeptStates, generator: torch.Generator):
        self.generator = generator
        self.frequent: Tensor | None = None
        if model.vocab_size <= 2 * (FREQUENT + SAMPLED):
            return
        last = max(kept.states)
        mass = torch.zeros(model.vocab_size, device=model.device)
        with torch.no_grad():
            for h in kept.states[last][::8].split(1024):
                mass += F.softmax(model.unembed(h[None], last)[0].float(), dim=-1).sum(0)
        order = mass.argsort(descending=True)
        self.frequent, self.others = order[:FREQUENT], order[FREQUENT:]

    def draw(self) -> tuple[Tensor | None, Tensor | float]:
        """Return token ids (None for all), and the log of how many tokens each represents.

        The log is added to the logits of the tokens.
        """
        if self.frequent is None:
            return None, 0.0
        drawn = torch.randperm(len(self.others), generator=self.generator)[:SAMPLED]
        weight = self.others.new_zeros(FREQUENT + SAMPLED, dtype=torch.float32)
        weight[FREQUENT:] = math.log(len(self.others) / SAMPLED)
        return torch.cat((self.frequent, self.others[drawn.to(self.others.device)])), weight


def imitation_loss(
    model: TrainableModel, batch: KeptStates, compared: Compared, *, distill_temperature: float
) -> Tensor:
    """Return the sum over the exits of KL(p_L || p_e) at a temperature, in nats per token."""
    *early, last = batch.states
    vocab, weight = compared.draw()

    def log_probs(layer: int) -> Tensor:
        logits = model.unembed(batch.states[layer][None], layer, vocab=vocab)[0].float()
        return F.log_softmax(logits / distill_temperature + weight, dim=-1)

    with torch.no_grad():
        teacher = log_probs(last)
    gaps = [F.kl_div(log_probs(e), teacher, reduction="batchmean", log_target=True) for e in early]
    return torch.stack(gaps).sum()


def text_loss(
    model: TrainableModel, batch: KeptStates, parameters: Sequence[Tensor], *, imitate: bool
) -> Tensor:
    """Return the sum over the exits of cross-entropy and, with ``imitate``, KL(p_L || p_e)."""
    *early, last = batch.states
    weights = dict.fromkeys(early, 1.0) | ({last: 0.0} if imitate else {})
    loss, _ = weighted_exit_loss(
        {layer: batch.states[layer][None] for layer in weights},
        model.unembed,
        batch.targets[None],
        weights,
        parameters,
        vocab_size=model.vocab_size,
        distill=1.0 if imitate else 0.0,
    )
    return loss


def _orders(tokens: int, config: FrozenConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of the tokens of each step."""
    for _ in range(config.epochs):
        yield from torch.randperm(tokens, generator=generator).split(config.batch_size)


def _rate(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 1."""
    return min(1.0, step / max(1, warmup)) * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
