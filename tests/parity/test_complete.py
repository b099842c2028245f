"""Blocks above a source layer share keys and values: a token that leaves there loses nothing.

Every way of decoding is compared with a pass over the whole text.
"""

import pytest
import torch
from torch.testing import assert_close

from offramp.evaluation.routed import collect_routed
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace
from offramp.exits.confidence import ExitView
from offramp.exits.policy import ThresholdPolicy
from offramp.generation import deferred
from offramp.generation.confident_exit import ExitDecoder, ExitRule
from offramp.generation.config import GenerateConfig
from offramp.generation.forced import forced_exits
from offramp.generation.generate import generate, generate_batch
from offramp.models.base import Step, whole_step
from offramp.models.native.decoder import Transformer
from offramp.models.native.fast import kernels
from offramp.models.propagate import run_propagated

LAYERS = 5
COMPLETE = [(1, (1,)), (1, (1, 3)), (1, (2, 4)), (3, (3, 4)), (4, (4,))]
"""(source, exits): every exit is at the source or above it."""
BELOW = [(3, (1, 3)), (3, (1, 4)), (3, (2, 4)), (4, (2, 4)), (4, (1, 3)), (2, (1, 2, 3, 4))]
"""At least one exit is below the source; a segment from exit to exit may cross it."""
SOME = [(1, (1, 3)), (3, (3, 4)), (3, (1, 4)), (2, (1, 2, 3, 4))]
NEAR = {torch.float32: 1e-4, torch.float64: 1e-10}
PROMPTS = ([3, 1, 4, 1, 5], [9], [6, 5, 3, 5, 8, 9, 7])


@pytest.fixture
def make(make_model):
    """Make a model of ``LAYERS`` layers whose exits are now sure and now not.

    In float32 its heads are wide enough for the compiled kernels.
    """

    def with_source(source, exits, *, dtype=torch.float64, exit_head="full") -> Transformer:
        model = make_model(
            num_hidden_layers=LAYERS,
            kv_source_layer=source,
            exit_layers=exits,
            exit_head=exit_head,
            num_key_value_heads=2,
            norm="post" if 4 in exits else "pre",
            dtype=dtype,
            hidden_size=16 if dtype == torch.float64 else 64,
        )
        if dtype == torch.float32 and kernels._compiled is not None:
            assert model.rounds_alike()
        with torch.no_grad():
            for head in (model.lm_head, *(head.lm_head for head in model.exits.values())):
                head.weight.mul_(2)
        return model

    return with_source


def rule_of(model, threshold=0.45, confidence="max_prob"):
    policy = ThresholdPolicy.of(threshold, len(model.exit_layers))
    return ExitRule(policy=policy, confidence=confidence)


@torch.inference_mode()
def propagated(model, ids, rule):
    """The logits and exits of a pass over the whole text in which tokens keep their states."""

    def leaves(layer, h, previous):
        view = ExitView(
            exit_layer=layer, logits=model.unembed(h, layer), state=h, previous_state=previous
        )
        return rule.policy.leaves(model.exit_layers.index(layer), rule.measure.score(view))

    previous = rule.measure.needs_previous_state
    h, layers = run_propagated(
        model, ids, leaves, step=whole_step(ids), needs_previous_state=previous
    )
    return at_exits([model.unembed(h, layer) for layer in range(1, LAYERS + 1)], layers), layers


@torch.inference_mode()
def traced(model, ids, rule):
    """The logits and exits of a pass over the whole text in which no token stops."""
    every = model.forward_all_layers(ids)
    layers = torch.full(ids.shape, LAYERS)
    for index, layer in reversed(list(enumerate(model.exit_layers[:-1]))):
        scores = every[layer - 1].softmax(-1).amax(-1)
        layers = torch.where(rule.policy.leaves(index, scores), layer, layers)
    return at_exits(every, layers), layers


def at_exits(every, layers):
    """(B, T, V): each token's logits at its own layer."""
    stacked = torch.stack(every)
    return stacked.gather(0, (layers - 1)[None, ..., None].expand(1, *stacked.shape[1:]))[0]


def same(found, expected, dtype):
    (logits, layers), (expected_logits, expected_layers) = found, expected
    assert torch.equal(layers, expected_layers)
    assert_close(logits, expected_logits, rtol=NEAR[dtype], atol=NEAR[dtype])
    assert len(layers.unique()) > 1  # or the test would show little


