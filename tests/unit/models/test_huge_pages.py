"""Weights in huge pages of memory: the numbers stay, and none is mapped to a file."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.models import huge_pages
from offramp.models.huge_pages import HUGE_PAGE, use_huge_pages
from offramp.models.open import open_model

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def allowed() -> bool:
    """Return whether this system moves memory to huge pages when it is asked."""
    if not sys.platform.startswith("linux") or not SETTING.exists():
        return False
    major, minor = Path("/proc/sys/kernel/osrelease").read_text().split(".")[:2]
    return "[never]" not in SETTING.read_text() and (int(major), int(minor)) >= (6, 1)


@pytest.mark.skipif(not allowed(), reason="this system has no huge pages on request")
def test_large_tensors_move_to_huge_pages_and_keep_their_numbers() -> None:
    tensors = [torch.randn(1 << 20) for _ in range(4)]
    before, places = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    assert use_huge_pages(tensors) >= 4  # 16 MB; the pages at the ends may be shared
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert [t.data_ptr() for t in tensors] == places


def test_it_stops_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slow(address: object, size: int, advice: int) -> int:
        asked.append(advice)
        return 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: slow)
    monkeypatch.setattr(huge_pages, "SECONDS", -1.0)
    assert use_huge_pages([torch.ones(1 << 22)]) == 1
    assert asked.count(25) == 1  # MADV_COLLAPSE
    assert asked.count(14) >= 8  # MADV_HUGEPAGE: the system goes on in the background


def test_what_cannot_be_moved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_huge_pages([]) == 0
    assert use_huge_pages([torch.ones(8), torch.empty(1 << 22, device="meta")]) == 0
    save_file({"weight": torch.arange(HUGE_PAGE, dtype=torch.float32)}, tmp_path / "x.safetensors")
    mapped = load_file(tmp_path / "x.safetensors")["weight"]
    use_huge_pages([mapped])
    assert torch.equal(mapped, torch.arange(HUGE_PAGE, dtype=torch.float32))
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert use_huge_pages([torch.ones(1 << 22)]) == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_no_weight_is_mapped_to_its_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    opened = open_model(str(tmp_path))
    assert type(opened.model).__name__ == "Transformer"
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    expected = load_file(tmp_path / "model.safetensors")
    weight = opened.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(weight, expected["model.layers.1.mlp.down_proj.weight"])


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
