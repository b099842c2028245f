import gc
import itertools
import math
import tracemalloc

import pytest
import torch
import torch.nn.functional as F

from offramp.data.tokenizer import byte_tokenizer, character_tokenizer
from offramp.errors import ConfigError, GenerationError
from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.confident_exit import ExitRule
from offramp.generation.config import GenerateConfig
from offramp.generation.forced import forced_exits
from offramp.generation.generate import generate, generate_batch
from offramp.generation.lookup import Lookup

PROMPT = [3, 1, 4]
MODES = [
    {},
    {"threshold": 0.3, "missing_kv": "propagate"},
    {"threshold": 0.3, "missing_kv": "recompute"},
    {"speculative": True, "draft_threshold": -1.0, "adaptive": False},
]


@pytest.fixture
def model(make_model):
    return make_model(num_hidden_layers=4, exit_layers=(1, 2))


def ids(model, prompt=PROMPT, **options):
    return [token.id for token in generate(model, prompt, GenerateConfig(**options))]


# How it ends.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("new", [1, 2, 7])
def test_no_more_tokens_come_than_were_asked_for(model, mode, new):
    generation = generate(model, PROMPT, GenerateConfig(max_new_tokens=new, **mode))
    assert len(list(generation)) == new
    assert generation.completion.finish_reason == "length"


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_token_is_the_last_and_has_no_text(model, mode):
    tokenizer = character_tokenizer("abcdefghijkl")
    whole = ids(model, max_new_tokens=20, **mode)
    stop = next(token for token in whole if token != whole[0])
    config = GenerateConfig(max_new_tokens=20, stop_tokens=(stop,), **mode)
    generation = generate(model, PROMPT, config, tokenizer=tokenizer)
    tokens = list(generation)
    assert [token.id for token in tokens] == whole[: whole.index(stop) + 1]
    assert tokens[-1].text == ""
    assert generation.completion.finish_reason == "stop_token"
    assert generation.completion.text == tokenizer.decode(whole[: whole.index(stop)])


@pytest.mark.parametrize("mode", MODES)
def test_text_ends_before_a_stop_string(model, mode):
    tokenizer = character_tokenizer("abcdefghijkl")
    text = tokenizer.decode(ids(model, max_new_tokens=20, **mode))
    stop = text[4:6]
    config = GenerateConfig(max_new_tokens=20, stop_strings=(stop,), **mode)
    generation = generate(model, PROMPT, config, tokenizer=tokenizer)
    list(generation)
    assert generation.completion.text == text[: text.index(stop)]
    assert generation.completion.finish_reason == "stop_string"


@pytest.mark.parametrize("mode", MODES)
def test_a_full_context_ends_the_text(make_model, mode):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2), max_position_embeddings=10)
    assert len(ids(model, [3] * 6, max_new_tokens=50, **mode)) == 5  # the last is not read again
    assert len(ids(model, [3] * 10, max_new_tokens=50, **mode)) == 1


# A threshold that decays.


@pytest.mark.parametrize("prompt", [PROMPT, [9, 2, 5, 0, 1, 6]])
def test_a_decaying_threshold_is_the_formulas_at_every_new_token(model, prompt):
    theta, tau, new = 0.2, 3.0, 24
    config = GenerateConfig(max_new_tokens=new, threshold=theta, decay=tau, missing_kv="recompute")
    tokens = list(generate(model, prompt, config))[1:]  # the first is the prompt's own
    text = torch.tensor([[*prompt, *ids(model, prompt, **vars(config))]])
    by_layer = model.forward_all_layers(text)
    decided = set()
    for t, token in enumerate(tokens):
        bound = 0.9 * theta + 0.1 * math.exp(-tau * t / new)
        place = len(prompt) + t
        scores = [by_layer[layer - 1][0, place].softmax(-1).max().item() for layer in (1, 2)]
        expected = next((n + 1 for n, score in enumerate(scores) if score >= bound), 4)
        assert token.exit_layer == expected
        decided |= {score < bound for score in scores if score >= 0.9 * theta}
    assert decided == {True, False}  # or the decay would have changed nothing


