"""The compiled products of quantised weights: exact to rounding, and each token for itself."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from offramp.errors import ConfigError
from offramp.models.base import Step
from offramp.models.native.fast import kernels, products
from offramp.models.native.fast.kernel_weights import KernelWeights
from offramp.models.native.quantise import quantised
from offramp.models.native.quantised import SCHEMES, quantise_weight

pytestmark = pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")

SIZES = [(24, 16), (5, 3), (1, 1), (64, 40), (300, 333)]
KINDS = range(5)
"""No instructions of their own, AVX2, AVX-VNNI, AVX512-VNNI, AMX: see quantised.h."""


@pytest.fixture(params=KINDS)
def _kind(request):
    if kernels._compiled.kind(request.param) != request.param:
        kernels._compiled.kind(KINDS[-1])
        pytest.skip("this processor has not these instructions")
    yield
    kernels._compiled.kind(KINDS[-1])


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_codes(x):
    """Round states to 15 bits in groups of 32, as the kernels do."""
    groups = F.pad(x, (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 16256
    codes = (groups * (16256 / (scale * 16256)).nan_to_num(posinf=0)).round()
    return (codes.double() * scale).view(len(x), -1)[:, : x.shape[1]]


@pytest.mark.usefixtures("_kind", "_threads")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("before", ["nothing", "norm", "gate"])
def test_a_product_is_that_of_the_numbers(scheme, outputs, inputs, before):
    w = quantise_weight(numbers(outputs, inputs), scheme)
    norm = numbers(inputs, seed=3) if before == "norm" else None
    residual = numbers(17, outputs, seed=1)
    x = numbers(17, inputs * (2 if before == "gate" else 1), seed=2)
    got = kernels.linear(x, w, norm=norm, eps=1e-5, gated=before == "gate", residual=residual)
    if norm is not None:
        x = F.rms_norm(x, (inputs,), norm, 1e-5)
    elif before == "gate":
        x = F.silu(x[:, :inputs]) * x[:, inputs:]
    wanted = in_codes(x) @ w.dequantised(torch.float64).T + residual
    near = (x.abs().amax() / 16256) * w.dequantised().abs().amax() * 1.01  # one code more or less
    assert (
        (got - wanted).abs() <= (1e-5 * wanted.abs().amax() + near * (before != "nothing"))
    ).all()
    for tokens in range(1, 17):
        few = numbers(17, x.shape[1], seed=4)[:tokens]
        alone = torch.cat([kernels.linear(row[None], w, norm=norm, eps=1e-6) for row in few])
        assert torch.equal(kernels.linear(few, w, norm=norm, eps=1e-6), alone)


@pytest.mark.usefixtures("_kind", "_threads")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 3), (64, 40), (300, 333), (1100, 1056)])
def test_a_token_of_a_prompt_is_that_of_a_step(scheme, outputs, inputs):
    """Prompts and steps are the same numbers, so thresholds and PPL of either hold for both."""
    w, x = quantise_weight(numbers(outputs, inputs), scheme), numbers(100, inputs, seed=2)
    whole = kernels.linear(x, w)
    few = torch.cat([kernels.linear(part, w) for part in x.split(7)])
    assert torch.equal(whole, few)
    for tokens in (15, 16, 17, 33):
        assert torch.equal(kernels.linear(x[:tokens], w), few[:tokens])


@pytest.mark.usefixtures("_kind", "_threads")
def test_threads_of_python_compute_at_once():
    """Four at a time, every format, steps and prompts: each gets the numbers that it gets alone."""
    dense = numbers(80, 300)
    weights = [dense, dense.bfloat16(), *(quantise_weight(dense, each) for each in SCHEMES)]
    calls = [(numbers(tokens, 300, seed=tokens), w) for tokens in (1, 5, 17, 40) for w in weights]
    alone = [kernels.linear(x, w) for x, w in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: kernels.linear(*call), calls * 4))
    for number, got in enumerate(together):
        assert torch.equal(got, alone[number % len(calls)])


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("_kind")
def test_what_is_no_number_stays_none(scheme, wrong, tokens):
    w, x = quantise_weight(numbers(20, 70), scheme), numbers(tokens, 70)
    x[0, 65] = wrong
    got = kernels.linear(x, w)
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30])
@pytest.mark.usefixtures("_kind")
def test_states_of_any_size_are_taken(scheme, scale):
    w, x = quantise_weight(numbers(20, 70), scheme), numbers(2, 70)
    wanted = (x * scale) @ w.dequantised().T
    assert_close(kernels.linear(x * scale, w), wanted, rtol=0.1, atol=max(0.1 * scale, 1e-28))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 40, 256])
@torch.inference_mode()
def test_a_model_says_the_same_by_kernels_and_each_token_for_itself(
    make_model, make_ids, scheme, norm, dtype, head_dim
):
    model = quantised(
        make_model(
            dtype=dtype,
            norm=norm,
            hidden_size=96,
            head_dim=head_dim,
            intermediate_size=200,
            num_key_value_heads=2,
        ),
        scheme,
    )
    ids = make_ids(1, 17)

    def run(portions):
        cache, start, parts = model.make_cache(1, capacity=18), 0, []
        for length in portions:
            step = Step(positions=torch.arange(start, start + length)[None], cache=cache)
            h = model.embed(ids[:, start : start + length], step=step)
            for first, last in ((0, 1), (1, 3)):
                h = model.run_layers(h, first, last, step=step)
            parts.append(model.unembed(h, 3))
            start += length
        return torch.cat(parts, 1), cache

    assert model.fills_beside(16)
    alone, cache = run([1] * 17)
    for portions in ([16, 1], [5, 1, 7, 4], [8, 9]):
        together, other = run(portions)
        assert torch.equal(together, alone)
        assert torch.equal(cache.keys, other.keys)
    with torch.enable_grad():  # the plain blocks, with the weights as numbers
        wanted = model.forward(ids)
    assert (alone.float() - wanted.float()).norm() < 0.06 * wanted.float().norm()
    vocab = torch.tensor([3, 0, 2])
    h = numbers(1, 2, 96).to(dtype)
    few = model.unembed(h, 3, vocab=vocab)
    assert torch.equal(few, model.unembed(h, 3)[..., vocab])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_kernels_there_is_another_way(make_model, make_ids, monkeypatch, scheme):
    monkeypatch.setattr(kernels, "_compiled", None)
    monkeypatch.setattr(products, "_compiled", None)
    model = quantised(
        make_model(dtype=torch.float32, hidden_size=64, num_key_value_heads=2), scheme
    )
    ids = make_ids(1, 5)
    step = Step(positions=torch.arange(5)[None], cache=model.make_cache(1, capacity=6))
    with torch.inference_mode():
        h = model.run_layers(model.embed(ids, step=step), 0, 3, step=step)
        got = model.unembed(h, 3)
        assert not model.rounds_alike()
    assert_close(got, model.forward(ids), rtol=1e-4, atol=1e-4)


def test_blocks_whose_weights_do_not_fit_are_refused():
    def of(scheme, rows=96):
        matrices = [(rows, 32), (32, 32), (80, 32), (32, 40)]
        made = [quantise_weight(numbers(*shape), scheme) for shape in matrices]
        return [*made, torch.ones(32), torch.ones(32)]

    fine = of("int8")
    KernelWeights([fine, fine], head_dim=8, eps=1e-5, post=False)
    plain = numbers(96, 32)
    for wrong in (
        [fine, of("int4")],
        [fine, of("int8", rows=80)],
        [fine, [plain, *fine[1:]]],
        [[plain, *fine[1:]]],
        [[*fine[:4], fine[4], fine[0]]],
        [[*fine[:4], fine[4].double(), fine[5]]],
    ):
        with pytest.raises(ConfigError, match="expected"):
            KernelWeights(wrong, head_dim=8, eps=1e-5, post=False)
    with pytest.raises(ConfigError, match="x: expected"):
        kernels.linear(numbers(2, 31), fine[0])
    with pytest.raises(ConfigError, match="norm: expected"):
        kernels.linear(numbers(2, 32), fine[0], norm=torch.ones(31))
