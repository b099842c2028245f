"""A peer that fails in bench is named and left out; what was measured is kept and written."""

import json
from dataclasses import replace

import pytest
import torch

from offramp.commands.bench import rounds as bench_rounds
from offramp.commands.bench import run
from offramp.commands.bench.clocks import measure_clocks
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.methods import Method, Sample, hugging_face, plain_generation
from offramp.commands.bench.plan import Plan
from offramp.commands.bench.rounds import Rounds
from offramp.commands.bench.rows import Compared, rows_of
from offramp.commands.bench.run import time_tasks
from offramp.commands.bench.task import Task
from offramp.exits.gate import NOTHING_FITTED
from offramp.models.huggingface.model import HuggingFaceModel

CONFIG = BenchConfig(prompts=3, prompt_tokens=4, max_new_tokens=3, repeats=2, compute_pct=None)
PROMPTS = [[[1, 2, 3, 4]], [[2, 3, 4, 5]], [[3, 4, 5, 6]]]
GOOD = Sample(tokens=[[1, 2, 3]], seconds=0.5, first_seconds=0.1)


def peer(name, *samples, slow=False):
    """A peer that gives these samples in turn, then the last one again; an error is raised."""
    left = list(samples)

    def decode(batch):
        sample = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(sample, BaseException):
            raise sample
        return sample

    return Method(name=name, run=decode, slow=slow, foreign=True, weights="float32")


@pytest.fixture
def task(make_model):
    model = make_model(dtype=torch.float32, hidden_size=64)
    return Task(model=model, fitted=NOTHING_FITTED, config=CONFIG, prompts=PROMPTS)


@pytest.fixture
def rounds_with(task):
    def make(*peers, failed=(), on_run=lambda *_: None):
        return Rounds(task, plan_with(task, *peers, failed=failed), on_run=on_run)

    return make


def plan_with(task, *peers, failed=()):
    return Plan(methods=[*peers, task.method("full")], failed=dict(failed))


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    for module in (bench_rounds, run):
        monkeypatch.setattr(module, "measure_bandwidth", lambda *_, **__: 1e9)


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([IndexError("list index out of range")], "list index out of range"),
        ([GOOD, GOOD, RuntimeError("two\nlines")], "two lines"),
        ([GOOD, GOOD, GOOD, ValueError()], "ValueError"),
        ([SystemExit(1)], "1"),
        ([GOOD, MemoryError()], "MemoryError"),
        ([replace(GOOD, tokens=[[1, 2]])], "expected 3 new tokens for each of 1 prompts, got [2]"),
        ([replace(GOOD, tokens=[])], "expected 3 new tokens for each of 1 prompts, got []"),
        ([replace(GOOD, seconds=0.0)], "expected a duration above 0 s, got 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("slow", [False, True])
def test_a_peer_that_fails_is_left_out_and_the_others_are_kept(rounds_with, samples, why, slow):
    rounds = rounds_with(peer("hf", GOOD), peer("bad", *samples, slow=slow))
    told = []
    rounds.run(lambda: told.append(len(rounds.full[0].every)))
    assert rounds.failed == {"bad": why} or slow  # a slow peer has fewer turns
    assert rounds.failed.get("bad", why) == why
    names = [each.method.name for each in rounds.timed]
    assert names == (["hf", "full"] if rounds.failed else ["hf", "bad", "full"])
    assert [len(each.every) for each in rounds.timed if each.method.name != "bad"] == [6, 6]
    assert told == [1, 2, 3, 4, 5, 6]


def test_an_error_of_offramp_itself_is_not_swallowed(rounds_with):
    own = replace(peer("own", IndexError("ours")), foreign=False)
    with pytest.raises(IndexError, match="ours"):
        rounds_with(own).run(lambda: None)


def test_a_peer_with_other_tokens_is_not_called_identical(rounds_with, task):
    rounds = rounds_with(peer("hf", GOOD), peer("other", replace(GOOD, tokens=[[9, 9, 9]])))
    rounds.run(lambda: None)
    rows = {row.method: row for row in rows_with(task, rounds)}
    assert rows["full"].identical_to_greedy
    assert not rows["other"].identical_to_greedy


def rows_with(task, rounds):
    return rows_of(Compared.of(rounds.timed), {"float32": measure_clocks(task, 1e9)}, 3)


def test_results_come_after_each_round_and_ctrl_c_keeps_what_was_measured(task, monkeypatch):
    monkeypatch.setattr(run, "evaluated_at_full_depth", lambda _: {})
    plan = plan_with(task, peer("hf", GOOD), peer("bad", GOOD, GOOD, GOOD, OSError("gone")))
    contents = []

    def keep(content):
        contents.append(json.loads(json.dumps(content)))

    done = time_tasks([task], plan, on_run=lambda *_: None, on_round=keep)
    assert [content["unfinished"] for content in contents] == [True] * 6
    assert not done["unfinished"]
    runs = [{row["method"]: row["runs"] for row in content["rows"]} for content in contents]
    assert runs[0] == {"hf": 1, "bad": 1, "full": 1}
    assert runs[-1] == {"hf": 6, "full": 6}
    assert done["failed"] == contents[-1]["failed"] == {"bad": "gone"}

    def interrupt(count, total, name):
        if count == 4:
            raise KeyboardInterrupt

    contents.clear()
    plan = plan_with(task, peer("hf", GOOD))
    with pytest.raises(KeyboardInterrupt):
        time_tasks([task], plan, on_run=interrupt, on_round=keep)
    [*_, last] = contents
    assert last["unfinished"]
    assert {row["method"]: row["runs"] for row in last["rows"]} == {"hf": 2, "full": 2}


def test_a_failing_assistant_of_transformers_leaves_the_model_as_it_was():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_embd=16, n_layer=3, n_head=2, n_positions=32, eos_token_id=None
    )
    torch.manual_seed(0)
    model = HuggingFaceModel(transformers.AutoModelForCausalLM.from_config(config).eval())
    lm = plain_generation(model.to_transformers())
    before = dict(vars(lm.config))
    method = hugging_face("hf_early_exit@1", lm, 4, slow=True, assistant_early_exit=1)
    with pytest.raises(IndexError):
        method.run([[1, 2, 3]])
    assert vars(lm.config) == before
    assert lm.config.num_hidden_layers == 3
