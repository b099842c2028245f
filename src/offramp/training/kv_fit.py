"""Give a pretrained decoder shared keys and values, by least squares.

Above a source layer S, all blocks read the keys and values that block S + 1 projects
(``DecoderConfig.kv_source_layer``). They are fitted to the keys and values that the blocks had of
their own, by reduced-rank regression on the input of block S + 1 (Izenman 1975), head by head:

- Values of block l are approximated by M_l times the shared ones, and M_l is multiplied into its
  ``o_proj``. An error counts as much as ``o_proj`` makes of it.
- Keys are rotated by their positions, in pairs of dimensions. A map that is to be multiplied into
  ``q_proj`` must commute with the rotation: it is one complex factor for each pair. An error
  counts as much as the mean square query makes of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from offramp.data import batches
from offramp.errors import ConfigError, CorpusError
from offramp.models.base import TrainableModel, whole_step
from offramp.models.native.blocks import Attention, DecoderBlock
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import native_of
from offramp.training.frozen import RIDGE

TOKENS_PER_INPUT = 32
"""Number of tokens that the regression reads for each dimension of the model."""
_ROWS = 8  # windows at a time
_TINY = 1e-30
_SMALLEST = 1e-6  # weight of an error, relative to the largest


def check_source(model: TrainableModel, source: int) -> None:
    """Raise a ConfigError if blocks above layer ``source`` cannot share keys and values."""
    if (native := native_of(model)) is None:
        raise ConfigError(
            "kv_source: expected a model that the native decoder runs, got one of transformers"
        )
    config = native.config
    if config.kv_source_layer is not None:
        raise ConfigError(
            "kv_source: expected a model whose blocks have keys and values of their own, got one "
            f"that shares those after layer {config.kv_source_layer}"
        )
    if config.norm != "pre":
        raise ConfigError("kv_source: expected a pre-norm model, got a post-norm model")
    if config.num_hidden_layers < 2:
        raise ConfigError(f"kv_source: expected none in a model of one layer, got {source}")
    if not 1 <= source < config.num_hidden_layers:
        raise ConfigError(
            f"kv_source: expected from 1 to {config.num_hidden_layers - 1}, below the last layer, "
            f"got {source}"
        )
    if model.dtype.itemsize < torch.float32.itemsize:
        name = str(model.dtype).removeprefix("torch.")
        raise ConfigError(
            f"kv_source: expected weights in float32, in which they train, got {name}"
        )


def with_config(model: Transformer, **changes: Any) -> Transformer:
    """Return a copy of a model with another config, in eval mode.

    Exits that the model does not have, or has with another kind of head, begin like the last layer.
    Parameters that the other config has no place for are left out.
    """
    config = replace(model.config, **changes)
    with torch.device("meta"):  # draws no random numbers
        new = Transformer(config)
    keeps_exits = config.exit_head == model.exit_head and config.exit_layers == model.exit_layers
    state = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if keeps_exits or not name.startswith("exits.")
    }
    new.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        new.lm_head.weight = new.model.embed_tokens.weight
    new.exits.trained = model.exits.trained and keeps_exits
    if not keeps_exits:
        new.start_exits()
    return new.to(model.device, model.dtype).eval()


@torch.no_grad()
def share_keys_values(
    model: Transformer,
    ids: Int[Tensor, " N"],
    source: int,
    *,
    seq_len: int,
    first_tokens: Sequence[int] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """Return a copy of a model whose blocks above layer ``source`` share keys and values.

    The first ``TOKENS_PER_INPUT`` tokens of ``ids`` for each dimension of the model are read, in
    windows that begin with ``first_tokens``; ``on_progress`` is called with the number of tokens
    that are read and their total. Raises ConfigError if the model cannot share (see
    ``check_source``), and CorpusError for fewer than 2 tokens.
    """
    check_source(model, source)
    if len(ids) < 2:
        raise CorpusError(f"corpus: expected at least 2 tokens, got {len(ids)}")
    ids = ids[: TOKENS_PER_INPUT * model.hidden_size + 1]
    moments = None
    for done, read in _moments(model, ids, source, seq_len, first_tokens):
        moments = read
        on_progress(done, len(ids) - 1)
    assert moments is not None
    shared = with_config(model, kv_source_layer=source)
    maps = moments.maps(_block(model, source).self_attn)
    for head in range(_kv_heads(model.config)):
        _share_values(model, shared, moments, maps, head)
        _share_keys(model, shared, moments, maps, head)
    return shared


@dataclass(frozen=True, kw_only=True)
class _Moments:
    """Sums over the tokens of a text, by block (counted from 0) from the source on."""

    gram: Float[Tensor, "D D"]
    "Products of the inputs of the first of the blocks with themselves."
    products: dict[int, Float[Tensor, "D M"]]
    "Products of these inputs with the block's keys, before rotation, and its values."
    queries: dict[int, Float[Tensor, "H Dh"]]
    "Squares of the block's queries."
    tokens: int

    def maps(self, first: Attention) -> list[Float[Tensor, "D M"]]:
        """Return the least-squares map from the inputs to each block's keys and values.

        That of the ``first`` block is its own projection, which is exact.
        """
        gram = self.gram.clone()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() / self.tokens)
        own = torch.cat((first.k_proj.weight, first.v_proj.weight)).T.to(gram)
        products = [self.products[layer] for layer in sorted(self.products)[1:]]
        above = torch.linalg.solve(gram, torch.cat(products, dim=1)) if products else own[:, :0]
        return [own, *above.split(own.shape[1], dim=1)][: len(self.products)]


def _moments(
    model: Transformer, ids: Tensor, source: int, seq_len: int, first_tokens: Sequence[int]
) -> Iterator[tuple[int, _Moments]]:
    """Yield the number of tokens read so far, and the sums over them."""
    heads = model.config.num_attention_heads
    layers = range(source, model.num_layers)
    total, done = None, 0
    for inputs, targets in batches(ids, seq_len=seq_len, batch_size=_ROWS, first=first_tokens):
        found: dict[str, Any] = {"products": {}, "queries": {}, "tokens": inputs.numel()}
        read = inputs.to(model.device)
        for layer, h in model.states_at(read, layers, step=whole_step(read)):
            block = _block(model, layer)
            x = block.attention_input(h).flatten(0, 1)
            if layer == source:
                first = x
                found["gram"] = (x.T @ x).double()
            attention = block.self_attn
            own = torch.cat((attention.k_proj(x), attention.v_proj(x)), dim=1)
            found["products"][layer] = (first.T @ own).double()
            queries = attention.q_proj(x).view(len(x), heads, -1)
            found["queries"][layer] = queries.square().sum(0).double()
        done += targets.numel()
        total = _Moments(**found) if total is None else _sum(total, _Moments(**found))
        yield done, total


def _sum(one: _Moments, other: _Moments) -> _Moments:
    return _Moments(
        gram=one.gram + other.gram,
        products={layer: one.products[layer] + other.products[layer] for layer in one.products},
        queries={layer: one.queries[layer] + other.queries[layer] for layer in one.queries},
        tokens=one.tokens + other.tokens,
    )


def _share_values(
    model: Transformer,
    shared: Transformer,
    moments: _Moments,
    maps: Sequence[Tensor],
    head: int,
) -> None:
    """Fit the shared values of a key/value head, and multiply each M_l into ``o_proj``."""
    config = model.config
    width, heads = _width(config), _query_heads(config, head)
    kv_size = _kv_heads(config) * width
    columns = slice(kv_size + head * width, kv_size + (head + 1) * width)
    layers = sorted(moments.products)
    blocks = [_block(model, layer).self_attn for layer in layers]
    maps = [found[:, columns] for found in maps]
    metrics = []
    for block in blocks:
        outputs = block.o_proj.weight.double().unflatten(1, (-1, width))[:, heads]
        metrics.append(torch.einsum("dhi,dhj->ij", outputs, outputs))
    sizes, bases = torch.linalg.eigh(torch.stack(metrics))
    sizes = _floored(sizes).sqrt()[:, None]
    weight, back = (bases * sizes) @ bases.mT, (bases / sizes) @ bases.mT
    weighted = [found @ each for found, each in zip(maps, weight, strict=True)]
    together = torch.cat(weighted, dim=1)  # what all blocks' o_proj sees of their values
    _, axes = torch.linalg.eigh(together.T @ moments.gram @ together)
    axes = axes[:, -width:]
    projection = together @ axes
    scale = _ratio(_size(maps[0], moments.gram), _size(projection, moments.gram))
    rows = slice(head * width, (head + 1) * width)
    _block(shared, layers[0]).self_attn.v_proj.weight[rows] = _like(model, projection * scale).T
    for layer, each, part in zip(layers, back, axes.split(width), strict=True):
        outputs = _block(shared, layer).self_attn.o_proj.weight.unflatten(1, (-1, width))
        outputs[:, heads] = _like(model, outputs[:, heads].double() @ (each @ part / scale))


def _share_keys(
    model: Transformer,
    shared: Transformer,
    moments: _Moments,
    maps: Sequence[Tensor],
    head: int,
) -> None:
    """Fit the shared keys of a key/value head, and multiply each factor into ``q_proj``."""
    config = model.config
    width, heads = _width(config), _query_heads(config, head)
    columns = slice(head * width, (head + 1) * width)
    layers = sorted(moments.products)
    keys = torch.stack([_pairs(found[:, columns].T) for found in maps])  # (layers, pairs, D)
    squares = torch.stack([moments.queries[layer][heads].sum(0) for layer in layers])
    first, second = squares.chunk(2, dim=1)
    weights = _floored(first + second).sqrt()  # (layers, pairs)
    gram = moments.gram.to(keys.dtype)
    weighted = (keys * weights[..., None]).permute(1, 2, 0)  # (pairs, D, layers)
    _, axes = torch.linalg.eigh(weighted.mH @ gram @ weighted)
    axes = axes[..., -1:]
    projection = (weighted @ axes)[..., 0]  # (pairs, D)
    scale = _ratio(_sizes(keys[0], gram), _sizes(projection, gram))
    projection = projection * scale[:, None]
    _block(shared, layers[0]).self_attn.k_proj.weight[columns] = _like(model, _unpaired(projection))
    for index, layer in enumerate(layers):  # its keys are about factor x shared
        factor = axes[:, index, 0].conj() / weights[index] / scale
        weight = _block(shared, layer).self_attn.q_proj.weight.unflatten(0, (-1, width))
        for query_head in range(heads.start, heads.stop):
            turned = _pairs(weight[query_head].double()) * factor.conj()[:, None]
            weight[query_head] = _like(model, _unpaired(turned))


def _pairs(rows: Float[Tensor, "Dh D"]) -> Complex[Tensor, "P D"]:
    """Return the pairs of dimensions that rotary positions turn, as complex numbers."""
    return torch.complex(*rows.chunk(2))


def _unpaired(pairs: Complex[Tensor, "P D"]) -> Float[Tensor, "Dh D"]:
    return torch.cat((pairs.real, pairs.imag))


def _size(projection: Float[Tensor, "D M"], gram: Float[Tensor, "D D"]) -> Tensor:
    """Return the root mean square of what a projection makes of the inputs, up to a constant."""
    return (projection * (gram @ projection)).sum().sqrt()


def _sizes(rows: Complex[Tensor, "P D"], gram: Complex[Tensor, "D D"]) -> Float[Tensor, " P"]:
    return (rows.conj() * (rows @ gram)).sum(dim=1).real.sqrt()


def _ratio(size: Tensor, other: Tensor) -> Tensor:
    """Return the ratio of two sizes; 1 if one of them is zero."""
    return torch.where((size > 0) & (other > 0), size / other, 1.0)


def _floored(weights: Tensor) -> Tensor:
    """Return weights above zero, so that what hardly counts can be divided by its weight."""
    return weights.clamp(min=max(float(weights.max()) * _SMALLEST, _TINY))


def _like(model: Transformer, values: Tensor) -> Tensor:
    return values.to(model.device, model.dtype)


def _block(model: Transformer, layer: int) -> DecoderBlock:
    return cast(DecoderBlock, model.model.layers[layer])


def _width(config: DecoderConfig) -> int:
    assert config.head_dim is not None
    return config.head_dim


def _kv_heads(config: DecoderConfig) -> int:
    assert config.num_key_value_heads is not None
    return config.num_key_value_heads


def _query_heads(config: DecoderConfig, head: int) -> slice:
    """Return the attention heads that read a key/value head."""
    group = config.num_attention_heads // _kv_heads(config)
    return slice(head * group, (head + 1) * group)
