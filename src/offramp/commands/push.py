"""A model with exits on the Hugging Face hub: ``offramp push`` and ``lm.push_to_hub``."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.commands.card import CARD_BYTES, card_of, certified
from offramp.commands.push_config import PushConfig, branch_name
from offramp.commands.upload import README, Pushed, Upload, upload
from offramp.errors import CheckpointError, ConfigError
from offramp.models.fitted import FITTED_FILE
from offramp.models.huggingface.exits_file import EXITS_FILE, EXITS_JSON
from offramp.models.model_files import find_model
from offramp.models.open import OpenedModel
from offramp.models.publish import INDEX, PublishedFile, published_files, refuse_link
from offramp.models.save import save_model
from offramp.reading import read_bytes
from offramp.report.card import CERTIFICATE, is_generated
from offramp.report.result import ResultTable
from offramp.schema import shown

_EMPTY = "[More Information Needed]"
Sweep = str | Path | Mapping[str, Any] | ResultTable[Any]


def push(
    opened: OpenedModel,
    name: str,
    config: PushConfig,
    *,
    sweep: Sweep | None = None,
    certificate: str | Path | Certificate | None = None,
    bars: bool = False,
) -> Pushed:
    """Upload the files of an opened model's folder, and a card, in one commit.

    ``name`` is OWNER/NAME, perhaps with @BRANCH. A README.md in the folder that was written or
    edited by hand is the card; otherwise one is generated, with the figures of ``sweep`` and what
    ``certificate`` says. Raises ConfigError for a name that the hub does not allow, CheckpointError
    for a model that cannot be published and for what the hub refuses.
    """
    where = branch_name(name)
    assert opened.files is not None
    files = published_files(opened.files)
    own = opened.files.own
    assert own is not None
    given = {"license": config.license, "sweep": sweep, "certificate": certificate}
    written = None if config.replace_card else written_card(own)
    if written is not None:
        _refuse_given(own, given)
    content = sweep.content if isinstance(sweep, ResultTable) else sweep
    stored = None if certificate is None else certified(certificate, opened)
    card = written or card_of(
        opened, name=str(where), license=config.license, sweep=content, certificate=stored
    )
    files.append(PublishedFile(name=README, content=card.encode()))
    if stored is not None:
        text = json.dumps(stored.content(), indent=2, ensure_ascii=False) + "\n"
        files.append(PublishedFile(name=CERTIFICATE, content=text.encode()))
    decided = written is not None or config.replace_card
    return upload(
        Upload(
            name=where,
            files=files,
            stale=_stale({file.name for file in files}),
            message=config.commit_message,
            private=config.private,
            token=config.token,
        ),
        keeps=lambda there: not decided and by_hand(there),
        bars=bars,
    )


def push_in_memory(opened: OpenedModel, name: str, config: PushConfig, **given: Any) -> Pushed:
    """Do what ``push`` does with a model as it is in memory: what ``save`` would write."""
    branch_name(name)
    before = opened.files
    with TemporaryDirectory() as aside:
        title = branch_name(name).repository.rpartition("/")[2]
        folder = Path(aside) / title
        save_model(opened, folder)
        if before is not None and before.own is not None and (before.own / README).is_file():
            refuse_link(before.own / README, before.own)
            (folder / README).write_bytes(read_bytes(before.own / README, at_most=CARD_BYTES))
        apart = (folder / EXITS_JSON).is_file() and not (folder / "config.json").is_file()
        base = before.backbone if apart and before is not None else None
        files = replace(find_model(folder, base=base), name=opened.name)
        return push(replace(opened, files=files), name, config, **given)


def written_card(folder: Path) -> str | None:
    """Return a folder's README.md if it was written or edited by hand."""
    path = folder / README
    if not path.is_file():
        return None
    refuse_link(path, folder)
    try:
        text = read_bytes(path, at_most=CARD_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: expected text in UTF-8, got other bytes") from None
    return text if by_hand(text) else None


def by_hand(text: str) -> bool:
    """Whether somebody wrote a card: neither offramp, nor peft, whose card is an empty form."""
    return bool(text.strip()) and not is_generated(text) and text.count(_EMPTY) < 5


def _refuse_given(own: Path, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name}: expected none, since the card in {own / README} was written by hand and "
                f"is uploaded as it is (replace it by replace_card, --replace-card), got "
                f"{shown(str(value))}"
            )


def _stale(uploaded: set[str]) -> tuple[str, ...]:
    """Return files of an earlier model, which would be read beside the uploaded ones."""
    exits = (EXITS_JSON, EXITS_FILE, FITTED_FILE)
    return (*exits, "model.safetensors", INDEX) if "config.json" in uploaded else exits
