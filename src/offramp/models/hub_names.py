"""Names of models on the Hugging Face hub: NAME, or NAME@REVISION. Imports no PyTorch."""

import re
from dataclasses import dataclass

_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}(?<![./])")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """The name of a model on the hub."""

    repository: str
    "OWNER/NAME, or NAME."
    revision: str | None = None
    "A branch, a tag or a commit; None is the main branch."

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def hub_name(name: str) -> HubName | None:
    """Read NAME or NAME@REVISION; None if the hub allows no such name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository, at, revision = name.partition("@")
    if at and not _REVISION.fullmatch(revision):
        return None
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return HubName(repository=repository, revision=revision or None)


def is_commit(text: object) -> bool:
    """Whether a text is the full hash of a commit, which never means another one later."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def not_found(name: str) -> str:
    """Return the sentence for a name that is no folder and no model that the hub shows."""
    return (
        f"{name}: expected a folder with a checkpoint, or the name of a model on the Hugging Face "
        "hub that is public or that your token may read, found neither"
    )
