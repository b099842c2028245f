import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.calibration.fitting import fit_exits, fit_gates, fit_temperatures
from offramp.data import batches
from offramp.errors import CheckpointError
from offramp.evaluation.quality import auroc
from offramp.evaluation.sample import collect_sample
from offramp.evaluation.trace import collect_trace
from offramp.exits.gate import FittedExits, GateConfig
from offramp.exits.temperature import fit_temperature
from offramp.models.fitted import load_fitted, save_fitted

QUICK = GateConfig(steps=20, batch_size=64)


@pytest.fixture
def model(make_model):
    model = make_model(dtype=torch.float32, num_hidden_layers=4, exit_layers=(1, 3))
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # spread the predictions
    return model


@pytest.fixture
def ids(make_ids):
    return make_ids(1, 1000)[0]


def read(ids):
    return batches(ids, seq_len=16, batch_size=4)


@pytest.fixture
def fitted(model, ids):
    return fit_exits(model, read(ids), temperatures=True, config=QUICK)


def test_every_exit_but_the_last_gets_what_is_asked_for(fitted, model, ids):
    assert {kind: sorted(gates) for kind, gates in fitted.gates.items()} == {
        "gate": [1, 3],
        "gain": [1, 3],
    }
    assert sorted(fitted.temperatures) == [1, 3]
    outputs = [fitted.gate("gain", layer).out_proj.out_features for layer in (1, 3)]
    assert outputs == [2, 1]  # exit 1 foresees exit 3, too
    only = fit_exits(model, read(ids), kinds=("gate",), config=QUICK)
    assert (list(only.gates), only.temperatures) == (["gate"], {})


def test_fitting_leaves_the_model_as_it_is(model, ids):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_exits(model, read(ids), temperatures=True, config=QUICK)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_pass_of_the_model_is_all(model, ids):
    ran = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    fit_exits(model, read(ids), temperatures=True, config=QUICK)
    assert len(ran) == len(list(read(ids)))


def test_gates_learn_from_the_divergence_of_their_own_exit(model, ids):
    """Against labels shifted by one exit or layer: what a gate says correlates with what is."""
    sample = collect_sample(model, read(ids), max_tokens=10_000)
    gates = fit_gates("gain", sample, GateConfig(steps=600, batch_size=256, hidden=256))
    trace = collect_trace(
        model, read(ids), measures=("gain",), fitted=FittedExits(gates={"gain": gates}), kl=True
    )
    for i, j, other in [(0, 0, 1), (0, 1, 0), (1, 1, 0)]:
        said = trace.expected_kl[i, j]
        own, shifted = (np.corrcoef(said, trace.kl[row])[0, 1] for row in (j, other))
        assert own > max(0.5, shifted + 0.1)
        assert said.mean() == pytest.approx(trace.kl[j].mean(), rel=0.1)


def test_the_gate_says_who_agrees(model, ids):
    fitted = fit_exits(
        model, read(ids), kinds=("gate",), config=GateConfig(steps=600, batch_size=256, hidden=256)
    )
    trace = collect_trace(model, read(ids), measures=("gate",), fitted=fitted)
    agrees = trace.argmax[:2] == trace.argmax[2]
    for row, other in [(0, 1), (1, 0)]:
        own, shifted = (auroc(trace.scores("gate")[row], agrees[label]) for label in (row, other))
        assert own > max(0.75, shifted + 0.1)


def test_the_temperature_is_that_of_the_exits_own_logits(model, ids):
    sample = collect_sample(model, read(ids), max_tokens=10_000)
    for layer, found in fit_temperatures(model, sample).items():
        every = [model.forward_all_layers(inputs)[layer - 1] for inputs, _ in read(ids)]
        logits = torch.cat([logits.flatten(0, 1) for logits in every]).detach()
        assert found == pytest.approx(fit_temperature(logits, ids[1:]), rel=0.01)


def test_what_was_fitted_comes_back(fitted, model, ids, tmp_path):
    save_fitted(fitted, tmp_path, exits="")
    back = load_fitted(tmp_path)
    assert back.temperatures == fitted.temperatures
    measures = ("max_prob", "gate", "gain")
    first, second = (
        collect_trace(model, read(ids), measures=measures, fitted=which) for which in (fitted, back)
    )
    for name in measures:
        assert np.array_equal(first.scores(name), second.scores(name))
    assert np.array_equal(first.expected_kl, second.expected_kl, equal_nan=True)


def test_a_folder_without_gates_has_none(tmp_path):
    assert load_fitted(tmp_path).gates == {}


def test_gates_are_written_in_one_step_and_replace_earlier_ones(fitted, model, ids, tmp_path):
    """A process that is killed at any moment leaves the old gates or the new ones."""
    kept = {"exits.safetensors": b"the exits", "offramp.json": b"about them"}
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    save_fitted(fitted, tmp_path, exits="one")
    save_fitted(fit_exits(model, read(ids), kinds=("gate",), config=QUICK), tmp_path, exits="two")
    stored = load_file(tmp_path / "fitted.safetensors")
    assert {name.split(".")[0] for name in stored} == {"gate"}
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def test_gates_of_other_exits_are_not_used(fitted, tmp_path):
    save_fitted(fitted, tmp_path, exits="one")
    assert load_fitted(tmp_path, exits=lambda: "one").gates
    with pytest.warns(UserWarning, match="fitted to other exits .* offramp confidence .* --fit"):
        assert not load_fitted(tmp_path, exits=lambda: "two").gates


def test_gates_of_earlier_versions_are_read_from_the_file_of_the_exits(fitted, tmp_path):
    save_fitted(fitted, tmp_path, exits="one")
    (tmp_path / "fitted.safetensors").rename(tmp_path / "exits.safetensors")
    assert load_fitted(tmp_path, exits=lambda: "two").temperatures == fitted.temperatures


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gate.1.up_proj.weight": torch.ones(2, 2)}, "a whole gate at exit layer 1"),
        ({"gate.x.up_proj.weight": torch.ones(2, 2)}, "by layer, got gate.x.up_proj.weight"),
        ({"gain.1": torch.ones(2)}, "by layer, got gain.1"),
        ({"temperature.1.more": torch.ones(1)}, "by layer, got temperature.1.more"),
    ],
)
def test_damaged_gates_are_a_checkpoint_error(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "exits.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_fitted(tmp_path)


def test_a_draft_vocabulary_is_stored(tmp_path):
    save_file({"exits.1.norm.weight": torch.ones(4)}, tmp_path / "exits.safetensors")
    assert load_fitted(tmp_path).draft_vocab is None
    tokens = torch.tensor([7, 0, 3])
    save_fitted(FittedExits(draft_vocab=tokens, temperatures={1: 2.0}), tmp_path, exits="")
    found = load_fitted(tmp_path)
    assert torch.equal(found.draft_vocab, tokens)
    assert found.temperatures == {1: 2.0}
    save_fitted(FittedExits(), tmp_path, exits="")
    assert load_fitted(tmp_path).draft_vocab is None
