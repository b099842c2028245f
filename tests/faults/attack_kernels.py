"""Call models and kernels from Python with arguments that do not fit; every call is refused.

A script, because a fault would kill the process, and because Python's ``-O`` removes asserts:
``python [-O] attack_kernels.py NUMBER`` runs the named cases and NUMBER random calls of the
kernels. It prints each call that was not refused with an OfframpError, then how many calls it made.
"""

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from offramp.errors import OfframpError
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate, generate_batch
from offramp.models.base import Step
from offramp.models.kv_cache import KVCache
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.native.fast import kernels
from offramp.models.native.fast.kernel_weights import KernelWeights
from offramp.models.native.quantise import quantised
from offramp.models.native.quantised import SCHEMES, QuantisedWeight, quantise_weight

SHAPE = {
    "vocab_size": 13,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
OTHERS = {
    "fewer layers": {"num_hidden_layers": 2},
    "more layers": {"num_hidden_layers": 5},
    "one layer of keys and values less": {"kv_source_layer": 1},
    "keys and values of two of four layers": {"num_hidden_layers": 4, "kv_source_layer": 1},
    "more heads": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16},
    "fewer heads": {"num_key_value_heads": 1},
    "smaller heads": {"head_dim": 8},
    "larger heads": {"head_dim": 32},
    "heads of another size": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10},
}
Call = tuple[str, Callable[[], Any]]


def native(dtype: torch.dtype = torch.float32, **fields: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(DecoderConfig(**{**SHAPE, **fields})).to(dtype).eval()


def hugging_face() -> Any:
    import transformers

    from offramp.models.huggingface.model import HuggingFaceModel

    fields = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(**fields))
    return HuggingFaceModel(lm.eval(), exit_layers=(1,))


def decode(model: Any, cache: KVCache, ids: torch.Tensor, **step: Any) -> Any:
    """One call of the blocks, after which the logits are computed."""
    fields = {"positions": torch.arange(ids.shape[1])[None], **step}
    at = Step(cache=cache, **fields)
    return model.unembed(model.run_layers(model.embed(ids, step=at), 0, 3, step=at), 3)


def cases_of_caches(model: Any) -> Iterator[Call]:
    ids = torch.ones(2, 3, dtype=torch.long)
    for name, fields in OTHERS.items():
        cache = native(**fields).make_cache(2, 8)
        if cache.keys.shape == model.make_cache(2, 8).keys.shape:  # it has what the model needs
            continue
        yield f"a cache of a model with {name}", lambda cache=cache: decode(model, cache, ids)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cache = native(dtype).make_cache(2, 8)
        yield f"a cache in {dtype}", lambda cache=cache: decode(model, cache, ids)
    meta = model.make_cache(2, 8)
    meta.keys, meta.values = meta.keys.to("meta"), meta.values.to("meta")
    yield "a cache on another device", lambda: decode(model, meta, ids)
    for rows, capacity in ((1, 8), (3, 8), (2, 2)):
        cache = model.make_cache(rows, capacity)
        yield f"{rows} rows of {capacity}", lambda cache=cache: decode(model, cache, ids)
    for tensor in ("keys", "values", "lengths"):
        cache = model.make_cache(2, 8)
        setattr(cache, tensor, getattr(cache, tensor)[..., :1, :])
        yield f"a cache whose {tensor} are cut", lambda cache=cache: decode(model, cache, ids)
    shorter = model.make_cache(2, 8)
    decode(model, shorter, ids)
    shorter.keys.data, shorter.values.data = (
        tensor[:, :, :, :4].clone() for tensor in (shorter.keys, shorter.values)
    )
    late = {"positions": torch.tensor([[5]])}
    yield "cut after its first use", lambda: decode(model, shorter, ids[:, :1], **late)
    yield "no rows", lambda: model.make_cache(0, 8)
    yield "no positions", lambda: model.make_cache(1, 0)
    yield "cropped to less than nothing", lambda: model.make_cache(1, 8).crop(-1)


