"""Compare the native decoder with ``transformers`` when a checkpoint is first opened.

The native decoder is faster, but ``transformers`` defines what a checkpoint computes. The result
is kept in the cache folder, under a hash of the checkpoint and of the versions of the libraries.
"""

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.cache import cache_folder
from offramp.errors import CheckpointError
from offramp.files import write_json
from offramp.models.base import Step
from offramp.models.huggingface.backbone import load_backbone
from offramp.models.huggingface.library import installed, quiet
from offramp.models.native.decoder import Transformer
from offramp.models.sources import Source
from offramp.models.weights import stored_tensors
from offramp.reading import read_json
from offramp.version import __version__

_TOKENS, _NEAR = 64, 48
"""Number of tokens that are compared; the positions of the others are far apart."""
_CACHED = (4, 1, 1, 1, 1)
"""Numbers of tokens in the last calls of the pass with a cache, over the near tokens."""
_FARTHEST = 4096
"""End of the compared positions: float32 angles of later ones are rounded differently."""
_TOLERANCES = {torch.bfloat16: 0.15, torch.float16: 0.02}
_TOLERANCE = 2e-3
"""Largest difference of a token's logits, as a share of their spread, in other types. SmolLM2
differs by 0.047 in bfloat16 and by less than 1e-4 in float32."""
_VALUES = 64
"""Number of values of each parameter that the hash covers."""


def agrees(model: Transformer, source: Source) -> bool:
    """Return whether the native decoder gives the logits of ``transformers`` for a checkpoint.

    It does without the library, and for a checkpoint that was compared before, without loading
    anything. Raises CheckpointError for a checkpoint that ``transformers`` refuses.
    """
    if not installed():
        return True
    record = cache_folder("checked") / f"{_key(model, source)}.json"
    if _compared(record):
        return True
    difference = _difference(model, load_backbone(source, model.dtype))
    if difference > _TOLERANCES.get(model.dtype, _TOLERANCE):
        return False
    with suppress(CheckpointError, OSError):  # it is compared again next time
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"difference": difference, "checkpoint": source.id})
    return True


def _compared(record: Path) -> bool:
    with suppress(CheckpointError):
        return record.is_file() and isinstance(read_json(record), dict)
    return False


@torch.no_grad()
def _difference(model: Transformer, reference: Any) -> float:
    """Return how much a token's logits differ, as a share of their spread.

    It is the median over the tokens, since bfloat16 rounds a few differently; of those near each
    other, of those far apart, or of those that are decoded with a cache, whichever is largest.
    """
    device = model.device
    random = torch.Generator().manual_seed(0)
    count = min(_TOKENS, model.max_length)
    ids = torch.randint(model.vocab_size, (1, count), generator=random).to(device)
    near = torch.arange(min(_NEAR, count))
    far = torch.linspace(_NEAR, min(_FARTHEST, model.max_length) - 1, count - len(near)).long()
    positions = torch.cat((near, far))[None].to(device)
    step = Step(positions=positions)
    h = model.run_layers(model.embed(ids, step=step), 0, model.num_layers, step=step)
    mine = model.unembed(h, model.num_layers).float()
    with quiet():
        theirs = reference(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.ones_like(ids),  # far positions are no second sequence
            use_cache=False,
        ).logits.float()
    if not theirs.isfinite().all():
        return 0.0  # such a model cannot be compared
    decoded = _decoded(model, ids[:, : len(near)])
    pairs = ((mine, theirs), (decoded, theirs[:, : len(near)][:, -decoded.shape[1] :]))
    spread = theirs.std().clamp(min=torch.finfo(theirs.dtype).tiny)  # zero if all are alike
    whole, last = (
        ((a - b).square().mean(dim=-1).sqrt() / spread).nan_to_num(nan=torch.inf)[0]
        for a, b in pairs
    )
    return max(float(group.median()) for group in (*whole.split(_NEAR), *last.split(_CACHED[0])))


def _decoded(model: Transformer, ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) of the last tokens, which are decoded with a cache."""
    count = ids.shape[1]
    bounds = [0, *(max(0, count - sum(_CACHED[at:])) for at in range(len(_CACHED))), count]
    cache = model.make_cache(1, count)
    parts = []
    for start, stop in pairwise(bounds):
        if start == stop:  # of a model of few positions
            continue
        positions = torch.arange(start, stop, device=ids.device)[None]
        step = Step(positions=positions, cache=cache)
        h = model.run_layers(
            model.embed(ids[:, start:stop], step=step), 0, model.num_layers, step=step
        )
        parts.append(model.unembed(h, model.num_layers).float())
    return torch.cat(parts, dim=1)[:, -sum(_CACHED) :]


def _key(model: Transformer, source: Source) -> str:
    """Hash what the comparison depends on: the config, the weights and the libraries.

    All names, types and shapes are covered, and the first values of each parameter: reading all
    values of a large model takes longer than the comparison.
    """
    config = read_json(source.folder / "config.json")
    stored = {name: [info.dtype, *info.shape] for name, info in stored_tensors(source).items()}
    versions = [__version__, version("transformers"), torch.__version__, str(model.dtype)]
    digest = hashlib.sha256(json.dumps([versions, config, stored], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("exits."):
            first = tensor.detach().reshape(-1)[:_VALUES].cpu().contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
