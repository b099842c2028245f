"""Shared fixtures. The shapes and types in the annotations of whatever handles tensors are
checked in every test. (Not in report/: beartype takes no int for a float, and altair's own
annotations do not hold at run time.)
"""

# ruff: noqa: E402

from jaxtyping import install_import_hook

CHECKED = ("models", "exits", "evaluation", "data", "training")
install_import_hook(  # before the first import of offramp
    [f"offramp.{name}" for name in CHECKED], "beartype.beartype"
)

import contextlib
import io
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from offramp import cli
from offramp.data import make_tokenizer
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.training.loop import new_model

torch.set_num_threads(1)
hypothesis.settings.register_profile("offramp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("offramp")

VOCABULARY = 13

MakeModel = Callable[..., Transformer]
MakeIds = Callable[..., Tensor]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What offramp keeps between runs is kept in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make_model() -> MakeModel:
    """Make a tiny random decoder, float64 so that parity is exact to rounding.

    Norm weights are random too: with ones, a wrong norm would go unnoticed.
    """

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> Transformer:
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 24,
        }
        model = new_model(DecoderConfig(**{**shape, **fields}), seed=seed)
        random = torch.Generator().manual_seed(seed + 1)
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=random)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def make_ids() -> MakeIds:
    """Make random token ids, (batch, length)."""

    def make(batch: int, length: int, *, seed: int = 0) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randint(VOCABULARY, (batch, length), generator=random)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB in memory, which only root can mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


TEXT = "".join(
    f"{number} quick brown foxes jump over {number * 7 % 31} lazy dogs. " for number in range(120)
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random parameters as ``save_pretrained`` leaves it, with a tokenizer of
    ``TEXT``'s characters, and that text in text.txt.
    """
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = make_tokenizer("characters", [TEXT])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def offramp(cache: None) -> Command:
    """Run the command line as a user does (in this process, to spare the start of torch)."""

    def run(*arguments: object) -> Outcome:
        stdout, stderr = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Outcome(code, stdout.getvalue(), stderr.getvalue())

    return run
