"""What the trainers of ``transformers`` and ``trl`` cannot do with exits, as sentences."""

from typing import Any

from offramp.errors import ConfigError


def check_class(cls: type, mixin: type) -> None:
    """Raise a ConfigError if a trainer stands before the mixin, whose loss it would replace."""
    before = cls.__mro__[1 : cls.__mro__.index(mixin)]
    if any(base.__name__ == "Trainer" for base in before):
        raise ConfigError(
            f"{cls.__name__}: expected ExitLossMixin before the trainer, such as "
            f"class {cls.__name__}({mixin.__name__}, Trainer), got it behind {before[0].__name__}"
        )


def check_trainer(trainer: Any) -> None:
    """Raise a ConfigError if a trainer's arguments ask for what cannot be done with exits."""
    args = trainer.args
    config = getattr(trainer.model, "config", None)
    if config is None:
        raise ConfigError(
            "model: expected a causal language model of transformers, "
            f"got {type(trainer.model).__name__}"
        )
    routers = getattr(config.get_text_config(), "output_router_logits", False)
    precision = trainer.accelerator.mixed_precision
    wrong = {
        "compute_loss_func": trainer.compute_loss_func is not None,
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "torch_compile": args.torch_compile,
        "fp16_full_eval": args.fp16_full_eval,
        "bf16_full_eval": args.bf16_full_eval,
        "loss_type": getattr(args, "loss_type", "nll") != "nll",
        "router_aux_loss_coef": bool(routers),
        "fsdp": trainer.is_fsdp_enabled,
        "deepspeed": trainer.is_deepspeed_enabled,
        "parallelism_config": getattr(trainer.accelerator, "parallelism_config", None) is not None,
    }
    named = [name for name, found in wrong.items() if found]
    if named:
        raise ConfigError(
            f"{named[0]}: expected the default of the trainer with exits, which does not support "
            f"it, got {getattr(args, named[0], True)!r}"
        )
    if precision not in ("no", "bf16"):
        raise ConfigError(
            "fp16: expected bf16 or float32, since the gradients of exits are computed before the "
            f"loss is scaled, got {precision}"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            "n_gpu: expected one GPU for each process, as torchrun and accelerate launch start "
            f"them, got {args.n_gpu} in one process"
        )
