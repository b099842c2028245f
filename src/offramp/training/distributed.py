"""Training in several processes at once.

``torchrun`` or ``accelerate launch`` starts the processes and accelerate's ``PartialState``
connects them (gloo on the CPU, NCCL on GPUs). PyTorch's ``DistributedDataParallel`` averages
their gradients, or its ``fully_shard`` (FSDP2) also splits the parameters, gradients and
optimizer states among them. accelerate's own FSDP falls back to DDP on the CPU, so it is not
used. A run in one process imports none of these libraries.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from offramp.errors import ConfigError, OfframpError
from offramp.models.base import TrainableModel
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss

T = TypeVar("T")
M = TypeVar("M", bound=TrainableModel)

PATIENCE = timedelta(hours=12)
"""Longest time for which processes wait for each other, for example while rank 0 tokenises."""
_SYNC_BUFFERS = next(  # its name changed in PyTorch 2.13
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The group of processes that train together, seen from one of them.

    All processes must call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    "The device of this process."

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only process that prints and writes files."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """Return the rows of the global batch that this process computes."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def on_main(self, do: Callable[[], T]) -> T:
        """Call a function on rank 0; all processes return its result, or raise its OfframpError.

        The result is sent as a pickle.
        """
        if self.size == 1:
            return do()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = do()
            except OfframpError as error:
                outcome[1] = error
        result, failure = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def from_main(self, value: T) -> T:
        """Return rank 0's value in all processes."""
        return self.on_main(lambda: value)

    def main_first(self, make: Callable[[], T]) -> T:
        """Call a function on rank 0, then on the others, which find rank 0's result in a cache."""
        made: list[T] = []
        self.on_main(lambda: made.append(make()))
        return made[0] if made else make()

    def any(self, value: bool) -> bool:
        """Return whether the value is True in any process."""
        if self.size == 1:
            return value
        from accelerate.utils import reduce

        return bool(reduce(torch.tensor(float(value), device=self.device), "max"))

    def mean(self, loss: Tensor, parts: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the means over the processes of the loss and of its parts by layer."""
        if self.size == 1:
            return loss, parts
        from accelerate.utils import reduce

        loss, *means = reduce(torch.stack((loss, *parts.values())), "mean")
        return loss, dict(zip(parts, means, strict=True))


ALONE = Processes()


def join(device: torch.device | str) -> Processes:
    """Connect this process with those that were started with it, if there are others.

    Raises ConfigError if several processes cannot train on the device.
    """
    device = torch.device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Processes(device=device)
    from accelerate import PartialState

    new = not torch.distributed.is_initialized()
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    if state.num_processes != size:
        raise ConfigError(f"device: expected cpu or cuda for {size} processes, got {device}")
    if new:
        atexit.register(state.destroy_process_group)
    own = state.device  # a model may still be on the CPU when the processes are on GPUs
    own = torch.device("cpu") if own.type == "cpu" else own  # not cpu:0
    return Processes(rank=state.process_index, size=size, device=own)


def local_device(device: str) -> str:
    """Return the device of this process; with several GPUs it is the one of the local rank.

    Raises ConfigError, in all processes, if there are fewer GPUs than processes.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda" or torch.cuda.device_count() < processes:
        raise ConfigError(
            f"device: expected cuda, and a GPU for each of the {processes} processes on this "
            f"machine, got {device} and {torch.cuda.device_count()} GPUs"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def check_processes(config: TrainConfig, processes: Processes) -> None:
    """Raise a ConfigError if the batch cannot be split evenly."""
    parts = config.accumulate * processes.size
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size: expected a multiple of {parts} (accumulate {config.accumulate} x "
            f"{processes.size} processes), got {config.batch_size}"
        )


def distribute(exit_loss: ExitLoss, config: TrainConfig, processes: Processes) -> nn.Module:
    """Return a module whose backward pass averages the gradients over the processes.

    ``ddp`` moves the model to its device and wraps it. ``fsdp`` shards it in place, block by
    block, so that a model on the CPU may be larger than the memory of one GPU. The models of all
    processes must have the same parameters. Make the optimizer afterwards.
    """
    if processes.size == 1:
        return exit_loss
    if config.sharding == "ddp":
        device = processes.device
        constant_tables: dict[str, Any] = {_SYNC_BUFFERS: False}  # nothing to send
        return DistributedDataParallel(
            exit_loss.to(device),
            device_ids=None if device.type == "cpu" else [device],
            find_unused_parameters=True,  # some blocks and heads have no weight at a step
            **constant_tables,
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for module in (*exit_loss.model.block_modules, exit_loss):
        sharded = fully_shard(module, mesh=mesh)
        sharded.unshard()  # once outside of inference mode, in which a validation may be first
        sharded.reshard()
    assert all(_is_sharded(parameter) for parameter in exit_loss.parameters())
    exit_loss.in_step = True
    return exit_loss


@contextmanager
def averaging(module: Any, *, last: bool) -> Iterator[None]:
    """Average gradients over the processes only in the ``last`` part of a batch.

    Use it as a context around the forward and backward pass of each part.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(last)
    yield


@contextmanager
def callable_in_parts(module: Any) -> Iterator[None]:
    """Allow calls of parts of the model (embed, run_layers, unembed), as in a validation.

    Under FSDP2 the parameters outside the blocks are gathered within this context.
    """
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Return the whole tensors on rank 0, and an empty dict elsewhere.

    Sharded tensors are gathered to the CPU, one at a time. Every process must call this.
    """
    gathered = {}
    for name, tensor in tensors.items():
        held: Any = tensor
        value: Tensor = held.full_tensor().cpu() if _is_sharded(tensor) else tensor
        if processes.is_main:
            gathered[name] = value
    return gathered


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, or all of it if ``parameter`` is whole."""
    if not _is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(
        tensor.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,  # every process has read it: nothing is sent
    )


def whole_model(model: M, processes: Processes, *, make: Callable[[], M]) -> M:
    """Return the model with whole parameters on rank 0; if it is not sharded, the model itself.

    ``make`` makes a model of the same shape. Every process must call this. If the model is
    sharded, the other ranks get a model without parameters.
    """
    parameters = dict(model.named_parameters())
    if not any(_is_sharded(parameter) for parameter in parameters.values()):
        return model
    with torch.device("meta"):
        copy = make()
    copy.load_state_dict(whole(parameters, processes), strict=False, assign=True)
    return copy


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether this is FSDP2's DTensor; importing the class would take a second."""
    return hasattr(tensor, "full_tensor")
