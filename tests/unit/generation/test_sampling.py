import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from torch.testing import assert_close

from offramp.errors import ConfigError, GenerationError
from offramp.generation.config import GenerateConfig, SamplingConfig
from offramp.generation.generate import generate
from offramp.generation.sampling import Sampler, distribution, likeliest_with, penalise
from offramp.generation.speculative import SpeculativeDecoder

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def probs(**options):
    return distribution(LOGITS, SamplingConfig(**{"temperature": 1.0, **options}))


def test_temperature_divides_the_logits():
    assert_close(probs(), LOGITS.softmax(0))
    assert_close(probs(temperature=0.5), (LOGITS * 2).softmax(0))


def test_top_k_keeps_the_likeliest():
    assert probs(top_k=2).nonzero()[:, 0].tolist() == [1, 2]
    assert_close(probs(top_k=2)[1:3], LOGITS[1:3].softmax(0))
    assert_close(probs(top_k=50), LOGITS.softmax(0))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, [1]), (0.6, [1]), (0.7, [1, 2]), (0.95, [0, 1, 2, 4]), (1.0, None)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    got = probs(top_p=top_p)
    assert got.nonzero()[:, 0].tolist() == (kept or [0, 1, 2, 3, 4])
    assert_close(got.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"temperature": 5e-324}])
def test_a_temperature_near_0_takes_the_likeliest_token(options):
    assert probs(**options).tolist() == [0, 1, 0, 0, 0]
    assert probs(**options, top_k=2, top_p=0.5).tolist() == [0, 1, 0, 0, 0]
    ruled_out = LOGITS.masked_fill(LOGITS < 3, -math.inf)
    assert distribution(ruled_out, SamplingConfig(**options)).tolist() == [0, 1, 0, 0, 0]


def test_a_top_p_near_0_takes_the_likeliest_token():
    assert probs(top_p=5e-324).tolist() == [0, 1, 0, 0, 0]


def test_top_p_counts_after_temperature_and_top_k():
    assert probs(top_p=0.7, top_k=2).nonzero()[:, 0].tolist() == [1]  # 0.73 of the two
    assert probs(top_p=0.6, temperature=5.0).nonzero()[:, 0].tolist() == [0, 1, 2]


def test_the_penalty_lowers_logits_of_both_signs():
    got = penalise(LOGITS, torch.tensor([0, 1, 0, 1, 0]) == 1, 2.0)
    assert got.tolist() == [1.0, 1.5, 2.0, -2.0, 0.5]


def sampler(vocab_size=5, prompt=(), **options):
    return Sampler(SamplingConfig(**options), prompt, vocab_size=vocab_size)


def test_seen_tokens_are_penalised_whether_in_the_prompt_kept_or_drafted():
    choose = sampler(prompt=[1], repetition_penalty=4.0)
    assert choose.choose(LOGITS, 0) == 2
    choose.keep(2)
    assert choose.choose(LOGITS, 1) == 0
    assert choose.choose(LOGITS, 2, after=[0]) == 1  # all penalised but 4: 0.75 > 0.5
    part = torch.tensor([3, 1, 4])  # of which 1 is penalised: 0.75 > 0.5
    assert choose.choose(LOGITS[part], 1, vocab=part) == 1


def test_the_nth_token_is_drawn_by_the_nth_draw_however_it_is_asked_for():
    ahead, one_by_one = sampler(temperature=1.0, seed=4), sampler(temperature=1.0, seed=4)
    drawn = [ahead.choose(LOGITS, index) for index in (3, 0, 2, 1)]
    kept = []
    for index in range(4):
        kept.append(one_by_one.choose(LOGITS, index))
        one_by_one.keep(kept[-1])
    assert [drawn[1], drawn[3], drawn[2], drawn[0]] == kept
    assert len({*kept}) > 1


def test_draws_have_the_distribution():
    draw = sampler(temperature=1.0, top_k=4, seed=1)
    counts = torch.zeros(5)
    for index in range(4000):
        token = draw.choose(LOGITS, index)
        draw.keep(token)
        counts[token] += 1
    expected = probs(top_k=4)
    assert counts[3] == 0
    there = expected > 0
    assert chisquare(counts[there], 4000 * expected[there] / expected.sum()).pvalue > 0.01


def test_the_likeliest_tokens_come_with_other_numbers_of_their_rows():
    logits = torch.stack((LOGITS, -LOGITS)).bfloat16()
    found, [others] = likeliest_with(logits, torch.tensor([0.1, math.nan]))
    assert found == [(3.0, 1), (1.0, 3)]
    assert others[0] == torch.tensor(0.1).item()
    assert math.isnan(others[1])
    vocab = torch.tensor([40, 41, 42, 43, 44])
    assert likeliest_with(logits, vocab=vocab) == ([(3.0, 41), (1.0, 43)], [])


