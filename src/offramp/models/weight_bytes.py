"""How many bytes of weights decoding reads: quantised ones are smaller than the numbers beside."""

from offramp.models.base import EarlyExitModel
from offramp.models.native.decoder import Transformer
from offramp.models.native.quantised import QuantisedLinear


def bytes_per_weight(model: EarlyExitModel) -> float:
    """Return the mean number of bytes of a weight of the blocks and LM heads.

    Quantised weights count with their scales and minimums, and with the zeros at their ends.
    """
    layers = [
        module
        for module in (model.modules() if isinstance(model, Transformer) else ())
        if isinstance(module, QuantisedLinear)
    ]
    if not layers:
        return float(model.make_cache(1, 1).keys.element_size())
    size = sum(layer.weight.nbytes for layer in layers)
    return size / sum(layer.in_features * layer.out_features for layer in layers)