def cases_of_steps(model: Any) -> Iterator[Call]:
    cache, ids = model.make_cache(2, 8), torch.ones(2, 1, dtype=torch.long)
    many = torch.ones(2, 10, dtype=torch.long)
    steps: dict[str, dict[str, Any]] = {
        "a negative position": {"positions": torch.tensor([[-1]])},
        "a position beyond the cache": {"positions": torch.tensor([[8]])},
        "a position beyond the model": {"positions": torch.tensor([[12]])},
        "positions that are no numbers of slots": {"positions": torch.tensor([[0.5]])},
        "positions in int32": {"positions": torch.tensor([[0]], dtype=torch.int32)},
        "positions of three tokens": {"positions": torch.tensor([[0, 1, 2]])},
        "positions of three rows": {"positions": torch.zeros(3, 1, dtype=torch.long)},
        "positions without rows": {"positions": torch.tensor([0])},
        "a row beyond the cache": {"rows": torch.tensor([0, 2])},
        "a negative row": {"rows": torch.tensor([0, -1])},
        "a row too many": {"rows": torch.tensor([0, 1, 0])},
        "rows in float": {"rows": torch.tensor([0.0, 1.0])},
        "padding of another shape": {"real": torch.ones(2, 3, dtype=torch.bool)},
        "padding in numbers": {"real": torch.ones(2, 1)},
    }
    for name, step in steps.items():
        yield name, lambda step=step: decode(model, cache, ids, **step)
        wide = {
            key: value.expand(-1, 10)
            if key == "positions" and value.dim() == 2 and value.shape[1] == 1
            else value
            for key, value in step.items()
        }
        yield f"{name}, many tokens", lambda wide=wide: decode(model, cache, many, **wide)
    step = Step(positions=torch.tensor([[0]]), cache=cache)
    h = torch.zeros(2, 1, 64)
    for start, stop in ((-1, 2), (0, 4), (2, 1), (4, 4)):
        layers = f"layers {start} to {stop}"
        yield layers, lambda a=start, b=stop: model.run_layers(h, a, b, step=step)
        yield layers, lambda a=start, b=stop: model.project_kv(h, a, b, step=step)
    for name, x in {
        "states of another width": torch.zeros(2, 1, 63),
        "states of one row": torch.zeros(1, 64),
        "states in whole numbers": torch.zeros(2, 1, 64, dtype=torch.long),
        "no states": torch.zeros(2, 0, 64),
    }.items():
        yield name, lambda x=x: model.run_layers(x, 0, 3, step=step)
        yield name, lambda x=x: model.project_kv(x, 0, 3, step=step)
        yield name, lambda x=x: model.unembed(x, 3)
    for layer in (0, -1, 4):
        yield f"exit layer {layer}", lambda layer=layer: model.unembed(h, layer)
    for active in (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 1)):
        yield "active tokens", lambda a=active: model.run_layers(h, 0, 3, step=step, active=a)
    without = replace(step, cache=None)
    yield "keys and values without a cache", lambda: model.project_kv(h, 0, 3, step=without)
    negative = replace(without, positions=torch.tensor([[-1]]))
    yield "a negative position, no cache", lambda: model.run_layers(h, 0, 3, step=negative)
    late = replace(without, positions=torch.tensor([[12]]))
    yield "a late position, no cache", lambda: model.run_layers(h, 0, 3, step=late)


def cases_of_prompts(model: Any) -> Iterator[Call]:
    """More tokens of one row than a call of a few tokens has; ``model`` has 24 positions."""
    cache, ids, at = model.make_cache(2, 22), torch.ones(1, 20, dtype=torch.long), torch.arange(20)
    steps: dict[str, dict[str, Any]] = {
        "before the first position": {"positions": at[None] - 1},
        "beyond the cache": {"positions": at[None] + 3},
        "beyond the model": {"positions": at[None] + 5},
        "far beyond": {"positions": at[None] + 2**40},
        "fewer positions": {"positions": at[None, :17]},
        "more positions": {"positions": torch.arange(21)[None]},
        "positions without rows": {"positions": at},
        "one position for all": {"positions": torch.tensor(3)},
        "positions in int32": {"positions": at[None].int()},
        "positions that are no whole numbers": {"positions": at[None] + 0.5},
        "no row": {"rows": torch.zeros(0, dtype=torch.long)},
        "two rows": {"rows": torch.tensor([0, 1])},
        "a row beyond the cache": {"rows": torch.tensor([2])},
        "a negative row": {"rows": torch.tensor([-1])},
    }
    one = {"rows": torch.tensor([1])}
    for name, step in steps.items():
        yield f"prompt, {name}", lambda step=step: decode(model, cache, ids, **{**one, **step})
    positions = at[None]
    for name, shape in {"of another width": (1, 20, 63), "of two rows": (2, 20, 64)}.items():
        at_start = Step(positions=positions, cache=cache, **one)
        h = torch.zeros(shape)
        yield f"prompt, states {name}", lambda h=h, s=at_start: model.run_layers(h, 0, 3, step=s)
        yield f"prompt, states {name}", lambda h=h, s=at_start: model.project_kv(h, 0, 3, step=s)