def test_without_decay_over_time_a_row_of_a_batch_has_the_same_threshold(model):
    prompts = [PROMPT, [7, 2, 6, 8, 1]]
    options = {"max_new_tokens": 12, "missing_kv": "recompute"}
    flat = GenerateConfig(threshold=0.9 * 0.2 + 0.1, **options)
    decaying = GenerateConfig(threshold=0.2, decay=0.0, **options)
    expected, got = (generate_batch(model, prompts, config)[0] for config in (flat, decaying))
    assert [each.tokens for each in got] == [each.tokens for each in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 4.0}, "^decay: expected a threshold too"),
        ({"decay": -1.0, "threshold": 0.5}, "^decay: expected a number of at least 0, got -1"),
        ({"decay": math.nan, "threshold": 0.5}, "^decay: .* got nan"),
        ({"decay": 4.0, "threshold": 1.5}, "^decay: expected thresholds from 0 to 1.* got 1.5"),
        ({"decay": 4.0, "threshold": (0.5, -0.1)}, "^decay: expected thresholds .* got -0.1"),
    ],
)
def test_a_decay_that_could_do_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**options)


def test_a_policy_takes_no_decay(model):
    config = GenerateConfig(threshold=0.5, decay=4.0)
    with pytest.raises(ConfigError, match=r"^decay: expected none with a policy"):
        generate(model, PROMPT, config, policy=ThresholdPolicy.of(0.5, 3))


# What it costs.


@pytest.mark.parametrize("beside", [False, True], ids=["pending before", "pending beside"])
def test_mean_layers_count_every_layer_that_ran(make_model, beside):
    dtype = torch.float32 if beside else torch.float64
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2), hidden_size=64, dtype=dtype)
    if beside and not model.fills_beside(2):
        pytest.skip("the kernels were not built")
    ran = []
    run_layers = model.run_layers

    def counted(h, start, stop, *, step, active=None):
        real = h.shape[0] * h.shape[1] if step.real is None else int(step.real.sum())
        real = real if active is None else int(active.sum())
        ran.append((stop - start) * real)
        return run_layers(h, start, stop, step=step, active=active)

    model.run_layers = counted
    model.router = lambda cache, spec: None  # which does not call run_layers
    for mode in [{"threshold": 0.3, **kv} for kv in ({"missing_kv": "recompute"}, {})] + MODES:
        for prompts in ([PROMPT], [PROMPT, [5], [7, 2, 6, 8]]):
            if mode.get("speculative") and len(prompts) > 1:
                continue
            ran.clear()
            config = GenerateConfig(max_new_tokens=15, **mode)
            if len(prompts) == 1:
                generation = generate(model, PROMPT, config)
                count, mean = len(list(generation)), generation.mean_layers
            else:
                completions, work = generate_batch(model, prompts, config)
                run = work.layers_run + len(prompts) * model.num_layers
                mean = run / sum(len(found.tokens) for found in completions)
                count = sum(len(completion.tokens) for completion in completions)
            new = ran[len(prompts) :]  # after the prompts
            assert mean == pytest.approx((sum(new) + 4 * len(prompts)) / count)


def test_full_depth_is_every_layer_once(model):
    generation = generate(model, PROMPT, GenerateConfig(max_new_tokens=9))
    list(generation)
    assert generation.mean_layers == 4.0


def test_tokens_that_leave_early_run_no_layer_above(model):
    everyone = {"threshold": -math.inf, "max_new_tokens": 11}
    for missing_kv in ("propagate", "recompute"):
        config = GenerateConfig(missing_kv=missing_kv, **everyone)
        generation = generate(model, PROMPT, config)
        assert [token.exit_layer for token in generation] == [4] + [1] * 10
        assert generation.mean_layers == (4 + 10) / 11


