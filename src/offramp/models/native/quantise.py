"""Quantise a native decoder: the same model with weights of 8 or 4 bits.

The projections of attention and MLP, the LM head and the LM heads of exits are quantised. The
embedding, the norms and the residual blocks of exits keep their numbers: they are small, or, as
the embedding, of which a token reads one row, cost no time. An LM head that is tied to the
embedding becomes a matrix of its own.
"""

from dataclasses import replace

import torch

from offramp.errors import ConfigError
from offramp.models.checks import check_tensor
from offramp.models.native.decoder import Transformer
from offramp.models.native.quantised import QuantisedLinear, quantise_weight
from offramp.models.native.quantised_weight import tensor_forms
from offramp.models.native.schemes import SCHEMES, Scheme

_DTYPES = (torch.float32, torch.bfloat16)


def check_scheme(weights: str) -> Scheme:
    """Return the scheme of this name. Raises a ConfigError for another name."""
    for scheme in SCHEMES:
        if weights == scheme:
            return scheme
    raise ConfigError(f"weights: expected {' or '.join(SCHEMES)}, got {weights!r}")


def precision_beside(
    weights: Scheme, dtype: torch.dtype | None, own: torch.dtype = torch.float32
) -> torch.dtype:
    """Return the precision of what is not quantised: parameters, states and the cache.

    ``dtype`` is the one that the user chose; None for ``own``, that of the files, or float32 if
    the kernels do not have it. Raises a ConfigError for another one than float32 and bfloat16.
    """
    if dtype is None:
        return own if own in _DTYPES else torch.float32
    if dtype not in _DTYPES:
        got = str(dtype).removeprefix("torch.")
        raise ConfigError(f"dtype: expected float32 or bfloat16 with {weights} weights, got {got}")
    return dtype


@torch.no_grad()
def quantised(model: Transformer, weights: Scheme) -> Transformer:
    """Return the model with quantised weights, in eval mode; it shares all other parameters.

    Raises a ConfigError for a model whose weights are quantised already, and for weights that are
    not finite.
    """
    if (had := model.config.weight_format) is not None:
        raise ConfigError(
            f"weights: expected a model whose weights are not quantised, got {had} weights"
        )
    config = replace(model.config, weight_format=weights, tie_word_embeddings=False)
    with torch.device("meta"):
        new = Transformer(config)
    state = model.state_dict()
    for path, module in new.named_modules():
        if isinstance(module, QuantisedLinear):
            try:
                weight = quantise_weight(state.pop(f"{path}.weight"), module.scheme)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            state |= {f"{path}.{name}": tensor for name, tensor in weight.tensors().items()}
    new.load_state_dict(state, assign=True)
    new.requires_grad_(False)
    new.exits.trained, new.exits.warned = model.exits.trained, model.exits.warned
    return new.to(model.device).eval()


def require_whole(model: Transformer) -> None:
    """Raise a ConfigError unless the quantised tensors of a model from outside fit their scheme.

    ``load_state_dict`` has checked their names and shapes, and not their types and numbers.
    """
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            shape = module.out_features, module.in_features
            for name, (form, dtype) in tensor_forms(module.scheme, shape).items():
                check_tensor(f"{path}.{name}", module.get_buffer(name), form, dtype, model.device)
            try:
                module.weight.require_finite()
            except ConfigError as error:
                raise ConfigError(f"{path}.{error}") from None


def weight_format(model: object) -> Scheme | None:
    """Return the scheme of a model's weights; None if they are floating-point numbers."""
    return model.config.weight_format if isinstance(model, Transformer) else None