@pytest.fixture(params=[False, True], ids=["before", "beside"])
def beside(request, monkeypatch):
    """Pending keys and values are projected before the token that needs them, or beside it."""
    given = request.param
    monkeypatch.setattr(Transformer, "fills_beside", lambda _, tokens: given and tokens < 17)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize(("source", "exits"), COMPLETE + BELOW)
def test_the_router_forced_along_a_text_equals_a_pass_over_it(make, make_ids, source, exits):
    model, ids = make(source, exits), make_ids(3, 20)
    rule = rule_of(model)
    for way, expected in (("propagate", propagated), ("recompute", traced)):
        found = forced_exits(model, ids, rule, missing_kv=way)
        same(found, expected(model, ids, rule), torch.float64)


@pytest.mark.parametrize(("source", "exits"), [(1, (2, 4)), (3, (1, 4))])
def test_a_text_of_more_than_64_tokens(make, make_ids, source, exits):
    model, ids = make(source, exits, dtype=torch.float32), make_ids(2, 70)
    rule = rule_of(model)
    for way, expected in (("propagate", propagated), ("recompute", traced)):
        found = forced_exits(model, ids, rule, missing_kv=way)
        same(found, expected(model, ids, rule), torch.float32)


@pytest.mark.parametrize(("source", "exits"), COMPLETE)
def test_for_complete_exits_a_trace_and_a_routed_pass_agree(make, make_ids, source, exits):
    model, ids = make(source, exits), make_ids(3, 33)
    rule = rule_of(model)
    same(propagated(model, ids, rule), traced(model, ids, rule), torch.float64)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    [row] = sweep(collect_trace(model, [(inputs, targets)]), [0.45])
    routed = collect_routed(model, [(inputs, targets)], rule.policy)
    shares = {
        layer: (routed.exits == place).mean() for place, layer in enumerate(model.exit_layers)
    }
    assert shares == pytest.approx(row.exit_share)
    assert routed.nll.mean() == pytest.approx(torch.tensor(row.ppl).log().item(), rel=1e-6)


@pytest.mark.parametrize(("source", "exits"), BELOW)
def test_below_the_source_the_two_meanings_differ(make, make_ids, source, exits):
    model, ids = make(source, exits), make_ids(3, 24)
    rule = rule_of(model)
    ways = [forced_exits(model, ids, rule, missing_kv=way)[0] for way in ("propagate", "recompute")]
    assert not torch.allclose(*ways)


@pytest.mark.parametrize(("source", "exits"), [(1, (1, 2, 4)), (3, (1, 4)), (2, (1, 3, 4))])
def test_a_measure_that_reads_the_state_before_the_exit(make, make_ids, source, exits):
    """It may be the state at the source, where pending tokens leave the call."""
    model, ids = make(source, exits), make_ids(3, 24)
    rule = rule_of(model, 0.5, "saturation")
    same(forced_exits(model, ids, rule), propagated(model, ids, rule), torch.float64)
    every = model.forward_all_layers(ids)
    logits, layers = forced_exits(model, ids, rule, missing_kv="recompute")
    assert_close(logits, at_exits(every, layers), rtol=1e-10, atol=1e-10)


# Bit for bit.


@pytest.mark.parametrize(("source", "exits"), COMPLETE)
def test_recompute_is_propagate_bit_for_bit(make, make_ids, source, exits):
    model, ids = make(source, exits, dtype=torch.float32), make_ids(3, 24)
    ways = [
        forced_exits(model, ids, rule_of(model), missing_kv=way)
        for way in ("propagate", "recompute")
    ]
    for one, other in zip(*ways, strict=True):
        assert torch.equal(one, other)
    config = {"max_new_tokens": 12, "threshold": 0.45}
    (one, work), (other, same_work) = (
        generate_batch(model, PROMPTS, GenerateConfig(**config, missing_kv=way))
        for way in ("propagate", "recompute")
    )
    assert [row.tokens for row in one] == [row.tokens for row in other]
    assert work == same_work


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize(("source", "exits"), [*SOME, (None, (1, 3))])
def test_a_row_alone_is_the_same_row_in_a_batch(make, make_ids, source, exits, missing_kv):
    model, ids = make(source, exits, dtype=torch.float32), make_ids(4, 20)
    rule = rule_of(model)
    together, layers = forced_exits(model, ids, rule, missing_kv=missing_kv)
    assert any(len(step.unique()) > 1 for step in layers.T)  # rows leave at different times
    for row in range(len(ids)):
        alone, own = forced_exits(model, ids[row : row + 1], rule, missing_kv=missing_kv)
        assert torch.equal(own[0], layers[row])
        if model.rounds_alike():
            assert torch.equal(alone[0], together[row])
        assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize(("source", "exits"), SOME)