def test_a_measure_without_logits_asks_the_head_only_of_those_that_leave(model):
    asked = []
    unembed = model.unembed

    def counted(h, exit_layer, *, vocab=None):
        asked.append(exit_layer)
        return unembed(h, exit_layer, vocab=vocab)

    model.unembed = counted
    config = GenerateConfig(max_new_tokens=20, threshold=0.6, confidence="saturation")
    tokens = list(generate(model, PROMPT, config))
    assert asked == [token.exit_layer for token in tokens]


def test_gates_and_policies_of_gain_decide(model):
    torch.manual_seed(0)
    gates = {
        "gain": {1: Gate(16, outputs=2).double(), 2: Gate(16).double()},
        "gate": {1: Gate(16).double(), 2: Gate(16).double()},
    }
    fitted = FittedExits(gates=gates)
    config = GenerateConfig(max_new_tokens=9, confidence="gain", missing_kv="recompute")
    seen = set()
    for price in (0.0, 0.004, 10.0):
        policy = GainPolicy(price=price, costs=(25.0, 50.0, 100.0))
        tokens = list(generate(model, PROMPT, config, policy=policy, fitted=fitted))
        seen.update(token.exit_layer for token in tokens[1:])
        if price != 0.004:
            assert {token.exit_layer for token in tokens[1:]} == {4 if price == 0 else 1}
    always = GenerateConfig(max_new_tokens=9, confidence="gate", threshold=0.0)
    assert {t.exit_layer for t in list(generate(model, PROMPT, always, fitted=fitted))[1:]} == {1}


def test_temperatures_of_exits_change_confidence_but_no_choice(model):
    rule = ExitRule(policy=ThresholdPolicy(thresholds=(0.4, 0.4)))
    text = torch.tensor([[1, 5, 2, 7, 3, 9, 4]])
    _, layers = forced_exits(model, text, rule)
    hot = ExitRule(policy=rule.policy, fitted=FittedExits(temperatures={1: 50.0, 2: 50.0}))
    _, hotter = forced_exits(model, text, hot)
    assert (hotter == 4).all()
    assert (layers < 4).any()


# Bad input: one sentence each.


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "^prompt: expected at least 1 token, got none$"),
        ([1] * 65, {}, "^prompt: expected at most 64 tokens, the model's longest sequence, got 65"),
        ([13], {}, "^prompt: expected token ids from 0 to 12, got 13$"),
        ([-1], {}, "^prompt: expected token ids from 0 to 12, got -1$"),
        (PROMPT, {"stop_tokens": (99,)}, "^stop_tokens: expected token ids from 0 to 12, got 99$"),
        (PROMPT, {"stop_strings": ("a",)}, "^stop_strings: expected a tokenizer"),
        (PROMPT, {"threshold": (0.5,)}, "^thresholds: expected 2, one for each exit but the last"),
        (PROMPT, {"threshold": math.nan}, "^threshold: expected a number, got nan$"),
        (PROMPT, {"speculative": True, "draft_exit": 4}, "expected one of the exits 1, 2, got 4"),
        (
            PROMPT,
            {"threshold": 0.5, "confidence": "gate"},
            "expected a fitted gate at exit layer 1, found none",
        ),
        (
            PROMPT,
            {"speculative": True, "confidence": "gain"},
            "expected a fitted gain at exit layer 1, found none",
        ),
        (
            PROMPT,
            {"speculative": True, "confidence": "patience"},
            "^confidence: expected a measure that reads only one exit for drafts, got 'patience'$",
        ),
    ],
)
def test_what_the_model_cannot_follow_is_one_sentence(make_model, prompt, options, message):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2), max_position_embeddings=64)
    with pytest.raises(ConfigError, match=message):
        generate(model, prompt, GenerateConfig(**options))
    if not options.get("speculative"):
        with pytest.raises(ConfigError, match=message):
            generate_batch(model, [PROMPT, prompt], GenerateConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "^max_new_tokens: expected at least 1, got 0$"),
        ({"max_drafts": 0}, "^max_drafts: expected from 1 to 15, got 0$"),
        ({"missing_kv": "forget"}, "^missing_kv: expected propagate or recompute, got 'forget'$"),
        ({"confidence": "mood"}, "^confidence: expected one of max_prob, .* got 'mood'$"),
        ({"stop_strings": ("",)}, "^stop_strings: expected strings of at least 1 character"),
        ({"draft_threshold": math.nan}, "^draft_threshold: expected a number, got nan$"),
        ({"speculative": True, "threshold": 0.5}, "^threshold: expected none with speculative"),
    ],
)
def test_options_out_of_range_are_one_sentence(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**options)


