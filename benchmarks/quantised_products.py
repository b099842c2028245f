"""Products of a block's weights for a few tokens: offramp's kernels beside those of libraries.

``python benchmarks/quantised_products.py [--hidden 576] [--units 1536] [--layers 30]`` prints, for
1, 2, 4, 8 and 16 tokens, how many tokens a second the products of all blocks allow, and whether the
result of a token depends on the other tokens, which exact speculation forbids. The first line is
the limit: the time to read the weights once. Each figure is the best of some interleaved rounds.
torchao is not in the table; its weights of 4 bits for CPUs call ``_weight_int4pack_mm_for_cpu``.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from offramp.models.native.fast import products
from offramp.models.native.quantised import quantise_weight

TOKENS = (1, 2, 4, 8, 16)
Product = Callable[[torch.Tensor], torch.Tensor]


def library_products(weight: torch.Tensor) -> dict[str, tuple[float, Product]]:
    """Return the products of libraries, by name, with the bytes of a weight."""
    outputs = weight.shape[0]
    half = weight.bfloat16()
    scales = weight.abs().amax(1) / 127
    int8 = (weight / scales[:, None]).round().to(torch.int8)
    found: dict[str, tuple[float, Product]] = {
        "F.linear float32": (4.0, lambda x: F.linear(x, weight)),
        "F.linear bfloat16": (2.0, lambda x: F.linear(x.bfloat16(), half)),
        "torch _weight_int8pack_mm": (
            1.0,
            lambda x: torch._weight_int8pack_mm(x.bfloat16(), int8, scales.bfloat16()),
        ),
    }
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if pack is not None and outputs % 16 == 0 and weight.shape[1] % 32 == 0:
        codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
        packed = pack(codes, 1)
        scale_zero = torch.randn(weight.shape[1] // 32, outputs, 2).bfloat16()
        found["torch _weight_int4pack_mm_for_cpu"] = (
            0.625,
            lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.bfloat16(), packed, 32, scale_zero
            ),
        )
    return found


def our_products(weight: torch.Tensor) -> dict[str, tuple[float, Product]]:
    """Return offramp's products, by format."""
    formats = {
        "float32": (4.0, weight),
        "bfloat16": (2.0, weight.bfloat16()),
        "int8": (1.0625, quantise_weight(weight, "int8")),
        "int4": (0.625, quantise_weight(weight, "int4")),
    }
    return {
        f"offramp {name}": (size, lambda x, of=of: products.linear(x, of))
        for name, (size, of) in formats.items()
    }


def seconds(product: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    product()
    return time.perf_counter() - start


def independent(product: Product, inputs: int) -> bool:
    """Return whether each of 16 tokens gets the bits that it gets alone."""
    x = torch.randn(16, inputs)
    alone = torch.cat([product(row[None]) for row in x])
    return all(torch.equal(product(x[:n]), alone[:n]) for n in range(1, 17))


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--kv", type=int, default=384, help="outputs of keys and values")
    parser.add_argument("--units", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    hidden, units = options.hidden, options.units
    shapes = [
        (hidden + options.kv, hidden),
        (hidden, hidden),
        (2 * units, hidden),
        (hidden, units),
    ]
    weights = options.layers * sum(outputs * inputs for outputs, inputs in shapes)
    space = torch.ones(1 << 28)  # 1 GB
    bandwidth = space.nbytes / min(seconds(space.sum) for _ in range(3))
    print(f"{torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s")
    for size in (4, 2, 1.0625, 0.625):
        print(f"limit of {size} bytes a weight: {bandwidth / (weights * size):.0f} tokens/s")
    del space
    torch.manual_seed(0)
    layers: dict[str, list[tuple[int, Product]]] = {}
    for _ in range(options.layers):  # weights of their own, so that no cache holds them
        for outputs, inputs in shapes:
            weight = torch.randn(outputs, inputs)
            for name, (_, product) in {**our_products(weight), **library_products(weight)}.items():
                layers.setdefault(name, []).append((inputs, product))
    best: dict[tuple[str, int], float] = {}
    for _ in range(options.rounds):
        for name, products_of in layers.items():
            for n in TOKENS:
                states = {inputs: torch.randn(n, inputs) for _, inputs in shapes}
                taken = seconds(lambda: [p(states[i]) for i, p in products_of])  # noqa: B023
                best[name, n] = min(best.get((name, n), taken), taken)
    print(f"{'tokens/s for tokens:':36}", *(f"{n:>7}" for n in TOKENS), " alone = in company")
    for name, products_of in layers.items():
        speeds = [f"{n / best[name, n]:7.0f}" for n in TOKENS]
        alone = "yes" if independent(products_of[0][1], products_of[0][0]) else "no"
        print(f"{name:36}", *speeds, f" {alone}")


if __name__ == "__main__":
    main()
