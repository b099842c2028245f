"""A model with weights of 8 or 4 bits: ``offramp quantise``."""

from dataclasses import dataclass
from pathlib import Path

from offramp.folders import check_free
from offramp.models.loading import exact_dtype
from offramp.models.model_files import find_model
from offramp.models.native.quantise import precision_beside
from offramp.models.native.schemes import Scheme
from offramp.models.open import open_model
from offramp.models.save import save_model


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The size of a model's stored weights, in bytes."""

    before: int
    after: int


def quantise(
    name: str | Path, weights: Scheme, out: Path, *, base: str | Path | None = None
) -> Sizes:
    """Write a model with quantised weights, its exits, gates and tokenizer into a new folder.

    What is not quantised keeps the precision of the files. ``base`` is the place of the backbone
    of a folder of exits, if it was moved.

    Raises CheckpointError for a model whose weights are quantised already, or not finite, and for
    a folder that is not empty; UnsupportedArchitectureError for a model that the native decoder
    does not run.
    """
    check_free(out)
    files = find_model(name, base=base)
    files.require_numbers(f"since {weights} weights are made of numbers")
    beside = precision_beside(weights, None, exact_dtype(files))
    save_model(open_model(files, weights=weights, dtype=beside), out)
    before = sum(path.stat().st_size for path in files.backbone.weights)
    return Sizes(before=before, after=(out / "model.safetensors").stat().st_size)
