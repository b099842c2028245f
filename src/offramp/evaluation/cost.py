"""What a routed token costs."""

from collections.abc import Sequence


def compute_pct(counts: Sequence[int], exit_layers: Sequence[int], num_layers: int) -> float:
    """Layers run / layers in the model, in percent, for ``counts[i]`` tokens leaving at exit i.

    The seed document's Compute%: exit heads and the missing keys and values are not counted.
    """
    layers_run = sum(count * layer for count, layer in zip(counts, exit_layers, strict=True))
    return 100.0 * layers_run / (sum(counts) * num_layers)
