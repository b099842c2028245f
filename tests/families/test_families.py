"""Every causal language model of ``transformers``: full parity with its own forward pass, or
refused in one sentence.

Each family is a small random model whose windows, chunks and rotary boundaries are shorter than
the sequences here (``small_config``). All that offramp computes is compared with plain forward
passes of ``transformers`` over one row without padding.
"""

import warnings

import pytest
import torch
from configs import VARIANTS, families
from outcome import outcome_of
from truncated import truncated

from offramp.exits.confidence import ExitView, confidence_named
from offramp.exits.policy import ThresholdPolicy
from offramp.generation.confident_exit import ExitRule
from offramp.generation.config import GenerateConfig
from offramp.generation.forced import forced_exits
from offramp.generation.generate import generate
from offramp.models.base import Step, whole_step
from offramp.models.huggingface.small import BOUNDARY, WINDOW
from offramp.models.propagate import run_propagated

LENGTH, SHORTER, PROMPT = 44, 7, 10
assert LENGTH > BOUNDARY + WINDOW
NAMES = [*families(), *VARIANTS]


@pytest.fixture(params=NAMES, scope="module")
def outcome(request):
    """The tests of one family run together, since its model is made once."""
    return outcome_of(request.param)


@pytest.fixture
def opened(outcome):
    if outcome.model is None:
        pytest.skip(outcome.group)
    return outcome


@pytest.fixture
def cached(opened):
    if opened.group != "blocks":
        pytest.skip(opened.group)
    return opened


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def rows_of(model):
    length = min(LENGTH, model.max_length)
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, 290, (n,), generator=random) for n in (length, length - SHORTER)]


def plain(lm, ids):
    cache = lm.config.model_type == "xlstm"  # whose two ways to run round very differently
    return lm(input_ids=ids[None], use_cache=cache).logits[0]


def at(model, ids, layer, real=None):
    [(_, h)] = model.states_at(ids, [layer], step=whole_step(ids, real=real))
    return model.unembed(h, layer)


def close(actual, expected, near=2e-3):
    assert actual.isfinite().all()
    worst = float((actual - expected).abs().max() / expected.std())
    assert worst < near, f"differs by {worst:.2g} of the logits' standard deviation"


def test_each_family_is_opened_or_refused_in_one_sentence(outcome):
    assert "\n" not in outcome.why
    if outcome.group in ("refused", "no cache"):
        assert outcome.why.count(": ") >= 1
        assert len(outcome.why) < 500
    if outcome.group == "whole":
        assert outcome.why


def test_full_depth_equals_the_plain_model(opened):
    long, short = rows_of(opened.model)
    for ids in (long, short, long[:3]):
        close(at(opened.model, ids[None], opened.model.num_layers)[0], plain(opened.lm, ids))


def test_a_token_does_not_depend_on_later_ones(opened):
    long, _ = rows_of(opened.model)
    close(plain(opened.lm, long)[:PROMPT], plain(opened.lm, long[:PROMPT]))


def test_a_batch_equals_its_rows(opened):
    long, _ = rows_of(opened.model)
    ids = torch.stack((long, long.roll(3)))
    logits = at(opened.model, ids, opened.model.num_layers)
    for row in (0, 1):
        close(logits[row], plain(opened.lm, ids[row]))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_rows_equal_rows_alone(opened, left):
    long, short = rows_of(opened.model)
    ids = torch.full((2, len(long)), 7)
    real = torch.zeros(2, len(long), dtype=torch.bool)
    for row, of in enumerate((long, short)):
        columns = slice(len(long) - len(of), None) if left else slice(0, len(of))
        ids[row, columns], real[row, columns] = of, True
    for layer in (2, opened.model.num_layers):
        logits = at(opened.model, ids, layer, real)
        assert logits.isfinite().all()
        for row, of in enumerate((long, short)):
            close(logits[row, real[row]], at(opened.model, of[None], layer)[0])
    close(logits[1, real[1]], plain(opened.lm, short))


def test_an_exit_equals_the_truncated_model(opened):
    model = opened.model
    long, _ = rows_of(model)
    for layer in range(1, model.num_layers):
        small = truncated(opened.lm, layer)
        if small is None:
            pytest.skip("transformers cannot make it of fewer layers")
        close(at(model, long[None], layer)[0], plain(small, long))