def exits_of(model, **options):
    generation = generate(model, PROMPT, GenerateConfig(max_new_tokens=20, **options))
    tokens = [(token.id, token.exit_layer) for token in generation]
    return tokens, generation.missing_kv


def test_complete_exits_need_no_choice_and_say_exact(make_model):
    model = make_model(num_hidden_layers=5, exit_layers=(2, 3), kv_source_layer=2)
    found = [
        exits_of(model, threshold=(0.3, 0.2), **kv)
        for kv in ({}, *({"missing_kv": kv} for kv in ("propagate", "recompute", "exact")))
    ]
    tokens, meaning = found[0]
    assert meaning == "exact"
    assert {layer for _, layer in tokens} >= {2, 3}
    assert all(each == (tokens, "exact") for each in found)
    assert exits_of(model)[1] is None
    assert exits_of(model, missing_kv="exact")[1] is None  # no token can leave
    assert exits_of(model, speculative=True)[1] is None


def test_exits_below_the_source_keep_the_choice(make_model):
    model = make_model(num_hidden_layers=5, exit_layers=(1, 3), kv_source_layer=2)
    assert exits_of(model, threshold=0.3)[1] == "propagate"
    assert exits_of(model, threshold=0.3, missing_kv="recompute")[1] == "recompute"
    unused = exits_of(model, threshold=(math.inf, 0.2), missing_kv="recompute")
    assert unused[1] == "exact"
    assert unused == exits_of(model, threshold=(math.inf, 0.2), missing_kv="exact")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (2, "exit 1 is below layer 2, from which exits are complete"),
        (None, "the model has no complete exits"),
    ],
)
def test_exact_is_refused_where_an_exit_is_not_complete(make_model, source, why):
    model = make_model(num_hidden_layers=5, exit_layers=(1, 3), kv_source_layer=source)
    config = GenerateConfig(threshold=0.5, missing_kv="exact")
    message = f"^missing_kv: expected propagate or recompute, since {why}, got exact$"
    with pytest.raises(ConfigError, match=message):
        generate(model, PROMPT, config)
    with pytest.raises(ConfigError, match=message):
        generate_batch(model, [PROMPT], config)


@pytest.mark.parametrize("options", [{}, {"speculative": True}])
def test_exact_is_refused_without_complete_exits_also_if_no_token_leaves(make_model, options):
    model = make_model(num_hidden_layers=5, exit_layers=(1, 3))
    with pytest.raises(ConfigError, match=r"since the model has no complete exits, got exact$"):
        generate(model, PROMPT, GenerateConfig(missing_kv="exact", **options))
    assert exits_of(model, missing_kv="recompute", **options)[1] is None


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"speculative": True}])
def test_exits_are_asked_of_a_model_without_any(make_model, options):
    model = make_model(exit_layers=())
    with pytest.raises(ConfigError, match="expected a model with an exit before its last layer"):
        generate(model, PROMPT, GenerateConfig(**options))


def test_a_batch_is_not_empty_and_not_speculative(model):
    with pytest.raises(ConfigError, match=r"^prompts: expected at least 1, got none$"):
        generate_batch(model, [])
    with pytest.raises(ConfigError, match=r"^speculative: expected one prompt at a time"):
        generate_batch(model, [PROMPT], GenerateConfig(speculative=True))
    policy = ThresholdPolicy(thresholds=(0.5, 0.5))
    with pytest.raises(ConfigError, match=r"^policy: expected none with speculative"):
        generate(model, PROMPT, GenerateConfig(speculative=True), policy=policy)


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_numbers_are_one_sentence(model, mode):
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(
        GenerationError, match=r"^logits.*: expected finite numbers for new token 1,"
    ):
        ids(model, **mode)


