"""The loss of a batch as one module, which can be wrapped by DDP and similar wrappers."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offramp.exits.gradients import branch_of
from offramp.exits.layer_dropout import keep_mask, layer_dropout_rates
from offramp.exits.loss import head_parameters, weighted_exit_loss
from offramp.exits.schedules import loss_schedule
from offramp.models.base import Step, TrainableModel, whole_step
from offramp.training.checks import check_branches, check_model
from offramp.training.config import TrainConfig


class ExitLoss(nn.Module):
    """Computes the loss of a batch, and its parts by layer, for the objective of a config.

    Only the layers that have a weight at this step are unembedded, and no block above the last
    of them runs. With ``in_step`` a block runs in all processes or in none, as FSDP2 requires.
    A model whose blocks cannot be run one by one is run whole; ``check_model`` rejects the
    options that it then does not support.
    """

    def __init__(self, model: TrainableModel, config: TrainConfig, *, total_steps: int) -> None:
        super().__init__()
        check_model(model, config)
        self.model = model
        self.config = config
        self.schedule = loss_schedule(
            config,
            total_steps=total_steps,
            num_layers=model.num_layers,
            exit_layers=model.exit_layers,
        )
        check_branches(model, config, self.schedule.layers)
        self.branch = branch_of(config)
        self.in_step = False
        self.heads = head_parameters(
            model.unembed,
            self.schedule.layers,
            dict(model.named_parameters()),
            hidden_size=model.hidden_size,
        )

    def forward(
        self,
        inputs: Int[Tensor, "B S"],
        targets: Int[Tensor, "B T"],
        *,
        step: int,
        rows: slice | None = None,
        kept: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the loss in nats per token, and the detached CE of each weighted layer.

        ``inputs`` may begin with tokens that have no target. ``rows`` are the rows of the global
        batch that these inputs are (default: all). ``kept`` is True at the targets that count;
        None if all do. Without any, the loss is 0.
        """
        weights = self.schedule.at(step)
        rows = rows or slice(0, len(inputs))
        states = self._states(inputs, weights, step, rows)
        if inputs.shape[1] > targets.shape[1]:
            states = {layer: h[:, -targets.shape[1] :] for layer, h in states.items()}
        if kept is not None:
            states = {layer: h[kept][None] for layer, h in states.items()}
            targets = targets[kept][None]
        parameters = dict(self.model.named_parameters())
        autocast = self.config.precision == "bfloat16"
        # a cast weight is not kept from chunk to chunk: each chunk's graph is dropped
        with torch.autocast(
            inputs.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False
        ):
            return weighted_exit_loss(
                states,
                self.model.unembed,
                targets,
                weights,
                [parameters[name] for name in self.heads],
                vocab_size=self.model.vocab_size,
                distill=self.config.distill,
                temperature=self.config.distill_temperature,
            )

    def _states(
        self, inputs: Tensor, weights: Mapping[int, float], step: int, rows: slice
    ) -> dict[int, Tensor]:
        where = whole_step(inputs)
        rates = layer_dropout_rates(
            self.config, step, self.schedule.total_steps, self.model.num_layers
        )
        layers = sorted(weights)
        last = self.model.num_layers
        branches = len({*layers, last})  # the last layer is a branch, weighted or not
        states: dict[int, Tensor] = {}
        autocast = self.config.precision == "bfloat16"
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=autocast):
            if self.model.why_no_blocks:
                return dict(self.model.states_at(inputs, layers, step=where))
            h = self.model.embed(inputs, step=where)
            done = 0
            for index, layer in enumerate(layers, start=1):
                h = self._run(h, done, layer, where, rates, step, rows)
                done = layer
                branch = branches if layer == last else index
                states[layer], h = self.branch(h, branch, branches)
        return states

    def _run(
        self,
        h: Tensor,
        start: int,
        stop: int,
        where: Step,
        rates: tuple[float, ...],
        step: int,
        rows: slice,
    ) -> Tensor:
        """Run blocks start+1 .. stop, with layer dropout and recomputation if configured.

        A row that skips the block whose keys and values others share still gives them its own.
        """
        recompute = self.config.recompute_activations and torch.is_grad_enabled()
        if not any(rates) and not recompute:
            return self.model.run_layers(h, start, stop, step=where)
        complete, written = self.model.complete_from, self.model.cache_layers
        batch_size = max(self.config.batch_size, rows.stop)
        for layer in range(start + 1, stop + 1):
            chosen = active = None
            if rates[layer - 1]:
                kept = keep_mask(
                    rates,
                    layer,
                    seed=self.config.seed,
                    step=step,
                    rows=slice(0, batch_size),
                    batch_size=batch_size,
                )
                keep = kept[rows]
                gives = complete < layer <= written
                if not gives and not (kept if self.in_step else keep).any():
                    continue
                if not keep.all() and layer > complete:  # shared keys and values are of all rows
                    active = keep.to(h.device)[:, None].expand(h.shape[:2])
                elif not keep.all():
                    chosen = keep.nonzero().flatten().to(h.device)
            idle = chosen is not None and not len(chosen)  # only here; other processes have rows
            part = h if chosen is None else h[:1] if idle else h[chosen]
            if recompute:
                part = checkpoint(
                    self.model.run_layers,
                    part,
                    layer - 1,
                    layer,
                    step=where,
                    active=active,
                    use_reentrant=False,
                )
            else:
                part = self.model.run_layers(part, layer - 1, layer, step=where, active=active)
            part = part[:0] if idle else part  # one row without effect, for the collectives
            h = part if chosen is None else h.index_copy(0, chosen, part.to(h.dtype))
        return h