def cases_of_ids(model: Any, forward: Callable[[torch.Tensor], Any]) -> Iterator[Call]:
    for name, ids in {
        "a negative id": torch.tensor([[1, -1]]),
        "an id beyond the vocabulary": torch.tensor([[13, 1]]),
        "a huge id": torch.tensor([[2**62]]),
        "no ids": torch.zeros(1, 0, dtype=torch.long),
        "no rows of ids": torch.zeros(0, 2, dtype=torch.long),
        "ids in float": torch.ones(1, 2),
        "ids of one row": torch.ones(2, dtype=torch.long),
        "more ids than positions": torch.ones(1, 13, dtype=torch.long),
    }.items():
        yield name, lambda ids=ids: forward(ids)
    config = GenerateConfig(max_new_tokens=2)
    for prompt in ([-1], [13], [2**70], [], None, 3, "ab", [1.5], ["1"], [None], [[1]]):
        yield f"prompt {prompt}", lambda p=prompt: generate(model, p, config)
        yield f"prompts {prompt}", lambda p=prompt: generate_batch(model, [[1], p], config)
    for prompt in (torch.ones(1, 2).long(), torch.ones(2), torch.tensor(3), torch.ones(13).long()):
        yield f"prompt {prompt.shape}", lambda p=prompt: generate(model, p, config)


def named_cases() -> Iterator[Call]:
    models = (
        ("native", native()),
        ("shared keys and values", native(kv_source_layer=1)),
        *((scheme, quantised(native(), scheme)) for scheme in SCHEMES),
        ("transformers", hugging_face()),
    )
    for kind, model in models:
        with torch.inference_mode():
            for cases in (cases_of_caches, cases_of_steps):
                yield from ((f"{kind}: {name}", call) for name, call in cases(model))
            if kind != "transformers":
                longer = native(
                    max_position_embeddings=24, kv_source_layer=model.config.kv_source_layer
                )
                scheme = model.config.weight_format
                longer = longer if scheme is None else quantised(longer, scheme)
                yield from ((f"{kind}: {name}", call) for name, call in cases_of_prompts(longer))
            forward = model if kind != "transformers" else lambda ids, m=model: ids_by_steps(m, ids)
            for name, call in cases_of_ids(model, forward):
                yield f"{kind}: {name}", call


def ids_by_steps(model: Any, ids: torch.Tensor) -> Any:
    positions = torch.arange(ids.shape[-1])[None]
    step = Step(positions=positions)
    return model.run_layers(model.embed(ids, step=step), 0, 3, step=step)


# Random calls of the kernels' entry points.


