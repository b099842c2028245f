"""One commit of files to a model repository on the Hugging Face hub, by ``huggingface_hub``."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.commands.card import CARD_BYTES
from offramp.data.hub import hub_reachable, one_line
from offramp.errors import CheckpointError
from offramp.models.hub_names import HubName
from offramp.models.publish import PublishedFile
from offramp.reading import read_bytes
from offramp.version import __version__

README = "README.md"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is uploaded, and where to."""

    name: HubName
    "The repository, and its branch; the main branch if that is None."
    files: Sequence[PublishedFile]
    stale: Sequence[str] = ()
    "Names of files of an earlier model, which are removed unless they are uploaded."
    message: str
    private: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What is on the hub now."""

    repository: str
    "OWNER/NAME, and @BRANCH where it is not the main branch: what ``offramp.load`` takes."
    commit: str
    url: str
    "The page of the model."
    files: tuple[str, ...]
    "The names of the uploaded files."
    card_kept: bool
    "Whether the repository kept a card that somebody wrote by hand."


def upload(wanted: Upload, *, keeps: Callable[[str], bool], bars: bool = False) -> Pushed:
    """Create the repository and the branch if they are not there, and make one commit.

    ``keeps`` is asked with the repository's card, and says whether it stays. Raises
    CheckpointError if the hub cannot be reached or refuses; nothing is committed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    if not hub_reachable():
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
        raise CheckpointError(
            f"{wanted.name}: expected the hub at {constants.ENDPOINT} to upload to, but {why}"
        )
    api = HfApi(token=wanted.token, library_name="offramp", library_version=__version__)
    branch = wanted.name.revision
    with _sentences(wanted.name), _bars(bars):
        created = api.create_repo(
            wanted.name.repository, private=wanted.private or None, exist_ok=True
        )
        repository = created.repo_id
        info = api.model_info(repository)
        if wanted.private and info.private is False:
            raise CheckpointError(
                f"{repository}: expected a private repository, got one that is public already; "
                "make it private in its settings, or choose another name"
            )
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        there = set(api.list_repo_files(repository, revision=branch))
        files = {file.name: file.content for file in wanted.files}
        kept = False
        if README in files and README in there:
            path = Path(api.hf_hub_download(repository, README, revision=branch))
            kept = keeps(read_bytes(path, at_most=CARD_BYTES).decode("utf-8", "replace"))
        if kept:
            del files[README]
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in files.items()
        ]
        operations += [
            CommitOperationDelete(path_in_repo=name)
            for name in sorted(there & {*wanted.stale} - {*files})
        ]
        commit = api.create_commit(
            repository, operations, commit_message=wanted.message, revision=branch
        )
    return Pushed(
        repository=str(HubName(repository=repository, revision=branch)),
        commit=commit.oid,
        url=str(created),
        files=tuple(sorted(files)),
        card_kept=kept,
    )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Turn off the progress bars of ``huggingface_hub``, and its advice on cards."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    if not shown:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if not shown and not before:
            enable_progress_bars()


@contextmanager
def _sentences(name: HubName) -> Iterator[None]:
    """Convert the errors of ``huggingface_hub`` to a CheckpointError of one sentence."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # the hub's client raises many kinds of errors
        raise CheckpointError(_sentence(name, error)) from None


def _sentence(name: HubName, error: BaseException) -> str:
    status = said = None
    first, last = error, error
    while last is not None:
        response = getattr(last, "response", None)
        if status is None and response is not None:
            status = getattr(response, "status_code", None)
            said = getattr(last, "server_message", None)
        following = last.__cause__ or last.__context__
        if following is None:
            break
        last = following
    detail = f": {' '.join(str(said).split())[:300]}" if said else ""
    if status == 401:
        return (
            f"{name}: expected a token with which the hub lets you write, got none or one that it "
            f"does not know{detail}; log in with: hf auth login, or set HF_TOKEN"
        )
    if status == 403:
        return (
            f"{name}: expected a token that may write there, got one that may not{detail}; use a "
            "token with write access, and the name of an owner that you belong to"
        )
    if status == 404:
        return f"{name}: expected an owner and a branch that the hub has, found none{detail}"
    if status in (409, 412):
        return f"{name}: somebody else changed it meanwhile{detail}; push it again"
    if status is not None:
        return f"{name}: the hub refused the upload with status {status}{detail}"
    text = one_line(first) if first is last else f"{one_line(first)} {one_line(last)}"
    return (
        f"{name}: the upload broke off: {text}; push it again, which does not send again what "
        "arrived"
    )
