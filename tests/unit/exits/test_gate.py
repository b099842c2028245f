import pytest
import torch

from offramp.errors import ConfigError
from offramp.exits.gate import (
    GATE_KINDS,
    LARGEST_HIDDEN,
    FittedExits,
    Gate,
    GateConfig,
    agreement_probability,
    expected_kl,
    fit_gate,
    gate_of,
)

QUICK = GateConfig(steps=300, batch_size=256)


def make_states(tokens=4000, size=8, *, seed=0):
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))


def test_a_gate_is_smaller_than_the_width_squared():
    for width in (16, 128, 576, 4096):
        weights = sum(p.numel() for p in Gate(width).parameters() if p.ndim == 2)
        assert weights <= width * (min(width, LARGEST_HIDDEN) + 1)


def test_the_gate_learns_who_will_agree_and_weighs_both_classes_the_same():
    """Nine in ten agree by chance alone where the state says nothing: then a half, not 0.9."""
    states = make_states()
    agree = (states[:, :1] > 0).float()
    gate = fit_gate("gate", states.half(), agree, QUICK)
    said = agreement_probability(gate(make_states(seed=1)))
    assert ((said > 0.5) == (make_states(seed=1)[:, 0] > 0)).float().mean() > 0.95
    chance = torch.rand(4000, 1, generator=torch.Generator().manual_seed(2)) < 0.9
    assert chance.float().mean() == pytest.approx(0.9, abs=0.02)
    plain = fit_gate("gate", states, chance.float(), GateConfig(steps=300, hidden=1))
    assert float(agreement_probability(plain(states)).mean()) == pytest.approx(0.5, abs=0.05)


def test_the_gain_gate_learns_the_mean_of_a_skewed_loss_at_every_later_exit():
    """The mean, not the median, which is ln 2 of it for an exponential."""
    states = make_states(20_000)
    mean = torch.stack([0.1 + 0.4 * (states[:, 0] > 0), 0.05 + 0.1 * (states[:, 1] > 0)], dim=1)
    noise = torch.empty_like(mean).exponential_(generator=torch.Generator().manual_seed(1))
    gate = fit_gate("gain", states, mean * noise, GateConfig(steps=1000, hidden=32))
    said = expected_kl(gate(states))
    assert said.shape == (20_000, 2)
    assert (said >= 0).all()
    assert said.mean(dim=0).tolist() == pytest.approx([0.3, 0.1], rel=0.05)
    for output, high, low in [(0, 0.5, 0.1), (1, 0.15, 0.05)]:
        assert float(said[states[:, output] > 1, output].mean()) > 0.8 * high
        assert float(said[states[:, output] < -1, output].mean()) < 1.3 * low


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_the_same_seed_gives_the_same_gate_and_another_one_another(kind):
    states, targets = make_states(500), torch.rand(500, 1).round()
    torch.manual_seed(1)
    first = fit_gate(kind, states, targets, GateConfig(steps=5))
    torch.manual_seed(2)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    second = fit_gate(kind, states, targets, GateConfig(steps=5))
    assert torch.rand(1) == drawn  # and leaves the caller's draws alone
    other = fit_gate(kind, states, targets, GateConfig(steps=5, seed=1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.up_proj.weight, other.up_proj.weight)
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_a_gate_can_be_fitted_in_inference_mode_of_the_caller():
    with torch.no_grad():
        gate = fit_gate("gain", make_states(50), torch.rand(50, 1), GateConfig(steps=2))
    assert gate(make_states(3)).shape == (3, 1)


def test_a_gate_comes_back_from_its_parameters():
    gate = fit_gate("gain", make_states(50, 6), torch.rand(50, 3), GateConfig(steps=2, hidden=4))
    back = gate_of(gate.state_dict())
    h = make_states(5, 6)
    assert torch.equal(back(h), gate(h))
    assert back(h).shape == (5, 3)


def test_low_precision_states_are_read_in_the_gates_own():
    gate = Gate(8)
    h = make_states(4).bfloat16()
    assert gate(h).dtype == torch.float32
    assert torch.equal(gate(h), gate(h.float()))


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("gates", torch.zeros(3, 1), "expected one of gate, gain, got 'gates'"),
        ("gain", torch.tensor([[0.0], [float("nan")], [0.0]]), "finite targets"),
        ("gain", torch.zeros(0, 1), "finite targets"),
    ],
)
def test_what_cannot_be_fitted_is_a_config_error(kind, targets, message):
    with pytest.raises(ConfigError, match=message):
        fit_gate(kind, torch.zeros(len(targets), 4), targets)


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"batch_size": 0}, {"hidden": 0}, {"lr": 0.0}, {"seed": -1}]
)
def test_a_config_out_of_range_is_a_config_error(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        GateConfig(**fields)


def test_a_layer_without_a_temperature_has_1():
    fitted = FittedExits(temperatures={2: 1.5})
    assert (fitted.temperature(2), fitted.temperature(3)) == (1.5, 1.0)