def changed(tensor: Any, rng: random.Random) -> Any:
    """A tensor of another shape, type, order in memory, place or content.

    A quantised weight becomes one of other rows or of another scheme, or a tensor.
    """
    if isinstance(tensor, QuantisedWeight):
        rows, inputs = tensor.shape
        return rng.choice(
            (
                tensor[: rows // 2],
                tensor.dequantised(),
                *(quantise_weight(torch.randn(rows, inputs + more), "int8") for more in (0, 1)),
            )
        )
    kind = rng.choice(("dtype", "cut", "grown", "transposed", "strided", "meta", "flat", "values"))
    if kind == "dtype":
        types = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)
        return tensor.to(rng.choice(types))
    if kind in ("cut", "grown") and tensor.dim():
        dim = rng.randrange(tensor.dim())
        size = rng.choice((0, 1, tensor.shape[dim] // 2, tensor.shape[dim] - 1))
        size = tensor.shape[dim] * 2 + 1 if kind == "grown" else max(0, size)
        shape = list(tensor.shape)
        shape[dim] = size
        return torch.zeros(shape, dtype=tensor.dtype)
    if kind == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if kind == "strided":
        return torch.cat((tensor, tensor), dim=-1)[..., ::2] if tensor.dim() else tensor
    if kind == "meta":
        return tensor.to("meta")
    if kind == "flat":
        return tensor.flatten()
    if not tensor.is_floating_point():
        return torch.full_like(tensor, rng.choice((-1, -(2**40), 5, 7, 8, 100, 2**40)))
    return tensor


def random_call(rng: random.Random) -> Call:
    """One of the entry points with some of its arguments changed."""
    dtype = rng.choice((torch.float32, torch.bfloat16))
    text = rng.random() < 0.3  # many tokens of one row
    layers, rows, heads, kv_heads, size, capacity, tokens = 2, 3, 4, 2, 8, 6, 4
    if text:
        capacity, tokens = 24, 20
    hidden, units, own = 16, 12, rng.random() < 0.7
    weights = [
        [
            torch.randn((heads + 2 * kv_heads) * size, hidden, dtype=dtype),
            torch.randn(hidden, heads * size, dtype=dtype),
            torch.randn(2 * units, hidden, dtype=dtype),
            torch.randn(hidden, units, dtype=dtype),
            torch.ones(hidden, dtype=dtype),
            torch.ones(hidden, dtype=dtype),
        ]
        for _ in range(layers)
    ]
    scheme = rng.choice((None, None, *SCHEMES))
    if scheme is not None:
        weights = [[*(quantise_weight(w, scheme) for w in of[:4]), *of[4:]] for of in weights]
    above = rng.choice((0, 0, 1, 2))  # blocks that share the keys and values of the last layer
    weights += [[weights[0][0][: heads * size], *weights[0][1:]] for _ in range(above)]
    cache_layers = layers if rng.random() < 0.8 else rng.choice((None, 0, 1, 3, -1, 2**40))
    given = {
        "keys": torch.zeros(layers, rows, kv_heads, capacity, size, dtype=dtype),
        "values": torch.zeros(layers, rows, kv_heads, capacity, size, dtype=dtype),
        "lengths": torch.zeros(layers, rows, dtype=torch.long),
        "cos": torch.ones(capacity, size),
        "sin": torch.zeros(capacity, size),
        "slots": torch.arange(tokens),
        "rows": torch.ones(tokens, dtype=torch.long) if text else torch.tensor([0, 1, 2, 0]),
        "x": torch.randn(tokens, hidden),
        "qkv": torch.randn(tokens, (heads + (2 * kv_heads if own else 0)) * size),
        "residual": torch.randn(tokens, 2 * units),
    }
    for name in rng.sample(sorted(given), rng.choice((0, 1, 1, 2))):
        given[name] = changed(given[name], rng)
    if rng.random() < 0.3:
        block, which = rng.randrange(len(weights)), rng.randrange(6)
        weights[block][which] = changed(weights[block][which], rng)
    numbers = (0, 1, 2, 3, -1, 2**40)
    start, stop, kept = (0, len(weights), 0) if rng.random() < 0.7 else rng.choices(numbers, k=3)
    layer = rng.choice((0, 1, 1, *numbers))
    head_dim = rng.choice((size, size, size, 0, 1, 7, 16, 512, -8))
    kind = rng.choice(("linear", "prepared", "attend", "blocks"))

    def call() -> Any:
        if kind == "linear":
            weight = weights[0][2]
            gated = rng.random() < 0.3
            norm = weights[0][4] if rng.random() < 0.5 else None
            return kernels.linear(
                given["x"], weight, norm=norm, eps=1e-5, gated=gated, residual=given["residual"]
            )
        if kind == "prepared":
            norm = weights[0][4] if rng.random() < 0.5 else None
            return kernels.prepared(given["x"], dtype, norm=norm, eps=1e-5)
        cache = kernels.KernelCache(*(given[n] for n in ("keys", "values", "lengths")), *tables)
        at = kernels.CachedTokens(cache, slots=given["slots"], rows=given["rows"])
        if kind == "attend":
            return at.attend(given["qkv"], layer, own=own ^ (rng.random() < 0.1))
        whole = KernelWeights(
            weights,
            head_dim=head_dim,
            eps=1e-5,
            post=rng.random() < 0.5,
            cache_layers=cache_layers,
        )
        return at.blocks(given["x"], whole, start, stop, kept=kept)

    tables = (given["cos"], given["sin"])
    return f"random {kind}", call


def refused(name: str, call: Callable[[], Any]) -> bool:
    """Whether a call ended with an OfframpError; prints its end if it did otherwise."""
    try:
        call()
    except OfframpError as error:
        if "\n" in str(error):
            print(f"{name}: several lines: {error}")
        return True
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    else:
        return False
    return True


def main(number: int) -> None:
    made = 0
    for name, call in named_cases():
        with torch.inference_mode():
            if not refused(name, call):
                print(f"{name}: was not refused")
        made += 1
    print(made, "cases")
    if kernels._compiled is None:
        return
    rng = random.Random(0)
    outcomes = [refused(*random_call(rng)) for _ in range(number)]
    print(len(outcomes), "random calls,", outcomes.count(True), "refused")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(int(sys.argv[1]))