# Nothing is left behind.


@pytest.mark.parametrize("mode", MODES)
def test_after_a_failure_or_a_stop_everything_is_as_before(model, mode, monkeypatch):
    expected = ids(model, max_new_tokens=15, **mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generation = generate(model, PROMPT, GenerateConfig(max_new_tokens=15, **mode))
    assert [token.id for token in itertools.islice(generation, 4)] == expected[:4]
    silu = F.silu
    for failing_call in (1, 2, 7, 18):
        calls = itertools.count(1)

        def fail(x, last=failing_call, calls=calls):
            if next(calls) >= last:
                raise KeyboardInterrupt
            return silu(x)

        with monkeypatch.context() as patch:
            patch.setattr(F, "silu", fail)
            with pytest.raises(KeyboardInterrupt):
                ids(model, max_new_tokens=15, **mode)
        assert not torch.is_inference_mode_enabled()
        assert ids(model, max_new_tokens=15, **mode) == expected
    assert [token.id for token in generation] == expected[4:]  # the other one goes on
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_can_be_trained_after_it_has_generated(model):
    ids(model)
    model(torch.tensor([PROMPT])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_memory_does_not_grow_with_the_number_of_calls(model, mode):
    config = GenerateConfig(max_new_tokens=12, **mode)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    list(generate(model, PROMPT, config))
    count = tensors()
    tracemalloc.start()
    for _ in range(10):  # Python keeps some freed objects for reuse
        list(generate(model, PROMPT, config))
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    for _ in range(10):
        list(generate(model, PROMPT, config))
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensors() == count
    assert grown - size < 20_000


def test_an_interrupted_generation_leaves_no_inference_mode_to_its_reader(model):
    generation = generate(model, PROMPT, GenerateConfig(max_new_tokens=5))
    next(generation)
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1, requires_grad=True).sum().requires_grad


def test_text_streams_as_it_comes(make_model):
    model = make_model(vocab_size=256)
    tokenizer = byte_tokenizer()
    config = GenerateConfig(max_new_tokens=30, temperature=1.5)
    generation = generate(model, tokenizer.encode("ä").ids, config, tokenizer=tokenizer)
    tokens = list(generation)
    assert generation.completion.text == tokenizer.decode([token.id for token in tokens])


# Drafts from the text before.


def after(size, text):
    lookup = Lookup(size)
    for token in text:
        lookup.push(token)
    return lookup


def test_what_followed_the_last_tokens_is_the_draft():
    lookup = after(2, [1, 2, 3, 4, 1, 2])
    assert lookup.drafts(5) == [3, 4, 1, 2, 3]
    assert lookup.drafts(1) == [3]
    lookup.push(9)
    assert lookup.drafts(5) == []
    for token in (1, 2):
        lookup.push(token)
    assert lookup.drafts(2) == [9, 1]  # where they stood last
    assert after(0, [1, 1, 1]).drafts(5) == []
    assert after(3, [1, 1]).drafts(5) == []


def test_a_text_that_repeats_itself_drafts_itself(make_model):
    """A model that says one token for ever: every draft from the text is right."""
    model = make_model(num_hidden_layers=3, exit_layers=(1,))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    options = {"speculative": True, "adaptive": False, "max_new_tokens": 21, "max_drafts": 4}
    generation = generate(model, [0, 0, 0], GenerateConfig(**options, draft_threshold=math.inf))
    assert [token.id for token in generation] == [0] * 21
    assert generation.acceptance_rate == 1.0
    assert generation.work.blocks == {5: 4 * 3}  # four rounds of five tokens at once
    generation = generate(
        model, [0, 0, 0], GenerateConfig(**options, draft_threshold=math.inf, lookup=0)
    )
    assert [token.id for token in generation] == [0] * 21
    assert generation.acceptance_rate is None