def run(model, ids, step):
    h = model.run_layers(model.embed(ids, step=step), 0, model.num_layers, step=step)
    return model.unembed(h, model.num_layers)


def test_decoding_with_a_cache_equals_passes_without_one(cached):
    """Rows of unequal length: a padded prompt, a chunk, one by one; each against its own prefix."""
    model, lm = cached.model, cached.lm
    rows = rows_of(model)
    cache = model.make_cache(2, len(rows[0]))
    ends = [PROMPT, PROMPT - SHORTER]
    ids = torch.full((2, PROMPT), 7)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :SHORTER] = False
    ids[0], ids[1, SHORTER:] = rows[0][:PROMPT], rows[1][: ends[1]]
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    logits = run(model, ids, Step(positions=positions, real=real, cache=cache))
    count = 8
    while True:
        for row in (0, 1):
            close(logits[row, -1], plain(lm, rows[row][: ends[row]])[-1])
        count = min(count, len(rows[0]) - ends[0])
        if not count:
            break
        positions = torch.tensor(ends)[:, None] + torch.arange(count)
        ids = torch.stack([row[p] for row, p in zip(rows, positions, strict=True)])
        logits = run(model, ids, Step(positions=positions, cache=cache))
        ends = [end + count for end in ends]
        count = 1


def test_a_cropped_cache_is_a_fresh_one(cached):
    model = cached.model
    long, _ = rows_of(model)
    other = long.flip(0)
    cache = model.make_cache(1, len(long))
    run(model, long[None], Step(positions=torch.arange(len(long))[None], cache=cache))
    for cut in (len(long) - 3, len(long) // 2, 3):
        cache.crop(cut)
        ids = torch.cat((long[:cut], other[: len(long) - cut]))
        step = Step(positions=torch.arange(cut, len(long))[None], cache=cache)
        close(run(model, ids[None, cut:], step)[0], plain(cached.lm, ids)[cut:])
        cache.crop(cut)


@pytest.mark.parametrize("missing_kv", ["recompute", "propagate"])
def test_confident_exit_equals_its_definition(cached, missing_kv):
    model = cached.model
    long, _ = rows_of(model)
    inputs = torch.stack((long, long.flip(0)))
    layers = sorted({*model.exit_layers, *(n - 1 for n in model.exit_layers)})
    states = dict(model.states_at(inputs, layers, step=whole_step(inputs)))
    measure = confidence_named("saturation")

    def score(layer, h, previous):
        logits = model.unembed(h, layer)
        return measure.score(
            ExitView(exit_layer=layer, logits=logits, state=h, previous_state=previous)
        )

    scores = score(1, states[1], states[0]).flatten().sort().values[10:-10]
    wide = int(scores.diff().argmax())  # no score is near the threshold
    policy = ThresholdPolicy.of(float(scores[wide : wide + 2].mean()), len(model.exit_layers))
    rule = ExitRule(policy=policy, confidence="saturation")
    logits, layers = forced_exits(model, inputs, rule, missing_kv=missing_kv)
    assert len(layers.unique()) > 1
    if missing_kv == "propagate":

        def leaves(layer, h, previous):
            return policy.leaves(model.exit_layers.index(layer), score(layer, h, previous))

        step = whole_step(inputs)
        h, expected = run_propagated(model, inputs, leaves, step=step, needs_previous_state=True)
        assert torch.equal(layers, expected)
        states = dict.fromkeys(model.exit_layers, h)
    for layer in layers.unique().tolist():
        here = layers == layer
        close(logits[here], model.unembed(states[layer], layer)[here])


def test_speculation_and_decoding_give_the_greedy_text(cached):
    """The prompt and its new tokens pass the window and the rotary boundary."""
    model, lm = cached.model, cached.lm
    prompt = rows_of(model)[0][: BOUNDARY - 6].tolist()
    new = min(16, model.max_length - len(prompt))
    ids = list(prompt)
    for _ in range(new):
        logits = plain(lm, torch.tensor(ids))[-1]
        ids.append(int(logits.argmax()))
    for options in (
        {},
        {
            "speculative": True,
            "draft_exit": 1,
            "draft_threshold": 0.0,
            "lookup": 2,
            "adaptive": False,
        },
    ):
        tokens = generate(model, prompt, GenerateConfig(max_new_tokens=new, **options))
        assert [token.id for token in tokens] == ids[len(prompt) :]
