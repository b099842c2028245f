"""Weights of 8 and 4 bits: what they hold, and what does not fit is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from offramp.errors import ConfigError
from offramp.models.base import Step
from offramp.models.native.quantise import quantised
from offramp.models.native.quantised import (
    SCHEMES,
    QuantisedLinear,
    QuantisedWeight,
    concatenated,
    quantise_weight,
)

SIZES = [(16, 32), (1, 1), (5, 3), (300, 333), (24, 16), (64, 576)]
RELATIVE = {"int8": 0.01, "int4": 0.09}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SIZES)
def test_the_numbers_stay_close(shape, scheme):
    w = numbers(*shape)
    q = quantise_weight(w, scheme)
    got = q.dequantised()
    assert got.shape == w.shape
    assert (got - w).norm() <= RELATIVE[scheme] * w.norm()
    largest = w.abs().amax(1) / 254 if scheme == "int8" else (w.amax(1) - w.amin(1)) / 20
    assert ((got - w).abs().amax(1) <= largest + 1e-3).all()
    assert torch.equal(q.dequantised(first=1, last=19), got[1:19])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_outlier_spoils_only_its_group(scheme):
    w = numbers(32, 64)
    w[3, 5] = 1000.0
    error = (quantise_weight(w, scheme).dequantised() - w).abs()
    others = torch.ones_like(w, dtype=torch.bool)
    others[3, :32] = False
    assert error[others].max() < 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_are_zero_or_constant_stay_so(scheme):
    w = torch.zeros(20, 40)
    w[1] = 0.5
    w[2] = -3.0
    assert_close(quantise_weight(w, scheme).dequantised(), w, rtol=1e-3, atol=0)


def test_weights_from_q4_1_of_llama_cpp_keep_their_values():
    groups = numbers(64, 18, 32)
    least, most = groups.aminmax(dim=-1)
    scale, least = ((most - least) / 15).half().float()[..., None], least.half().float()[..., None]
    w = (((groups - least) / scale).round().clamp(0, 15) * scale + least).view(64, -1)
    assert torch.equal(quantise_weight(w, "int4").dequantised(), w)


def test_int4_is_no_worse_than_the_range_of_each_group():
    w = numbers(64, 18, 32).pow(3)
    least, most = w.aminmax(dim=-1, keepdim=True)
    scale = (most - least) / 15
    plain = ((w - least) / scale).round() * scale + least - w
    error = quantise_weight(w.view(64, -1), "int4").dequantised() - w.view(64, -1)
    assert error.norm() < 0.95 * plain.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("outputs", [16, 5, 40])
def test_rows_can_be_chosen_and_joined(scheme, outputs):
    q = quantise_weight(numbers(outputs, 37), scheme)
    whole = q.dequantised()
    index = torch.tensor([3, 0, 3, 4])
    assert torch.equal(q[index].dequantised(), whole[index])
    assert torch.equal(q[2:].dequantised(), whole[2:])
    together = concatenated([q, q[index], q])
    assert torch.equal(together.dequantised(), torch.cat((whole, whole[index], whole)))
    with pytest.raises(ConfigError, match=r"expected .* of 37 inputs, got .* of 32"):
        concatenated([q, quantise_weight(numbers(4, 32), scheme)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_with_its_weight_and_keeps_its_types(scheme):
    q = quantise_weight(numbers(40, 37), scheme)
    layer, x = QuantisedLinear.of(q), numbers(2, 3, 37, seed=1)
    assert_close(layer(x), F.linear(x, q.dequantised()), rtol=1e-5, atol=0.3)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert {k: v.dtype for k, v in layer.state_dict().items()} == {
        k: v.dtype for k, v in q.tensors().items()
    }
    again = QuantisedLinear(37, 40, scheme)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight.dequantised(), q.dequantised())
    with pytest.raises(ConfigError, match="x: expected floats of shape"):
        layer(x[..., :36])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_from_outside_are_checked(scheme):
    q = quantise_weight(numbers(40, 37), scheme)
    about = {"scheme": scheme, "shape": (40, 37)}
    tensors = q.tensors()
    assert torch.equal(QuantisedWeight.of(tensors, **about).dequantised(), q.dequantised())
    for name, tensor in tensors.items():
        damaged = [tensor[:-1], tensor.double(), tensor.flatten()]
        if name != "values":
            damaged += [torch.full_like(tensor, torch.inf), torch.full_like(tensor, torch.nan)]
        for wrong in damaged:
            with pytest.raises(ConfigError, match=f"{name}: expected"):
                QuantisedWeight.of({**tensors, name: wrong}, **about)
        with pytest.raises(ConfigError, match=f"expected {name}"):
            QuantisedWeight.of({k: v for k, v in tensors.items() if k != name}, **about)
    with pytest.raises(ConfigError, match="expected only values, scales, minimums, got 'more'"):
        QuantisedWeight.of({**tensors, "more": tensors["values"]}, **about)
    with pytest.raises(ConfigError, match="scheme: expected one of int8, int4, got 'int3'"):
        QuantisedWeight.of(tensors, scheme="int3", shape=(40, 37))
    with pytest.raises(ConfigError, match="shape: expected"):
        QuantisedWeight.of(tensors, scheme=scheme, shape=(0, 37))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(scheme, wrong):
    w = numbers(4, 8)
    w[1, 2] = wrong
    with pytest.raises(ConfigError, match="expected finite numbers"):
        quantise_weight(w, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_quantised_model_runs_as_the_same_model_with_its_weights_as_numbers(
    make_model, make_ids, scheme, dtype
):
    options = {"hidden_size": 64, "num_key_value_heads": 2, "exit_head": "full", "dtype": dtype}
    model, same = quantised(make_model(**options), scheme), make_model(**options)
    for layer, plain in zip(model.modules(), same.modules(), strict=True):
        if isinstance(layer, QuantisedLinear):
            plain.weight.copy_(layer.weight.dequantised())
    ids = make_ids(2, 9)
    assert model.dtype == dtype
    for got, wanted in zip(
        model.forward_all_layers(ids), same.forward_all_layers(ids), strict=True
    ):
        assert got.dtype == dtype
        assert (got.float() - wanted.float()).norm() < 0.03 * wanted.float().norm()
    step = Step(positions=torch.arange(9)[None], cache=model.make_cache(2, capacity=11))
    h = model.run_layers(model.embed(ids, step=step), 0, 3, step=step)
    vocab = torch.tensor([5, 1, 2])
    got, wanted = model.unembed(h, 3, vocab=vocab), same.forward(ids)[..., vocab]
    assert (got.float() - wanted.float()).norm() < 0.05 * wanted.float().norm()
