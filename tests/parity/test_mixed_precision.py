"""A bfloat16 file with some float32 tensors decodes as a model of one precision, however called."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate, generate_batch
from offramp.models.loading import load_weights
from offramp.models.model_files import find_model

PROMPTS = [[number * 7 % 30 for number in range(length)] for length in (8, 40)]
OPTIONS = [
    {},
    {"speculative": True},
    {"threshold": 0.05},
    {"threshold": 0.05, "missing_kv": "recompute"},
]


@pytest.mark.parametrize("runner", ["native", "transformers"])
@pytest.mark.parametrize("part", ["norm", "lm_head", "embed_tokens", "down_proj"])
def test_mixed_files_decode_as_files_of_one_precision(checkpoint, tmp_path, runner, part):
    state = load_file(checkpoint / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    models = []
    for kind in ("even", "mixed"):
        folder = shutil.copytree(checkpoint, tmp_path / kind)
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))
        widened = {
            name: tensor.float() if kind == "mixed" and part in name else tensor
            for name, tensor in state.items()
        }
        save_file(widened, folder / "model.safetensors", {"format": "pt"})
        model = load_weights(find_model(folder), runner=runner)
        model.silence_untrained()
        assert model.dtype == torch.bfloat16
        models.append(model)
    even, mixed = models
    for options in OPTIONS:
        config = GenerateConfig(max_new_tokens=6, **options)
        for prompt in PROMPTS:
            expected = [token.id for token in generate(even, prompt, config)]
            assert [token.id for token in generate(mixed, prompt, config)] == expected
    texts = [
        generate_batch(model, PROMPTS, GenerateConfig(max_new_tokens=4))[0] for model in models
    ]
    assert texts[0] == texts[1]
