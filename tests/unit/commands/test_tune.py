"""Exits learn on a frozen backbone, which stays what it was; or everything learns."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from offramp import from_pretrained
from offramp.commands.text import read_text
from offramp.commands.tune import frequent_tokens, measure, open_for_tuning, tune
from offramp.commands.tune_config import TuneConfig
from offramp.data import encode, load_corpus
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.models.base import whole_step
from offramp.models.fitted import load_fitted
from offramp.models.open import open_model
from offramp.training import frozen, kept_states
from offramp.training.frozen import Compared, least_squares, tune_exits
from offramp.training.frozen_config import FrozenConfig
from offramp.training.kept_states import KeptStates, keep_states

QUICK = {"exit_layers": (1, 2), "epochs": 3, "seq_len": 32, "lr": 3e-3}


def tune_folder(model, text, out, config, **told):
    return tune(open_for_tuning(model, config), text, out, config, **told)


@pytest.fixture
def text(checkpoint):
    return str(checkpoint / "text.txt")


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """A folder of exits, what they were trained on, and what was told meanwhile."""
    out = tmp_path_factory.mktemp("tuned") / "exits"
    told = []
    config = TuneConfig(**QUICK)
    text = str(checkpoint / "text.txt")
    trained = tune_folder(checkpoint, text, out, config, on_progress=told.append)
    return out, trained, told


@pytest.fixture
def fresh(checkpoint):
    def make(exit_head="adapter"):
        model = from_pretrained(checkpoint, exit_layers=(1, 2), exit_head=exit_head)
        model.silence_untrained()
        return model

    return make


@pytest.fixture
def ids(checkpoint, text):
    return encode(open_model(checkpoint).tokenizer, load_corpus(text).whole)[:1200]


@torch.no_grad()
def logits(model, ids, layer):
    [(_, h)] = model.states_at(ids, [layer], step=whole_step(ids))
    return model.unembed(h, layer)


def test_exits_agree_more_with_the_final_layer_afterwards(tuned):
    _, trained, _ = tuned
    for before, after in list(zip(trained["before"], trained["after"], strict=True))[:-1]:
        assert after["agreement"] > before["agreement"] + 0.1
    assert trained["before"][-1] == trained["after"][-1]
    assert trained["after"][-1]["agreement"] == 1


def test_gates_are_fitted_to_the_tuned_exits(tuned, text):
    out, trained, told = tuned
    assert trained["fitted_gates"]["kinds"] == ["gate", "gain"]
    assert (
        trained["fitted_gates"]
        == json.loads((out / "offramp.json").read_text())["trained"]["fitted_gates"]
    )
    opened = open_model(out)
    gates = opened.fitted.gates
    assert sorted(gates["gain"]) == sorted(gates["gate"]) == [1, 2]
    doing = [progress.doing for progress in told]
    assert doing.index("sample") < doing.index("gates") == len(doing) - doing.count("gates")
    trace = read_text(opened, text).first(1000).trace(("gain",), kl=True)
    for row in (0, 1):  # a gate that was not fitted predicts 0.7 nats
        assert -trace.scores("gain")[row].mean() == pytest.approx(trace.kl[row].mean(), rel=0.3)


def test_gates_can_be_left_out(checkpoint, text, tmp_path):
    config = TuneConfig(**{**QUICK, "epochs": 1}, gates=False)
    trained = tune_folder(checkpoint, text, tmp_path / "exits", config)
    assert trained["fitted_gates"] is None
    assert not load_fitted(tmp_path / "exits").gates


def test_the_backbones_logits_are_bitwise_what_they_were(checkpoint, tuned, ids):
    out, _, _ = tuned
    plain, back = from_pretrained(checkpoint), from_pretrained(out)
    assert torch.equal(logits(back, ids[None, :32], 4), logits(plain, ids[None, :32], 4))
    for name, value in plain.backbone.state_dict().items():
        assert torch.equal(back.backbone.state_dict()[name], value)


@pytest.mark.parametrize("exit_head", ["norm", "adapter", "full"])
@pytest.mark.parametrize("objective", ["distill", "text", "both"])
def test_every_objective_trains_every_head_and_nothing_else(fresh, ids, exit_head, objective):
    model = fresh(exit_head)
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    heads = {name: value.clone() for name, value in model.exits.state_dict().items()}
    tune_exits(model, ids, FrozenConfig(objective=objective, epochs=1, seq_len=32, lr=1e-2))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, backbone[name])
    for name, value in model.exits.state_dict().items():
        assert not torch.equal(value, heads[name]), name
    assert model.exits.trained
    assert not model.training


@pytest.mark.parametrize("objective", ["text", "both"])
def test_learning_the_text_lowers_the_ppl_of_the_exits(fresh, ids, objective):
    model = fresh("full")
    before = measure(model, ids, 32)
    tune_exits(model, ids, FrozenConfig(objective=objective, seq_len=32, lr=1e-2, batch_size=64))
    for was, row in list(zip(before, measure(model, ids, 32), strict=True))[:-1]:
        assert row["ppl"] < 0.7 * was["ppl"]


def test_the_same_seed_gives_the_same_exits(fresh, ids):
    found = []
    for seed in (0, 0, 1):
        model = fresh()
        torch.manual_seed(len(found))  # nothing outside matters
        tune_exits(model, ids, FrozenConfig(epochs=1, seq_len=32, seed=seed))
        found.append(model.exits.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_the_backbone_reads_the_text_once(fresh, ids):
    model = fresh()
    read = []
    model.backbone.model.layers[0].register_forward_hook(
        lambda module, args, out: read.append((args[0].shape[0] * args[0].shape[1], out))
    )
    tune_exits(model, ids, FrozenConfig(epochs=3, seq_len=32))
    assert sum(tokens for tokens, _ in read) == len(ids) - 1
    assert not any(out.requires_grad for _, out in read)


def test_states_that_do_not_fit_the_memory_come_in_portions(fresh, ids, monkeypatch):
    monkeypatch.setattr(kept_states, "KEPT_BYTES", 4 * 32 * 3 * 200)
    told = []
    tune_exits(fresh(), ids, FrozenConfig(epochs=2, seq_len=32), on_progress=told.append)
    states = [progress.done for progress in told if progress.doing == "states"]
    assert states == sorted(states)
    assert states[-1] == len(ids) - 1
    steps = [progress for progress in told if progress.doing == "tune"]
    assert steps[-1].done == steps[-1].total == 2 * 7  # portions of 192 tokens


def test_kept_states_are_those_of_the_model(fresh, ids):
    model = fresh()
    span = range(32, 32 * 11 + 5)
    *_, (done, kept) = keep_states(model, ids, span, 32)
    assert done == len(span)
    assert torch.equal(kept.targets, ids[33 : 32 * 11 + 6])
    for first, length in ((32, 32), (320, 32), (352, 5)):
        window = ids[None, first : first + length]
        for layer, h in model.states_at(window, (1, 4), step=whole_step(window)):
            at = slice(first - 32, first - 32 + length)
            torch.testing.assert_close(kept.states[layer][at], h[0], rtol=0, atol=1e-5)


def test_least_squares_finds_a_linear_map():
    random = torch.Generator().manual_seed(0)
    x, a = (torch.randn(n, 8, generator=random) for n in (100_000, 8))
    torch.testing.assert_close(least_squares(x, x @ a), a, rtol=0, atol=0.01)


def test_imitation_of_a_sample_is_on_average_that_of_the_whole(fresh, ids, monkeypatch):
    model = fresh()
    *_, (_, kept) = keep_states(model, ids, range(96), 32)
    few = KeptStates(states=kept.states, targets=kept.targets)
    generator = torch.Generator().manual_seed(0)

    def loss(compared):
        with torch.no_grad():
            return frozen.imitation_loss(model, few, compared, distill_temperature=0.7)

    exact = loss(Compared(model, few, generator))
    last = F.log_softmax(model.unembed(few.states[4][None], 4)[0] / 0.7, dim=-1)
    by_hand = sum(
        F.kl_div(
            F.log_softmax(model.unembed(few.states[layer][None], layer)[0] / 0.7, dim=-1),
            last,
            reduction="batchmean",
            log_target=True,
        )
        for layer in (1, 2)
    )
    torch.testing.assert_close(exact, by_hand)
    monkeypatch.setattr(frozen, "FREQUENT", 10)
    monkeypatch.setattr(frozen, "SAMPLED", 6)
    compared = Compared(model, few, generator)
    sampled = torch.stack([loss(compared) for _ in range(100)])
    assert sampled.std() > 0
    assert abs(sampled.mean() - exact) < 0.15 * exact


def test_everything_may_learn_jointly(checkpoint, text, tmp_path):
    out = tmp_path / "joint"
    quick = {**QUICK, "exit_head": "norm", "epochs": 1, "tokens": 3000}
    config = TuneConfig(**quick, unfreeze=True, loss_weights="1=0.5,4=1")
    trained = tune_folder(checkpoint, text, out, config)
    assert trained["objective"] == "text"
    for before, after in zip(trained["before"], trained["after"], strict=True):
        assert after["ppl"] < before["ppl"]
    model = open_model(out).model
    stored = load_file(checkpoint / "model.safetensors")
    now = load_file(out / "model.safetensors")
    assert set(now) == set(stored)
    assert all(not torch.equal(now[name], value) for name, value in stored.items())
    assert json.loads((out / "offramp.json").read_text())["base"]["id"] == "."
    assert model.exits.trained


def test_models_of_unknown_blocks_are_tuned_and_trained(tmp_path, checkpoint, text):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = from_pretrained(checkpoint).vocab_size
    config = transformers.BloomConfig(
        vocab_size=vocabulary, hidden_size=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path / "bloom"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(checkpoint / "tokenizer.json", folder)
    for unfreeze in (False, True):
        out = tmp_path / f"out{unfreeze}"
        quick = TuneConfig(**{**QUICK, "epochs": 1}, unfreeze=unfreeze, tokens=2000)
        trained = tune_folder(folder, text, out, quick)
        assert trained["after"][0]["ppl"] < 1.2 * trained["before"][0]["ppl"]
        assert read_text(open_model(out), text).cost() is None


def test_the_file_says_what_was_trained_on_what(checkpoint, text, tuned):
    out, trained, told = tuned
    names = ["exits.safetensors", "fitted.safetensors", "offramp.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    content = json.loads((out / "offramp.json").read_text())
    assert content["trained"] == json.loads(json.dumps(trained))
    assert content["exit_layers"] == [1, 2, 4]
    assert content["exit_head"] == "adapter"
    assert trained["objective"] == "distill"
    assert trained["held_out_tokens"] == trained["tokens"] // 20
    assert read_text(open_model(out), text).seen_in_training
    assert open_model(out).exits_trained
    assert {progress.doing for progress in told} == {"states", "tune", "sample", "gates"}
    assert told[-1].done == told[-1].total


def test_only_so_many_tokens_are_read(checkpoint, text, tmp_path):
    config = TuneConfig(**{**QUICK, "epochs": 1}, tokens=300)
    assert tune_folder(checkpoint, text, tmp_path / "out", config)["tokens"] == 300


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tokens": 1}, "tokens: expected at least 2, got 1"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"lr": float("nan")}, "lr: expected a finite number of at least 0, got nan"),
        ({"unfreeze": True, "objective": "distill"}, "objective: expected text or both with"),
        ({"loss_weights": "1=1"}, "loss_weights: expected --unfreeze with it"),
        ({"seq_len": 0}, "seq_len: expected at least 1, got 0"),
        ({"unfreeze": True, "epochs": 0}, "epochs: expected at least 1, got 0"),
    ],
)
def test_a_config_out_of_range_is_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TuneConfig(**fields)


def test_a_distillation_temperature_of_zero_is_refused():
    with pytest.raises(ConfigError, match="distill_temperature: expected a positive number"):
        FrozenConfig(distill_temperature=0.0)


def test_what_cannot_be_tuned_is_refused_and_nothing_written(checkpoint, text, tuned, tmp_path):
    out = tmp_path / "out"
    for model, fields, sentence in (
        (
            checkpoint,
            {"exit_head": "shared"},
            "exit_head: expected norm, adapter, full or specialist",
        ),
        (checkpoint, {"exit_layers": (1, 5)}, "exit_layers: expected layers from 1 to 4, got 5"),
        (checkpoint, {"exit_layers": (4,)}, "exit_layers: expected at least one below"),
        (tuned[0], {}, "expected a model without exits"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=sentence):
            tune_folder(model, text, out, TuneConfig(**fields))
        assert not out.exists()
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(CorpusError, match="at least 2"):
        tune_folder(checkpoint, str(short), out, TuneConfig())
    assert not out.exists()


def test_the_draft_vocabulary_is_what_stands_most_often(monkeypatch):
    ids = torch.tensor([5, 5, 5, 9, 9, 2, 2, 7])
    assert frequent_tokens(ids).tolist() == [5, 2, 9, 7]
    monkeypatch.setattr("offramp.commands.tune.DRAFT_VOCAB", 2)
    assert frequent_tokens(ids).tolist() == [5, 2]


def test_a_large_vocabulary_gets_a_draft_vocabulary(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.commands.tune.DRAFT_VOCAB", 8)
    tune_folder(checkpoint, text, tmp_path / "out", TuneConfig(exit_layers=(2,), epochs=1))
    assert len(load_fitted(tmp_path / "out").draft_vocab) == 8
    from_pretrained(tmp_path / "out")  # the exits' hash is that of the whole file
