"""Find the files of a model, and read its config, tokenizer and training record."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from tokenizers import Tokenizer

from offramp.data.hub import one_line
from offramp.data.tokenizer import TOKENIZER_FILE, make_tokenizer
from offramp.data.tokenizer_errors import is_failure
from offramp.data.vocabulary import vocabulary_size
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.models.base import EarlyExitModel
from offramp.models.huggingface.exits_file import EXITS_JSON, read_exits
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.huggingface.places import base_of, refuse_local
from offramp.models.native.schemes import SCHEMES, Scheme
from offramp.models.sources import Source, find_checkpoint
from offramp.reading import read_json
from offramp.schema import shown

UNFINISHED = "unfinished.json"
"""The file that is in a run's folder until the run has ended."""
FINISHED = "run.json"
"""The name of this file after the run has ended; with it the run can be extended."""
_LONGEST = 1 << 31  # tokens
ModelKind = Literal["native", "exits", "checkpoint"]


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What a model and its exits were trained on, from the model's files."""

    corpora: frozenset[str] = frozenset()
    "SHA-256 of each corpus that the model or its exits were trained on."
    window: int | None = None
    "Number of tokens per training window; None if unknown."


UNKNOWN_TRAINING = TrainingRecord()


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of a model. ``find_model`` makes it; no weights are loaded yet."""

    name: str
    "The folder or name that the user gave."
    kind: ModelKind
    "A folder of offramp train, a folder with exits for a checkpoint, or a plain checkpoint."
    backbone: Source
    "The checkpoint with the weights."
    own: Path | None
    "The folder of ``name``, which may contain exits.safetensors; None for a plain one on the hub."
    cached: bool = False
    "Whether the files are in the hub's cache, where nothing is written."
    about: Mapping[str, Any]
    "Content of the file that describes the model: offramp.json if it has one, or config.json."

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of the backbone's ``config.json``."""
        stored = read_json(self.backbone.folder / "config.json")
        return stored if isinstance(stored, dict) else {}

    @property
    def unfinished(self) -> bool:
        """Whether a training run in this folder has not ended."""
        return self.own is not None and (self.own / UNFINISHED).exists()

    @property
    def adapted(self) -> bool:
        """Whether this is a folder of exits with an adapter of a backbone elsewhere."""
        return self.kind == "exits" and self.about["base"].get("adapter_sha256") is not None

    @property
    def holds_backbone(self) -> bool:
        """Whether this is a folder of exits that holds their backbone, or its adapter, too."""
        if self.kind != "exits" or self.own is None:
            return False
        same = self.own.resolve() == self.backbone.folder.resolve()
        return same or self.adapted

    @property
    def weight_format(self) -> Scheme | None:
        """The scheme of the stored weights, int8 or int4; None if they are numbers."""
        stored = self.about.get("model") if self.kind == "native" else None
        found = stored.get("weight_format") if isinstance(stored, dict) else None
        return next((scheme for scheme in SCHEMES if scheme == found), None)

    def require_numbers(self, why: str) -> None:
        """Raise a CheckpointError for quantised weights; ``why`` says what needs numbers."""
        refuse_quantised(self.name, self.weight_format, why)

    @property
    def exits_sha256(self) -> str:
        """Hash of the exits' file, or else of the weights, which hold the exits."""
        return str(self.about["exits_sha256"]) if self.kind == "exits" else self.backbone.sha256

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer: the model's own folder, or else the backbone's."""
        if self.own is not None and (self.own / TOKENIZER_FILE).is_file():
            return self.own
        return self.backbone.folder

    @property
    def speaks_chat(self) -> bool:
        """Whether ``transformers`` may find a chat template beside the weights."""
        named = (self.backbone.folder / "tokenizer_config.json").is_file()
        return self.kind != "native" or named

    @property
    def plain(self) -> bool:
        """Whether the model was trained by offramp train, on windows without first tokens."""
        return self.kind == "native" and self.about.get("pretrained") is not True

    @cached_property
    def record(self) -> TrainingRecord:
        """Return the training record. Raises CheckpointError if a hash or its window is invalid."""
        found: set[str] = set()
        tuned = self.about.get("trained")
        for stored, key in (
            (self.config, "corpus"),
            (self.config, "specialised"),
            (self.about, "trained"),
            (tuned if isinstance(tuned, dict) else {}, "specialised"),
        ):
            part = stored.get(key)
            if isinstance(part, dict):
                corpus = part if key == "corpus" else part.get("corpus")
                sha256 = corpus.get("sha256") if isinstance(corpus, dict) else None
                for value in (sha256, part.get("corpus_sha256")):
                    if not (value is None or isinstance(value, str)):
                        raise CheckpointError(
                            f"{self.name}: expected the SHA-256 of a corpus in {key}, got {value!r}"
                        )
                    found |= {value} if value else set()
        return TrainingRecord(corpora=frozenset(found), window=self._window())

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Return the end-of-text ids in ``generation_config.json``, or else in ``config.json``."""
        path = self.backbone.folder / "generation_config.json"
        for stored in (read_json(path) if path.is_file() else {}, self.config):
            end = stored.get("eos_token_id") if isinstance(stored, dict) else None
            if end is not None:
                return token_ids(end, self.backbone.id)
        return ()

    @property
    def draft_exit(self) -> int | None:
        """The exit that drafts by default: ``assistant_early_exit`` in ``generation_config.json``.

        ``transformers`` reads it, too. Raises CheckpointError if it is no layer.
        """
        path = self.backbone.folder / "generation_config.json"
        stored = read_json(path) if path.is_file() else None
        layer = stored.get("assistant_early_exit") if isinstance(stored, dict) else None
        if layer is not None and (type(layer) is not int or layer < 1):
            raise CheckpointError(
                f"{path}: assistant_early_exit: expected a layer, got {shown(layer)}"
            )
        return layer

    def _window(self) -> int | None:
        training = self.config.get("training") if self.kind == "native" else None
        if training is None:
            return None
        window = training.get("seq_len") if isinstance(training, dict) else None
        if type(window) is not int or not 1 <= window < _LONGEST:
            raise CheckpointError(
                f"{self.backbone.folder / 'config.json'}: expected training.seq_len of at least 1, "
                f"got {window!r}"
            )
        return window


