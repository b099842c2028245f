"""Where the backbone of a folder of exits is: ``base`` in ``offramp.json``."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.errors import CheckpointError, OfframpWarning
from offramp.models.computation import file_hashes
from offramp.models.hub_names import hub_name, is_commit
from offramp.models.huggingface.adapter import with_adapter
from offramp.models.sources import DEMO, Source, find_checkpoint
from offramp.schema import shown


def base_of(
    folder: Path, about: Mapping[str, Any], base: str | Path | Source | None = None
) -> Source:
    """Return the checkpoint of a folder's exits, by the content ``about`` of ``read_exits``.

    If the folder holds an adapter, it is merged into the checkpoint. ``base`` is the place of the
    checkpoint, if it was moved. Raises CheckpointError if it is not found or has other weights, and
    warns with an OfframpWarning if its config computes something else or its tokenizer is another
    one.
    """
    stored = about["base"]
    wrong: list[CheckpointError] = []
    for place in _places(folder, stored) if base is None else [base]:
        try:
            source = find_checkpoint(place if isinstance(place, Source) else str(place))
        except CheckpointError as error:
            wrong.append(
                CheckpointError(
                    f"{folder}: its exits need another model, whose place --base can name: {error}"
                )
            )
            continue
        if source.sha256 == stored["sha256"]:
            if source is not base:
                _compare_files(folder, stored, source)
            return with_adapter(source, folder, about)
        wrong.append(
            CheckpointError(
                f"{folder}: its exits were trained on {source.id} with sha256 {stored['sha256']}, "
                f"but its sha256 is now {source.sha256}; --base can name another place"
            )
        )
    raise wrong[0]


def _compare_files(folder: Path, stored: Mapping[str, Any], source: Source) -> None:
    now = file_hashes(source)
    for key, name in (("config_sha256", "config.json"), ("tokenizer_sha256", "tokenizer.json")):
        if stored.get(key) not in (None, now.get(key)):
            warnings.warn(
                f"{folder}: its exits were trained with another {name} of {source.id} than the one "
                "that is there now, so their results may be wrong",
                OfframpWarning,
                stacklevel=3,
            )


def _places(folder: Path, stored: Mapping[str, Any]) -> list[str]:
    """Return where a backbone may be: relative to the folder of exits, or where it was before.

    On the hub it is the commit that was used, or if that is gone, the main branch.
    """
    name = stored["id"]
    if not name.startswith("."):
        revision = stored.get("revision")
        return [f"{name}@{revision}", name] if is_commit(revision) else [name]
    before = stored.get("folder")
    beside = os.path.normpath(folder.resolve() / name)
    return list(dict.fromkeys([beside, *([before] if isinstance(before, str) else [])]))


def refuse_local(name: str, stored: Mapping[str, Any]) -> None:
    """Refuse exits from the hub whose backbone is a folder: what is on this machine is not theirs.

    ``stored`` is ``base`` of ``offramp.json``; ``.`` is the repository of the exits itself.
    """
    place = stored["id"]
    if place != "." and place != DEMO and hub_name(place) is None:
        raise CheckpointError(
            f"{name}: base.id: expected the name of a model on the hub, since the exits are from "
            f"there, got {shown(place)}; --base can name the place of their backbone"
        )


def place_of(source: Source, folder: Path) -> dict[str, str]:
    """Return the name of the backbone in ``offramp.json``, and of a folder also its place.

    Of a model on the hub it is the name and the commit. The name of a folder is relative to
    ``folder`` if they have a folder in common, so that both can be moved together; ``.`` is the
    folder itself.
    """
    if source.revision is not None:
        return {"id": source.id, "revision": source.revision}
    if source.packaged is not None or not Path(source.id).expanduser().is_dir():
        return {"id": source.id}
    path, here = source.folder.resolve(), folder.resolve()
    if path == here:
        return {"id": "."}
    if os.path.commonpath((path, here)) == path.anchor:
        return {"id": str(path)}
    relative = os.path.relpath(path, here)
    return {"id": relative if relative[0] == "." else f"./{relative}", "folder": str(path)}
