"""A pretrained model becomes one whose upper blocks share keys and values."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import offramp
from offramp.commands.text import read_text
from offramp.commands.tune import open_for_tuning, tune
from offramp.commands.tune_config import TuneConfig
from offramp.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    UnsupportedArchitectureError,
)
from offramp.models.base import whole_step
from offramp.models.native.decoder import Transformer
from offramp.models.open import open_model

QUICK = {"exit_layers": (1, 3), "seq_len": 32, "epochs": 1}


def tune_folder(model, text, out, **fields):
    config = TuneConfig(**{**QUICK, **fields})
    return tune(open_for_tuning(model, config), text, out, config)


@pytest.fixture
def text(checkpoint):
    return str(checkpoint / "text.txt")


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory):
    """A model that shares keys and values above layer 2, and the record of its training."""
    out = tmp_path_factory.mktemp("shared") / "model"
    return out, tune_folder(checkpoint, str(checkpoint / "text.txt"), out, kv_source=2)


@torch.no_grad()
def state(model, ids, layer):
    [(_, h)] = model.states_at(ids, [layer], step=whole_step(ids))
    return h


def test_the_folder_opens_as_any_native_model(checkpoint, shared, text):
    out, trained = shared
    opened = open_model(out)
    model = opened.model
    assert isinstance(model, Transformer)
    assert (model.config.kv_source_layer, model.complete_from) == (2, 2)
    assert model.exit_layers == (1, 3, 4)
    assert (opened.exits_trained, opened.files.kind) == (True, "native")
    assert read_text(opened, text).seen_in_training
    assert json.loads((out / "config.json").read_text())["trained"] == json.loads(
        json.dumps(trained)
    )
    lm = offramp.load(out)
    assert len(list(lm.generate("1 quick", threshold=0.5, max_new_tokens=8, stop_tokens=()))) == 8
    assert lm.sweep(text, [0.5]).rows
    plain = open_model(checkpoint, runner="native").model
    ids = torch.randint(plain.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(state(model, ids, 2), state(plain, ids, 2))  # the rest is frozen
    mlp = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[mlp], plain.state_dict()[mlp])


def test_the_record_says_what_it_cost(shared):
    _, trained = shared
    ppl = trained["shared_kv"]["ppl"]
    assert set(ppl) == {"model", "fitted", "distilled"}
    assert ppl["model"] == trained["before"][-1]["ppl"]
    assert ppl["distilled"] == trained["after"][-1]["ppl"]
    assert len(set(ppl.values())) == 3
    assert trained["objective"] == "distill"
    for before, after in zip(trained["before"][:-1], trained["after"][:-1], strict=True):
        assert after["agreement"] > before["agreement"]


@pytest.mark.parametrize("unfreeze", [False, True])
def test_the_fit_alone_or_everything(checkpoint, text, tmp_path, unfreeze):
    fields = {"distill_epochs": 1, "unfreeze": True} if unfreeze else {"distill_epochs": 0}
    trained = tune_folder(checkpoint, text, tmp_path / "out", kv_source=1, **fields)
    assert ("distilled" in trained["shared_kv"]["ppl"]) == unfreeze
    now = open_model(tmp_path / "out").model.state_dict()
    was = open_model(checkpoint, runner="native").model.state_dict()
    same = torch.equal(
        now["model.layers.0.mlp.up_proj.weight"], was["model.layers.0.mlp.up_proj.weight"]
    )
    assert same != unfreeze


def test_the_last_block_alone_has_nothing_to_learn(checkpoint, text, tmp_path):
    trained = tune_folder(checkpoint, text, tmp_path / "out", kv_source=3)
    ppl = trained["shared_kv"]["ppl"]
    assert set(ppl) == {"model", "fitted"}
    assert ppl["fitted"] == pytest.approx(ppl["model"], rel=1e-5)
    assert trained["after"][-1]["ppl"] == ppl["fitted"]


def test_a_model_of_offramp_train_begins_with_new_exits(text, tmp_path):
    lm = offramp.train(
        text,
        layers=4,
        dim=16,
        heads=2,
        exits=[2],
        exit_head="norm",
        steps=5,
        seq_len=32,
        batch_size=4,
        out=tmp_path / "model",
    )
    before = lm.model.exits.state_dict()
    own = tune_folder(tmp_path / "model", text, tmp_path / "own", kv_source=2, exit_layers=None)
    assert own["exit_layers"] == [2, 4]
    model = open_model(tmp_path / "own").model
    assert model.exit_head == "adapter"
    assert not torch.equal(before["2.norm.weight"], model.exits.state_dict()["2.norm.weight"])
    other = tune_folder(tmp_path / "model", text, tmp_path / "other", kv_source=2)
    assert other["exit_layers"] == [1, 3, 4]
    assert open_model(tmp_path / "other").window == 32
    with pytest.raises(ConfigError, match="that shares those after layer 2"):
        tune_folder(tmp_path / "own", text, tmp_path / "again", kv_source=1)
    assert not (tmp_path / "again").exists()


def test_the_tokens_that_begin_and_end_a_text_are_kept(checkpoint, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = tokenizer.id_to_token(3)
    tokenizer.post_processor = TemplateProcessing(single=[begin, "$A"], special_tokens=[(begin, 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    for bos, first in (("auto", (3,)), ("no", ())):
        config = TuneConfig(**QUICK, kv_source=2, distill_epochs=0)
        out = tmp_path / bos
        tune(open_for_tuning(folder, config).with_bos(bos), text, out, config)
        opened = open_model(out)
        assert opened.first_tokens == first
        assert opened.end_tokens == (5, 6)


def test_from_python(checkpoint, text):
    lm = offramp.tune(checkpoint, text, exits=[1], kv_source=3, seq_len=32, epochs=1)
    assert lm.model.complete_from == 3


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kv_source": 0}, "kv_source: expected at least 1, got 0"),
        ({"kv_source": 2, "loss_weights": "1=1"}, "loss_weights: expected none with --kv-source"),
        ({"kv_source": 2, "tokens": 1}, "tokens: expected at least 2, got 1"),
        ({"kv_source": 2, "distill_epochs": -1}, "distill_epochs: expected at least 0, got -1"),
        ({"kv_source": 2, "distill_lr": 0.0}, "distill_lr: expected a number above 0, got 0.0"),
        ({"kv_source": 2, "distill_lr": float("nan")}, "distill_lr: .* got nan"),
        ({"kv_source": 2, "seq_len": 0}, "seq_len: expected at least 1, got 0"),
        ({"kv_source": 2, "epochs": 0}, "epochs: expected at least 1, got 0"),
        (
            {"kv_source": 2, "distill_epochs": 0, "unfreeze": True},
            "distill_epochs: expected at least 1 with --unfreeze, .* got 0",
        ),
        (
            {"kv_source": 2, "distill_epochs": 0, "distill_lr": 0.1},
            "distill_epochs: expected at least 1 with --distill-lr, .* got 0",
        ),
        ({"distill_epochs": 1}, "distill_epochs: expected --kv-source with it, got 1 alone"),
        ({"distill_lr": 0.1}, "distill_lr: expected --kv-source with it, got 0.1 alone"),
    ],
)
def test_a_config_out_of_range_is_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TuneConfig(**fields)


def test_what_cannot_share_is_refused_and_nothing_written(checkpoint, text, shared, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    gpt = tmp_path / "gpt"
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(gpt)
    shutil.copy(checkpoint / "tokenizer.json", gpt)
    short = tmp_path / "short.txt"
    short.write_text("1 quick brown fox")
    for model, corpus, fields, error, sentence in (
        (checkpoint, text, {"kv_source": 4}, ConfigError, "kv_source: expected from 1 to 3"),
        (shared[0], text, {"kv_source": 1}, ConfigError, "shares those after layer 2"),
        (checkpoint, text, {"exit_head": "shared"}, ConfigError, "exit_head: expected norm"),
        (checkpoint, text, {"exit_layers": (9,)}, ConfigError, "layers from 1 to 4, got 9"),
        (checkpoint, text, {"exit_layers": (4,)}, ConfigError, "at least one below the last"),
        (checkpoint, short, {}, CorpusError, "at least 65 tokens to distil"),
        (gpt, text, {"exit_layers": (1,)}, UnsupportedArchitectureError, "kv_source: model_type: "),
    ):
        with pytest.raises(error, match=sentence):
            tune_folder(model, str(corpus), out, **{"kv_source": 2, **fields})
        assert not out.exists()
    exits = tmp_path / "exits"
    tune_folder(checkpoint, text, exits)
    with pytest.raises(CheckpointError, match="expected a model without exits"):
        tune_folder(exits, text, out, kv_source=2)
    with pytest.raises(ConfigError, match="expected weights in float32"):
        offramp.tune(checkpoint, text, kv_source=2, dtype=torch.bfloat16, out=out)
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    with pytest.raises(ConfigError, match="native decoder runs, got one of transformers"):
        offramp.tune(plain, text, tokenizer=tokenizer, kv_source=2, out=out)
    assert not out.exists()
