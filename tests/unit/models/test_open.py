"""One value for an opened model, whatever it was opened from."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from offramp import from_pretrained, save_exits
from offramp.commands.generate import generate
from offramp.errors import CheckpointError, ConfigError
from offramp.generation.config import GenerateConfig
from offramp.models.base import whole_step
from offramp.models.native.checkpoint import save_checkpoint
from offramp.models.open import open_in_memory, open_model
from offramp.models.save import save_model


@pytest.fixture
def tuned(checkpoint, tmp_path):
    model = from_pretrained(checkpoint, exit_layers=(1, 2), exit_head="adapter")
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.freeze_backbone()
    save_exits(model, tmp_path / "tuned", trained={"corpus": {"sha256": "a text"}})
    return tmp_path / "tuned"


def logits(model, ids):
    states = dict(model.states_at(ids, model.exit_layers, step=whole_step(ids)))
    return {layer: model.unembed(h, layer) for layer, h in states.items()}


@pytest.mark.parametrize("which", ["plain", "tuned"])
def test_both_runners_give_the_same_logits_at_every_exit(checkpoint, tuned, which, request):
    folder = checkpoint if which == "plain" else tuned
    ids = torch.arange(40)[None] % 30
    native, library = (open_model(folder, runner=kind) for kind in ("native", "transformers"))
    assert (native.runner, library.runner) == ("native", "transformers")
    assert native.sha256 == library.sha256
    for opened in (native, library):
        opened.model.silence_untrained()
    found = logits(native.model, ids)
    for layer, expected in logits(library.model, ids).items():
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-5)


def test_by_default_the_llama_family_runs_in_the_native_decoder(checkpoint, tuned):
    assert open_model(checkpoint).runner == "native"
    opened = open_model(tuned)
    assert opened.runner == "native"
    assert opened.exits_trained
    assert opened.record.corpora == {"a text"}
    assert opened.window == 64  # the model's longest sequence is below 256


def test_exits_are_opened_in_the_precision_in_which_they_were_trained(checkpoint, tmp_path):
    folder = tmp_path / "half"
    half = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    model = from_pretrained(folder, exit_layers=(2,), exit_head="norm", dtype=torch.float32)
    model.freeze_backbone()
    save_exits(model, tmp_path / "exits", trained={})
    for runner in ("native", "transformers"):
        assert open_model(tmp_path / "exits", runner=runner).dtype == torch.float32
        assert open_model(folder, runner=runner).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["checkpoint", "tuned", "native"])
def test_a_saved_model_opens_as_what_it_was(checkpoint, tuned, make_model, tmp_path, kind):
    if kind == "native":
        folder = tmp_path / "native"
        folder.mkdir()
        vocabulary = open_model(checkpoint).model.vocab_size
        model = make_model(vocab_size=vocabulary, exit_layers=(1,), exit_head="norm")
        save_checkpoint(model.float(), folder, about={"training": {"seq_len": 9}}, weights_about={})
        (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    else:
        folder = checkpoint if kind == "checkpoint" else tuned
    opened = open_model(folder)
    opened.model.silence_untrained()
    save_model(opened, tmp_path / "saved")
    again = open_model(tmp_path / "saved")
    again.model.silence_untrained()
    assert again.window == opened.window
    assert again.exits_trained == opened.exits_trained
    assert again.record == opened.record
    assert again.tokenizer.to_str() == opened.tokenizer.to_str()
    ids = torch.arange(20)[None] % 13
    expected = logits(opened.model, ids)
    for layer, found in logits(again.model, ids).items():
        assert torch.equal(found, expected[layer])
    with pytest.raises(CheckpointError, match="new or empty folder"):
        save_model(opened, tmp_path / "saved")


def test_a_model_of_transformers_in_memory_is_shared_not_copied(checkpoint):
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = open_model(checkpoint).tokenizer
    opened = open_in_memory(lm, tokenizer, exit_layers=(1, 3))
    assert opened.model.exit_layers == (1, 3, 4)
    assert next(opened.model.backbone.parameters()) is next(lm.parameters())
    before = opened.sha256
    assert len(before) == 64
    assert len(repr(opened)) < 200


@pytest.mark.parametrize(
    ("model", "tokenizer", "sentence"),
    [
        ("lm", None, "tokenizer: expected a fast tokenizer .* got NoneType"),
        (7, "tokenizer", "model: expected a name, a folder or a language model, got int"),
    ],
)
def test_what_is_no_model_in_memory_is_refused(checkpoint, model, tokenizer, sentence):
    opened = open_model(checkpoint)
    with pytest.raises(ConfigError, match=sentence):
        open_in_memory(
            opened.model if model == "lm" else model, opened.tokenizer if tokenizer else None
        )


def test_the_end_tokens_of_a_model_in_memory_are_checked(checkpoint):
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = open_model(checkpoint).tokenizer
    for end, ids in ((None, ()), (3, (3,)), ([3, 4], (3, 4))):
        lm.generation_config.eos_token_id = end
        assert open_in_memory(lm, tokenizer).end_tokens == ids
    for end in ("abc", [[1]], True):
        lm.generation_config.eos_token_id = end
        with pytest.raises(CheckpointError, match="eos_token_id: expected token ids"):
            open_in_memory(lm, tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = open_model(checkpoint).tokenizer
    tokenizer.add_tokens([f"<{number}>" for number in range(500)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="expected a tokenizer of at most"):
        open_model(folder)


def test_the_value_is_frozen(checkpoint):
    with pytest.raises(dataclasses.FrozenInstanceError):
        open_model(checkpoint).name = "other"


@pytest.mark.parametrize("end", [50256, [3, 50256], -1])
def test_an_end_of_text_id_outside_the_vocabulary_does_not_stop_generation(
    checkpoint, tmp_path, end
):
    """The default configs of GPT-2 and Starcoder2 name one: nobody gave a flag."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**stored, "eos_token_id": end}))
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for opened in (open_model(folder), open_in_memory(lm, tokenizer)):
        assert opened.end_tokens == ((3,) if isinstance(end, list) else ())
        opened.model.silence_untrained()
        assert generate(opened, "7 quick", GenerateConfig(max_new_tokens=2)).completion is not None
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=tokenizer.get_vocab_size(), n_embd=16, n_layer=2, n_head=2, n_positions=64
        )
    )
    assert gpt2.generation_config.eos_token_id == 50256
    assert generate(open_in_memory(gpt2, tokenizer), "7", GenerateConfig(max_new_tokens=2)).text