def test_padded_prompts_of_a_batch_give_what_each_gives_alone(make, source, exits, missing_kv):
    model = make(source, exits)
    config = GenerateConfig(max_new_tokens=16, threshold=0.45, missing_kv=missing_kv)
    rows, _ = generate_batch(model, PROMPTS, config)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        alone = list(generate(model, prompt, config))
        assert row.ids == [token.id for token in alone]
        assert [token.exit_layer for token in row.tokens] == [token.exit_layer for token in alone]
        if missing_kv == "recompute" or exits[0] >= source:
            check_against_the_whole_text(model, prompt, alone)
    assert len({token.exit_layer for row in rows for token in row.tokens[1:]}) > 1


def check_against_the_whole_text(model, prompt, tokens):
    every = model.forward_all_layers(torch.tensor([[*prompt, *(token.id for token in tokens)]]))
    for place, token in enumerate(tokens, start=len(prompt)):
        logits = every[token.exit_layer - 1][0, place - 1]
        assert token.id == logits.argmax()
        assert token.confidence == pytest.approx(logits.softmax(-1).amax().item())


# What runs.


class Watched:
    """The calls of a model's blocks, as (start, stop, running tokens, tokens kept)."""

    def __init__(self, model, monkeypatch):
        self.ran, self.projected = [], []
        run_layers, project_kv = model.run_layers, model.project_kv

        def run(h, start, stop, *, step, active=None):
            tokens = h.shape[0] * h.shape[1]
            running = tokens if active is None else int(active.sum())
            self.ran.append((start, stop, running, tokens - running))
            return run_layers(h, start, stop, step=step, active=active)

        def project(h, start, stop, *, step):
            self.projected.append((start, stop, h.shape[0] * h.shape[1]))
            return project_kv(h, start, stop, step=step)

        monkeypatch.setattr(model, "run_layers", run)
        monkeypatch.setattr(model, "project_kv", project)

    def layers_run(self):
        return sum((stop - start) * running for start, stop, running, _ in self.ran)

    def projections(self, model):
        """Blocks of which only keys and values were projected, counted for each token."""
        beside = [(start, stop, kept) for start, stop, _, kept in self.ran if kept]
        return sum(
            (min(stop, model.cache_layers) - start) * tokens
            for start, stop, tokens in (*beside, *self.projected)
        )


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize(("source", "exits"), SOME)
def test_nothing_runs_above_the_source_for_a_token_that_left(
    make, make_ids, monkeypatch, source, exits, missing_kv
):
    model, ids = make(source, exits), make_ids(3, 30)
    decoder = ExitDecoder(
        model,
        model.make_cache(3, 30),
        batch_size=3,
        rule=rule_of(model),
        missing_kv=missing_kv,
    )
    watched, needed = Watched(model, monkeypatch), 0
    for column in ids.T.tolist():
        layers = decoder.decode_one_token(column, range(3)).exit_layers
        needed += sum(max(0, layer - source) for layer in layers)
    above = sum(
        (stop - max(start, source)) * running
        for start, stop, running, _ in watched.ran
        if stop > source
    )
    assert above == needed
    assert all(stop <= source + 1 for _, stop, _ in watched.projected)
    work = decoder.work
    assert work.layers_run == watched.layers_run()
    counted = sum(tokens * count for tokens, count in work.keys_values.items())
    assert counted == watched.projections(model)
    assert counted > 0 or exits[0] > source
    if exits[0] > source:
        assert counted == 0
        assert not watched.projected


def test_pending_tokens_may_run_in_portions(make, make_ids, monkeypatch):
    model, ids = make(3, (1, 4)), make_ids(3, 24)
    expected = forced_exits(model, ids, rule_of(model), missing_kv="recompute")
    monkeypatch.setattr(deferred, "FEW_TOKENS", 2)
    same(forced_exits(model, ids, rule_of(model), missing_kv="recompute"), expected, torch.float64)


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize(("source", "exits"), [(1, (1, 2)), (1, (2, 3)), (2, (1, 4)), (2, (1, 3))])
def test_a_model_of_which_no_block_above_writes_anything(
    make, make_ids, monkeypatch, source, exits, missing_kv
):
    """The same model may name the next layer, at which not even a projection is pending."""
    model, ids = make(source, exits), make_ids(3, 24)
    rule = rule_of(model)
    expected = {"propagate": propagated, "recompute": traced}[missing_kv](model, ids, rule)
    model.complete_from = source + 1
    assert model.complete_from == model.cache_layers
    watched = Watched(model, monkeypatch)
    if exits != (1, 2):  # where a token leaves at layer 1, which is now below
        same(forced_exits(model, ids, rule, missing_kv=missing_kv), expected, torch.float64)
    else:
        found = forced_exits(model, ids, rule, missing_kv="propagate")
        same(found, expected, torch.float64)
    assert all(stop <= model.cache_layers for _, stop, _ in watched.projected)
    [chosen], _ = generate_batch(model, PROMPTS[:1], GenerateConfig(max_new_tokens=9))
    assert chosen.ids == greedy(model, PROMPTS[0], 9)


