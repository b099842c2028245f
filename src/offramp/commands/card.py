"""The model card of an opened model: ``offramp card``, and what ``offramp push`` uploads."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.calibration.certificate import Certificate
from offramp.commands.push_config import check_license
from offramp.errors import ConfigError
from offramp.files import replacing
from offramp.models.open import OpenedModel
from offramp.models.publish import corpus_name, dataset_of, published_base, without_places
from offramp.models.sources import DEMO
from offramp.reading import read_bytes, read_json, value_of
from offramp.report.card import Backbone, CardFacts, is_generated, model_card
from offramp.version import __version__

CARD_BYTES = 4 << 20
"""Largest model card that is read."""
NAME = "OWNER/NAME"
"""What a card calls a model whose name on the hub is not known yet."""


@dataclass(frozen=True, kw_only=True)
class _SweptRow:
    threshold: float | tuple[float, ...]
    ppl: float
    compute_pct: float
    flops_pct: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """The fields of a sweep's result that a card shows."""

    num_layers: int
    exit_layers: tuple[int, ...]
    n_tokens: int
    missing_kv: str
    seen_in_training: bool
    confidence: str
    corpus: Mapping[str, Any]
    rows: tuple[_SweptRow, ...]


def card_of(
    opened: OpenedModel,
    *,
    name: str | None = None,
    license: str | None = None,
    sweep: str | Path | Mapping[str, Any] | None = None,
    certificate: str | Path | Certificate | None = None,
) -> str:
    """Return the model card of an opened model, in Markdown.

    ``name`` is its name on the hub. ``sweep`` is what ``offramp sweep`` wrote for this model, or
    the file of it; ``certificate`` a certificate of it. Raises ConfigError for a sweep of other
    exits, and CertificateError for the certificate of another model.
    """
    about = without_places(dict(opened.files.about)) if opened.files else {}
    native = opened.files is not None and opened.files.kind == "native"
    tuned = about.get("trained")
    tuned = tuned if isinstance(tuned, dict) else None
    specialised = about.get("specialised") or (tuned or {}).get("specialised")
    facts = CardFacts(
        name=name or NAME,
        title=(name or _folder(opened)).rpartition("/")[2].partition("@")[0],
        num_layers=opened.model.num_layers,
        exit_layers=tuple(opened.model.exit_layers[:-1]),
        exit_head=opened.model.exit_head,
        vocab_size=opened.model.vocab_size,
        precision=opened.precision,
        weights=opened.weights,
        sha256=opened.sha256,
        backbone=_backbone(opened),
        exits_trained=opened.exits_trained,
        unfinished=opened.unfinished,
        tuned=tuned if tuned and ("tokens" in tuned or "objective" in tuned) else None,
        trained=about if native and "training" in about else None,
        specialised=specialised if isinstance(specialised, dict) else None,
        datasets=_datasets(about),
        license=check_license(license),
        sweep=None if sweep is None else swept(sweep, opened),
        certificate=None if certificate is None else certified(certificate, opened).content(),
        versions=_versions(about),
    )
    return model_card(facts)


def write_card(path: Path, text: str, *, replace: bool) -> None:
    """Write a card to a file.

    Raises ConfigError for one that somebody wrote or edited by hand, unless ``replace`` is True.
    """
    if path.is_file() and not replace:
        before = read_bytes(path, at_most=CARD_BYTES).decode("utf-8", "replace")
        if before.strip() and not is_generated(before):
            raise ConfigError(
                f"{path}: expected a card that offramp wrote, got one that was written or edited "
                "by hand; --replace-card replaces it"
            )
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def certified(certificate: str | Path | Certificate, opened: OpenedModel) -> Certificate:
    """Return a certificate of this model, which may be in a file. Raises CertificateError."""
    if not isinstance(certificate, Certificate):
        certificate = Certificate.load(Path(certificate))
    certificate.require_model(opened.sha256, weights=opened.weights)
    return certificate


def swept(sweep: str | Path | Mapping[str, Any], opened: OpenedModel) -> dict[str, Any]:
    """Return the result of a sweep of this model, without local names."""
    path = Path("sweep") if isinstance(sweep, Mapping) else Path(sweep)
    content = sweep if isinstance(sweep, Mapping) else read_json(path)
    found = value_of(_Swept, content, path, foreign=True)
    expected = tuple(opened.model.exit_layers)
    if (found.num_layers, found.exit_layers) != (opened.model.num_layers, expected):
        raise ConfigError(
            f"sweep: expected the figures of {opened.name}, with exits {_listed(expected)}, got "
            f"those of a model of {found.num_layers} layers with exits "
            f"{_listed(found.exit_layers)}"
        )
    known = without_places(dict(content))
    return {**known, "corpus": _corpus(found.corpus)}


def _corpus(corpus: Mapping[str, Any]) -> dict[str, Any]:
    name = corpus.get("name")
    return {**corpus, "name": corpus_name(name) if isinstance(name, str) else None}


def _listed(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers[:20]))


def _folder(opened: OpenedModel) -> str:
    own = opened.files.own if opened.files else None
    return "A language model with early exits" if own is None else own.resolve().name


def _backbone(opened: OpenedModel) -> Backbone | None:
    files = opened.files
    if files is None or files.kind == "native" or opened.weights:
        return None
    if files.adapted:
        base = files.about["base"]
        on_hub = published_base(base)
        return Backbone(
            name=base["id"] if on_hub else None,
            commit=base.get("revision") if on_hub else None,
            sha256=base["sha256"],
            packaged=base["id"] == DEMO,
            adapter=True,
        )
    if files.holds_backbone:
        return None
    source = files.backbone
    packaged = source.packaged is not None
    return Backbone(
        name=DEMO if packaged else source.id if source.revision is not None else None,
        commit=source.revision,
        sha256=source.sha256,
        packaged=packaged,
    )


def _datasets(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the datasets on the hub that the model or its exits were trained on."""
    parts = [about, about.get("trained"), about.get("specialised")]
    found = [
        dataset_of(part["corpus"]["name"])
        for part in parts
        if isinstance(part, Mapping)
        and isinstance(part.get("corpus"), Mapping)
        and isinstance(part["corpus"].get("name"), str)
    ]
    return tuple(dict.fromkeys(name for name in found if name))


def _versions(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions that wrote the model, if known, and those that wrote the card."""
    trained = about.get("trained")
    environment: Mapping[str, Any] = {}
    for part in (about, trained):
        found = part.get("environment") if isinstance(part, Mapping) else None
        environment = found if isinstance(found, Mapping) else environment
    made = {
        "offramp that wrote the model": about.get("offramp_version"),
        "PyTorch of the training": environment.get("torch"),
        "Python of the training": environment.get("python"),
    }
    known = {name: value for name, value in made.items() if isinstance(value, str)}
    return {
        **{name: value[:40] for name, value in known.items()},
        "offramp that wrote this card": __version__,
        "PyTorch of this card": torch.__version__,
        "Python of this card": platform.python_version(),
    }