def refuse_quantised(name: str, found: Scheme | None, why: str) -> None:
    """Raise a CheckpointError for quantised weights; ``why`` says what needs numbers."""
    if found is not None:
        raise CheckpointError(
            f"{name}: expected a model whose weights are not quantised, {why}, got {found} weights"
        )


def token_ids(end: Any, name: str) -> tuple[int, ...]:
    """Return an ``eos_token_id`` (an id or a list of ids) as a tuple. Raises CheckpointError."""
    ids = end if isinstance(end, list) else [end]
    if not all(type(number) is int for number in ids):  # True is no id
        raise CheckpointError(f"{name}: eos_token_id: expected token ids, got {end!r}")
    return tuple(ids)


def find_model(name: str | Path, *, base: str | Path | Source | None = None) -> ModelFiles:
    """Find a model's files by a folder, a name on the hub, or ``smollm2-135m``.

    A name on the hub may have a revision (a branch, a tag or a commit): NAME@REVISION.
    ``base`` is the place of the backbone of a folder of exits, if it was moved.

    Raises CheckpointError if there is no model, if its training run has not validated yet, or if
    the exits were trained on another backbone than the one that is found; ConfigError for a
    ``base`` of a model without a folder of exits.
    """
    folder = Path(name).expanduser()
    found = None if folder.is_dir() else find_checkpoint(name)
    cached = found is not None and found.revision is not None
    own = folder if found is None else found.folder if cached else None
    if own is not None and (own / EXITS_JSON).is_file():
        exits = read_exits(own)
        if cached and base is None:
            refuse_local(str(name), exits["base"])
        backbone = base_of(own, exits, base)
        return ModelFiles(
            name=str(name), kind="exits", backbone=backbone, own=own, cached=cached, about=exits
        )
    if base is not None:
        raise ConfigError(f"base: expected none without a folder of exits, got {base} for {name}")
    if own is not None and (own / UNFINISHED).exists() and not (own / "config.json").exists():
        raise CheckpointError(
            f"{name}: expected a model, but the training run there has not validated yet; "
            f"continue it with: offramp train --resume {quote(str(name))}"
        )
    backbone = found or find_checkpoint(name)
    if cached and not (backbone.folder / "config.json").is_file():
        raise CheckpointError(
            f"{name}: expected config.json or {EXITS_JSON} on the hub, found none"
        )
    about = read_json(backbone.folder / "config.json")
    native = own is not None and not (isinstance(about, dict) and "model_type" in about)
    return ModelFiles(
        name=str(name),
        kind="native" if native else "checkpoint",
        backbone=backbone,
        own=own if native or not cached else None,
        cached=cached,
        about=about if isinstance(about, dict) else {},
    )


def check_vocabulary(name: str, tokenizer: Tokenizer, model: EarlyExitModel) -> None:
    """Raise a CheckpointError for a tokenizer with an id that the model does not have."""
    needed = vocabulary_size(tokenizer)
    if needed > model.vocab_size:
        raise CheckpointError(
            f"{name}: expected a tokenizer of at most {model.vocab_size} tokens, the size of the "
            f"model's vocabulary, got ids up to {needed - 1}"
        )


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Read the tokenizer of a model's files."""
    path = files.tokenizer_folder / TOKENIZER_FILE
    try:
        if path.is_file():
            return make_tokenizer(str(path), "")
        if files.kind == "native":
            raise FileNotFoundError
        with quiet():  # an older form: vocab.json and merges.txt, or tokenizer.model
            found = transformers().AutoTokenizer.from_pretrained(
                files.tokenizer_folder, local_files_only=True, trust_remote_code=False
            )
        backend: Tokenizer = found.backend_tokenizer
    except CorpusError as error:
        raise CheckpointError(str(error)) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected the model's tokenizer, found none") from None
    except BaseException as error:  # transformers raises many kinds of errors
        if not is_failure(error):
            raise
        raise CheckpointError(
            f"{path}: expected the model's tokenizer, found none that can be read: "
            f"{one_line(error)}"
        ) from None
    return backend