def test_a_known_likeliest_token_is_taken_unless_it_is_penalised_or_drawn():
    known = (3.0, 4)
    assert sampler().choose(LOGITS, 0, likeliest=known) == 4
    assert sampler(repetition_penalty=2.0).choose(LOGITS, 0, likeliest=known) == 1
    alone, given = sampler(temperature=1.0), sampler(temperature=1.0)
    drawn = [given.choose(LOGITS, index, likeliest=known) for index in range(20)]
    assert drawn == [alone.choose(LOGITS, index) for index in range(20)]
    with pytest.raises(GenerationError, match="got nan"):
        sampler().choose(LOGITS, 0, likeliest=(math.nan, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = LOGITS.clone()
    logits[2] = bad
    for options in ({}, {"temperature": 1.0}):
        with pytest.raises(GenerationError, match=f"new token 3, got {bad}"):
            sampler(**options).choose(logits, 2)


def test_a_token_that_is_ruled_out_is_no_error():
    logits = LOGITS.clone()
    logits[1] = -math.inf
    assert sampler().choose(logits, 0) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 101.0},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: expected"):
        SamplingConfig(**options)


# Speculative sampling keeps the distribution.

DRAWS = 400
DEPTH = 3


def skewed(make_model):
    """A model whose first exit says something quite different from its last layer."""
    model = make_model(
        vocab_size=4, num_hidden_layers=2, exit_layers=(1,), exit_head="full", dtype=torch.float32
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.exits["1"].lm_head.weight.mul_(3)
    return model


@torch.inference_mode()
def joint_distribution(model, prompt, options):
    """Of the DEPTH tokens after the prompt, flattened."""
    config = SamplingConfig(**options)
    found = torch.ones(1)
    for depth in range(DEPTH):
        paths = torch.tensor([*itertools.product(range(4), repeat=depth)], dtype=torch.long)
        texts = torch.cat((torch.tensor(prompt).expand(len(paths), -1), paths), dim=1)
        logits = model(texts)[:, -1]
        each = torch.stack([distribution(row, config) for row in logits])
        found = (found[:, None] * each).flatten()
    return found


def p_value(model, **options):
    """Of 4^DEPTH cells, those with too few expected draws together."""
    prompt = [1, 3, 0]
    counts = torch.zeros(4**DEPTH)
    for seed in range(DRAWS):
        config = GenerateConfig(
            max_new_tokens=DEPTH + 1,
            speculative=True,
            adaptive=False,
            draft_threshold=-math.inf,
            max_drafts=3,
            seed=seed,
            **options,
        )
        a, b, c = [token.id for token in generate(model, prompt, config)][:DEPTH]
        counts[16 * a + 4 * b + c] += 1
    expected = DRAWS * joint_distribution(model, prompt, options)
    rare = expected < 5
    cells = [(counts[~rare], counts[rare].sum()), (expected[~rare], expected[rare].sum())]
    observed, wanted = (torch.cat((cell, rest[None])).double() for cell, rest in cells)
    if wanted[-1] < 1e-6:
        assert observed[-1] == 0
        observed, wanted = observed[:-1], wanted[:-1]
    return chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 3}])
def test_speculative_sampling_keeps_the_distribution(make_model, options):
    assert p_value(skewed(make_model), **options) > 0.01


def test_the_test_fails_if_drafts_are_accepted_unseen(make_model, monkeypatch):
    verify = SpeculativeDecoder._verify

    def accept_all(self, seen, drafts, scores, sampler, index):
        drafted = zip(drafts, seen[0], strict=False)
        kept = [(draft, self.draft_exit, 1.0, each) for draft, each in drafted]
        last = tuple(part[-1:] for part in seen)
        return [*kept, verify(self, last, [], [], sampler, index + len(drafts))[0]]

    monkeypatch.setattr(SpeculativeDecoder, "_verify", accept_all)
    assert p_value(skewed(make_model), temperature=1.0) < 1e-6


def test_the_test_fails_if_a_rejected_draft_is_drawn_again(make_model, monkeypatch):
    """The classic mistake: after a rejection, p itself instead of what is left of it."""
    verify = SpeculativeDecoder._verify

    def redraw(self, seen, drafts, scores, sampler, index):
        chosen = verify(self, seen, drafts, scores, sampler, index)
        logits, n = seen[0], len(chosen) - 1
        if n < len(drafts):
            chosen[n] = (sampler.choose(logits[n], index + n + 2 * DEPTH), 2, 1.0, logits[n])
        return chosen

    monkeypatch.setattr(SpeculativeDecoder, "_verify", redraw)
    assert p_value(skewed(make_model), temperature=1.0) < 1e-3


def test_prefill_and_steps_draw_what_the_same_seed_draws_again(make_model):
    model = skewed(make_model)
    config = GenerateConfig(max_new_tokens=20, temperature=1.0, seed=7)
    first = [token.id for token in generate(model, [1], config)]
    assert [token.id for token in generate(model, [1], config)] == first
    other = GenerateConfig(max_new_tokens=20, temperature=1.0, seed=8)
    assert [token.id for token in generate(model, [1], other)] != first