# Prompts.


@pytest.mark.parametrize("source", [1, 3, 4])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[4]], [[4], [2]]], ids=len)
def test_a_prompt_runs_the_upper_blocks_for_its_last_token_only(
    make, monkeypatch, source, dtype, prompts
):
    model = make(source, (source,), dtype=dtype)
    decoder = ExitDecoder(model, model.make_cache(len(prompts), 9), batch_size=len(prompts))
    watched = Watched(model, monkeypatch)
    exits = decoder.prefill(prompts)
    assert watched.ran == [
        part
        for prompt in prompts  # one by one
        for part in ((0, source, len(prompt), 0), (source, LAYERS, 1, 0))
    ]
    assert decoder.cache.keys.shape[0] == decoder.cache.values.shape[0] == source + 1
    near = NEAR[dtype]
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        assert decoder.cache.lengths[:, row].tolist() == [len(prompt)] * (source + 1)
        assert_close(exits.logits[row], model(ids)[0, -1], rtol=near, atol=near)
        cache = model.make_cache(1, len(prompt))
        step = Step(positions=torch.arange(len(prompt))[None], cache=cache)
        model.run_layers(model.embed(ids, step=step), 0, LAYERS, step=step)
        part = slice(0, len(prompt))
        for found, expected in (
            (decoder.cache.keys, cache.keys),
            (decoder.cache.values, cache.values),
        ):
            assert_close(found[:, row, :, part], expected[:, 0, :, part], rtol=near, atol=near)


# Speculation.


@torch.inference_mode()
def greedy(model, prompt, new):
    """New tokens, by running the whole text for each."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("source", "draft_exit"), [(2, 1), (2, 2), (2, 3), (1, 1), (4, 4), (3, 4)])
@pytest.mark.parametrize("options", [{}, {"lookup": 2}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_speculation_is_decoding_without_drafts(make, source, draft_exit, options):
    model = make(source, (draft_exit,), dtype=torch.float32, exit_head="shared")
    with torch.no_grad():  # so that the exit is right now and then
        for block in model.model.layers[draft_exit:]:
            block.self_attn.o_proj.weight.mul_(0.4)
            block.mlp.down_proj.weight.mul_(0.4)
    drafting = {"speculative": True, "adaptive": False, "draft_threshold": 0.0, "lookup": 0}
    config = GenerateConfig(max_new_tokens=16, **{**drafting, **options})
    generation = generate(model, PROMPTS[0], config)
    ids = [token.id for token in generation]
    if "temperature" in options:
        plain = generate(model, PROMPTS[0], GenerateConfig(max_new_tokens=16, **options))
        assert ids == [token.id for token in plain]
    else:
        assert ids == greedy(model, PROMPTS[0], 16)
    assert 0 < generation.accepted < generation.drafted  # some drafts were taken back


@pytest.mark.parametrize(("source", "draft_exit"), [(3, 1), (2, 2), (1, 3)])
def test_drafts_at_a_perfect_exit_are_all_accepted(make, monkeypatch, source, draft_exit):
    """No block above the exit changes the state; no block runs twice for a token."""
    model = make(source, (draft_exit,), exit_head="shared")
    with torch.no_grad():
        for block in model.model.layers[draft_exit:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    config = GenerateConfig(
        max_new_tokens=13,
        speculative=True,
        adaptive=False,
        draft_threshold=0.0,
        max_drafts=3,
        lookup=0,
    )
    watched = Watched(model, monkeypatch)
    generation = generate(model, PROMPTS[0], config)
    ids, ran = [token.id for token in generation], watched.ran[2:]
    assert ids == greedy(model, PROMPTS[0], 13)
    assert generation.acceptance_rate == 1.0
    draft, verify = (0, draft_exit, 1, 0), (draft_exit, LAYERS, 4, 0)
    assert ran == 3 * ([draft] * 4 + [verify])
