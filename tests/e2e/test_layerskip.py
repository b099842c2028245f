"""LayerSkip checkpoints are plain Llama models whose exits share the final norm and LM head.

They need no tuning. The models here are random twins: the configs are those of the models that
LayerSkip continues to train (Llama 2 7B, Llama 3.2 1B), with smaller widths and vocabularies.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import offramp as offramp_library
from offramp.data import make_tokenizer
from offramp.errors import ConfigError
from offramp.models.base import whole_step

TEXT = "".join(
    f"{number} quick brown foxes jump over {number % 7} lazy dogs. " for number in range(60)
)
PROMPT = "7 quick brown"
NEW = 24
LLAMA2_7B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA32_1B = {
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
}
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@dataclass(frozen=True)
class Twin:
    folder: Path
    model: Any
    "The model of transformers."
    ids: torch.Tensor
    greedy: list[int]
    "What transformers generates greedily, without end tokens."


@pytest.fixture(scope="module", params=[LLAMA2_7B, LLAMA32_1B], ids=["llama2-7B", "llama3.2-1B"])
def twin(request, tmp_path_factory) -> Twin:
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer("characters", [TEXT])
    config = transformers.LlamaConfig(
        **request.param,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("layerskip")
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    new = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    return Twin(folder, model, ids, new)


def generated(offramp, twin, *arguments) -> list[int]:
    result = offramp(
        *("generate", twin.folder, PROMPT, "--max-new-tokens", NEW, "--json", *arguments)
    )
    assert result.returncode == 0, result.stderr
    return [token["id"] for token in json.loads(result.stdout)["tokens"]]


def test_any_layer_is_an_exit_by_the_shared_norm_and_head(twin):
    last = twin.model.config.num_hidden_layers
    lm = offramp_library.load(twin.folder, exits=[1, 3, last - 1], dtype=torch.float32)
    assert lm.exit_layers == (1, 3, last - 1, last)
    assert type(lm.model).__name__ == "Transformer"  # the fast decoder
    lm.model.silence_untrained()
    states = twin.model(twin.ids, output_hidden_states=True).hidden_states
    with torch.no_grad():
        for layer in (1, 3, last - 1):
            head = twin.model.lm_head(twin.model.model.norm(states[layer]))
            [(_, h)] = lm.model.states_at(twin.ids, [layer], step=whole_step(twin.ids))
            mine = lm.model.unembed(h, layer)
            torch.testing.assert_close(mine, head, rtol=1e-4, atol=1e-4)


def test_sweep_takes_its_exits_from_a_flag_and_needs_no_tuning(offramp, twin, tmp_path):
    out = tmp_path / "sweep.json"
    result = offramp(
        *("sweep", twin.folder, "--corpus", twin.folder / "text.txt", "--exits", "4,8"),
        *("--thresholds", "0.1,1.1", "--out", out),
    )
    assert result.returncode == 0, result.stderr
    assert (
        "unless the checkpoint itself was trained with exits, as LayerSkip's are" in result.stderr
    )
    content = json.loads(out.read_text())
    last = twin.model.config.num_hidden_layers
    assert content["exit_layers"] == [4, 8, last]
    assert set(content["exit_ppl"]) == {"4", "8", str(last)}
    assert content["rows"][0]["compute_pct"] < content["rows"][1]["compute_pct"] == 100


def test_any_layer_drafts_and_the_text_is_greedy_whatever_the_config_samples(offramp, twin):
    assert generated(offramp, twin, "--speculative", "--draft-exit", 5) == twin.greedy
    lm = offramp_library.load(twin.folder, exits=[1, 2, 15])
    lm.model.silence_untrained()
    for layer in (None, 1, 2, 15):
        options = {} if layer is None else {"speculative": True, "draft_exit": layer, "lookup": 0}
        found = lm.generate(PROMPT, max_new_tokens=NEW, **options)
        assert [token.id for token in found] == twin.greedy


def test_the_end_tokens_and_the_draft_exit_of_its_generation_config_are_used(offramp, twin):
    unused = next(i for i in range(twin.model.config.vocab_size) if i not in twin.greedy)
    end = twin.greedy[NEW // 2]
    path = twin.folder / "generation_config.json"
    before = path.read_text()
    config = {**GENERATION, "eos_token_id": [unused, end], "assistant_early_exit": 6}
    path.write_text(json.dumps({**config, "num_assistant_tokens": 3}))
    try:
        expected = twin.greedy[: twin.greedy.index(end) + 1]
        assert generated(offramp, twin, "--speculative") == expected
        path.write_text(json.dumps({**config, "assistant_early_exit": 99}))
        wrong = offramp("generate", twin.folder, PROMPT, "--speculative")
        assert wrong.returncode == 2
        assert "expected layers from 1 to" in wrong.stderr
        path.write_text(json.dumps({**config, "assistant_early_exit": "six"}))
        wrong = offramp("generate", twin.folder, PROMPT, "--speculative")
        assert wrong.returncode == 2
        assert "assistant_early_exit: expected a layer, got 'six'" in wrong.stderr
    finally:
        path.write_text(before)


@pytest.mark.parametrize("exits", ["0", "99", "x", ""])
def test_exits_that_are_none_are_a_sentence(offramp, twin, exits):
    result = offramp("sweep", twin.folder, "--corpus", twin.folder / "text.txt", "--exits", exits)
    assert result.returncode == 2
    assert result.stderr.startswith("offramp: ")
    assert "Traceback" not in result.stderr


def test_a_folder_with_exits_keeps_its_own(offramp, trained):
    result = offramp("generate", trained, "The", "--exits", "1,3")
    assert result.returncode == 2
    assert result.stderr == f"offramp: exits: expected none, since {trained} has its own, got 1,3\n"


def test_python_refuses_a_draft_exit_that_was_not_opened(twin):
    lm = offramp_library.load(twin.folder, exits=4)
    with pytest.raises(ConfigError, match="draft_exit: expected one of the exits 4, got 8"):
        lm.generate(PROMPT, speculative=True, draft_exit=8).text  # noqa: B018
