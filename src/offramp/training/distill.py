"""Distil a model into one with shared keys and values (Hinton et al. 2015).

The student learns the teacher's last layer: KL(p_teacher || p_student), and nothing from the text
itself, so that its figures do not improve by learning the text.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from offramp.data import TokenWindows
from offramp.errors import CorpusError, TrainingError
from offramp.models.base import whole_step
from offramp.models.native.decoder import Transformer
from offramp.training.config import TrainConfig
from offramp.training.frozen import has_bfloat16
from offramp.training.loop import batches_from
from offramp.training.optimizer import make_optimizer, set_learning_rate

_CHUNK = 256
"""Number of tokens whose logits are computed at once."""
OnStep = Callable[[int, int, Tensor], None]


def distil(
    student: Transformer,
    teacher: Transformer,
    ids: Int[Tensor, " N"],
    config: TrainConfig,
    *,
    everything: bool = False,
    first_tokens: Sequence[int] = (),
    on_step: OnStep = lambda step, total, loss: None,
) -> None:
    """Train a student with shared keys and values, in place, on the teacher's predictions.

    The attention of the blocks above the source of the keys and values learns, or, with
    ``everything``, all parameters but those of the exits. ``on_step`` is called with the number of
    the step, their total, and the loss in nats per token. Afterwards the student requires no
    gradient and is in eval mode. Raises CorpusError for less text than one window, and
    TrainingError if the loss is not finite.
    """
    windows = TokenWindows(ids, seq_len=config.seq_len, first=first_tokens)
    steps_an_epoch = len(windows) // config.batch_size
    if steps_an_epoch < 1:
        raise CorpusError(
            f"corpus: expected at least {config.seq_len * config.batch_size + 1} tokens to distil "
            f"({config.batch_size} x {config.seq_len} and one more), got {len(ids)}"
        )
    _choose(student, everything)
    teacher.eval()
    total = config.total_steps(steps_an_epoch)
    optimizer = make_optimizer(student, config)
    # a cast weight is not kept from chunk to chunk: each chunk's graph is dropped
    autocast = partial(
        torch.autocast,
        student.device.type,
        torch.bfloat16,
        enabled=has_bfloat16(student),
        cache_enabled=False,
    )
    for step, chosen in zip(
        range(1, total + 1), batches_from(windows, config, step=1), strict=False
    ):
        set_learning_rate(optimizer, step, total, config)
        inputs = windows.batch(chosen)[0].to(student.device)
        with autocast():
            h, wanted = _states(student, teacher, inputs, everything)
            loss = _backward(student, teacher, h, wanted, skip=len(first_tokens))
        if not torch.isfinite(loss):
            raise TrainingError(f"step {step}: expected a finite loss, got {float(loss)}")
        nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step, total, loss)
    student.requires_grad_(False)
    student.exits.requires_grad_(True)
    student.eval()


def _choose(student: Transformer, everything: bool) -> None:
    """Make the parameters that learn require a gradient, and no others."""
    student.requires_grad_(everything)
    student.exits.requires_grad_(False)
    for block in student.model.layers[student.complete_from :]:
        block.self_attn.requires_grad_(True)


def _states(
    student: Transformer, teacher: Transformer, inputs: Int[Tensor, "B T"], everything: bool
) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's states after the last block.

    Blocks that do not learn are run once, for both.
    """
    last, step = teacher.num_layers, whole_step(inputs)
    with torch.no_grad():
        h = teacher.embed(inputs, step=step)
        h = teacher.run_layers(h, 0, student.complete_from, step=step)
        wanted = teacher.run_layers(h, student.complete_from, last, step=step)
    step = whole_step(inputs)
    if everything:
        h = student.run_layers(student.embed(inputs, step=step), 0, last, step=step)
    else:
        h = student.run_layers(h, student.complete_from, last, step=step)
    return h, wanted


def _backward(
    student: Transformer,
    teacher: Transformer,
    h: Float[Tensor, "B T D"],
    wanted: Float[Tensor, "B T D"],
    *,
    skip: int,
) -> Float[Tensor, ""]:
    """Return the mean KL(p_teacher || p_student) after its backward pass, in chunks of tokens."""
    last = student.num_layers
    mine, theirs = (states[:, skip:].flatten(0, 1) for states in (h, wanted))
    leaf = mine.detach().requires_grad_()
    loss = torch.zeros((), device=h.device)
    for start in range(0, len(leaf), _CHUNK):
        rows = slice(start, start + _CHUNK)
        with torch.no_grad():
            taught = F.log_softmax(teacher.unembed(theirs[None, rows], last)[0].float(), dim=-1)
        logits = student.unembed(leaf[None, rows], last)[0].float()
        gap = F.kl_div(F.log_softmax(logits, dim=-1), taught, reduction="sum", log_target=True)
        gap = gap / len(leaf)
        gap.backward()
        loss += gap.detach()
    mine.backward(leaf.grad)
    return loss
