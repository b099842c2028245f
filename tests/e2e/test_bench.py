"""Every way to decode, timed in one run."""

import json
import sys
from dataclasses import replace

import pytest

from offramp.commands.bench import run
from offramp.commands.bench.config import BenchConfig
from offramp.evaluation.timer import measure_clock
from offramp.models.open import open_model


@pytest.fixture(scope="module")
def native(offramp, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "model"
    result = offramp(
        *("train", "--corpus", checkpoint / "text.txt", "--layers", 4, "--dim", 32, "--heads", 4),
        *("--exits", 2, "--steps", 20, "--seq-len", 32, "--batch-size", 8, "--out", out),
        *("--loss-weights", "2=0.5,4=0.5", "--tracker", "none"),
    )
    assert result.returncode == 0, result.stderr
    return out


SHORT = ("--prompt-tokens", 8, "--max-new-tokens", 8, "--repeats", 1, "--prompts", 2)


@pytest.mark.slow
def test_a_native_model_beside_transformers(offramp, checkpoint, native, tmp_path):
    out = tmp_path / "bench.json"
    result = offramp(
        *("bench", native, "--corpus", checkpoint / "text.txt", "--out", out, *SHORT),
        *("--thresholds", "0.3,inf"),
    )
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert {"hf", "hf_prompt_lookup", "hf_early_exit@2", "full", "speculative@2"} < set(rows)
    kinds = {name.rpartition(":")[2] for name in rows if name.startswith("exit@")}
    assert kinds == {"propagate", "recompute"}
    for name in ("hf", "hf_prompt_lookup", "full", "speculative@2", "exit@inf:recompute"):
        assert rows[name]["identical_to_greedy"], name
    assert rows["full"]["mean_layers"] == rows["exit@inf:propagate"]["mean_layers"] == 4.0
    assert rows["exit@0.3:propagate"]["mean_layers"] < 4.0
    for row in rows.values():
        rate = row["tokens_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert (row["predicted_tokens_per_s"] is None) == row["method"].startswith("hf")
    assert rows["hf"]["speedup_vs_hf"] == rows["full"]["speedup_vs_full"] == 1.0
    assert "fastest here" in result.stdout
    assert content["limit_tokens_per_s"] > 0
    assert content["bandwidth_gb_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("disturbed", [0, 1])
def test_parts_timed_while_other_work_ran_are_timed_again(
    checkpoint, native, monkeypatch, disturbed
):
    clocks = []

    def timed(*args, **about):
        clock = measure_clock(*args, **about)
        if len(clocks) == disturbed:
            block = replace(clock.block, seconds=dict.fromkeys(clock.block.seconds, 9.0))
            clock = replace(clock, block=block)
        clocks.append(clock)
        return clock

    monkeypatch.setattr(run, "measure_clock", timed)
    config = BenchConfig(prompts=1, prompt_tokens=8, max_new_tokens=4, repeats=1)
    content = run.run_bench(open_model(native), str(checkpoint / "text.txt"), config)
    undisturbed = clocks[1 - disturbed].block.seconds[1]
    assert content["parts"]["block"]["ms"]["1"] == 1000 * undisturbed < 9000


@pytest.mark.slow
def test_a_batch_of_a_pretrained_model_in_bfloat16(offramp, checkpoint, tmp_path):
    out = tmp_path / "bench.json"
    result = offramp(
        *("bench", checkpoint, "--corpus", checkpoint / "text.txt", "--out", out, *SHORT),
        *("--batch-size", 2, "--dtype", "bfloat16"),
    )
    assert result.returncode == 0, result.stderr
    assert "never trained" in result.stderr
    names = [row["method"] for row in json.loads(out.read_text())["rows"]]
    assert names[:2] == ["hf", "full"]
    assert len(names) == 4
    assert not any("speculative" in name or "early_exit" in name for name in names)


@pytest.mark.slow
def test_a_peer_that_does_not_fit_is_named_and_left_out(
    offramp, checkpoint, native, tmp_path, monkeypatch
):
    techniques = tmp_path / "economize" / "techniques"
    techniques.mkdir(parents=True)
    (tmp_path / "economize" / "__init__.py").write_text(
        "class Model:\n"
        "    def generate(self, ids, **options):\n"
        "        raise RuntimeError('no such transformers')\n"
        "def apply(lm, config):\n"
        "    return Model()\n"
    )
    (techniques / "__init__.py").write_text("")
    for module, config in (("dynamic_depth", "CalmConfig"), ("early_exit", "EarlyExitConfig")):
        (techniques / f"{module}.py").write_text(f"class {config}(dict): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "bench.json"
    result = offramp("bench", native, "--corpus", checkpoint / "text.txt", "--out", out, *SHORT)
    for name in [name for name in sys.modules if name.startswith("economize")]:
        del sys.modules[name]
    assert result.returncode == 0, result.stderr
    assert "economize_early_exit@2 does not run here: no such transformers" in result.stderr
    content = json.loads(out.read_text())
    assert [name.split("@")[0] for name in content["failed"]] == [
        "economize_early_exit",
        "economize_calm",
    ]
    assert "speculative@2" in [row["method"] for row in content["rows"]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompts", 3, "--batch-size", 2], ["batch_size", "3 prompts"]),
        (["--max-new-tokens", 1], ["max_new_tokens", "at least 2"]),
        (["--max-new-tokens", 5000], ["max_new_tokens", "longest"]),
        (["--prompt-tokens", 100000], ["expected at least 100000 tokens"]),
        (["--confidence", "mood"], ["confidence", "mood"]),
        (["--compute-pct", 0], ["compute_pct", "between 0 and 100"]),
        (["--draft-exit", 3], ["draft_exit", "3"]),
    ],
)
def test_bench_refuses(offramp, checkpoint, native, tmp_path, flags, expected):
    out = tmp_path / "bench.json"
    result = offramp("bench", native, "--corpus", checkpoint / "text.txt", "--out", out, *flags)
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1, result.stderr
    for part in expected:
        assert part in result.stderr, result.stderr
    assert not out.exists()


@pytest.mark.slow
def test_gpt2_whose_peer_in_transformers_fails_is_timed_without_it(
    offramp, checkpoint, tmp_path, monkeypatch
):
    """Its early-exit assistant raises an IndexError. Ctrl-C keeps the table and the file."""
    transformers = pytest.importorskip("transformers")
    folder, out = tmp_path / "gpt2", tmp_path / "bench.json"
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, eos_token_id=None
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    command = ("bench", folder, "--corpus", checkpoint / "text.txt", "--out", out, *SHORT)
    result = offramp(*command)
    assert result.returncode == 0, result.stderr
    assert "hf_early_exit@1 does not run here: list index out of range" in result.stderr
    content = json.loads(out.read_text())
    assert list(content["failed"]) == ["hf_early_exit@1"]
    names = [row["method"] for row in content["rows"]]
    assert {"hf", "hf_prompt_lookup", "full", "speculative@1"} < set(names)
    assert not content["unfinished"]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_evaluated_at_full_depth", interrupt)
    result = offramp(*command)
    assert result.returncode == 130
    assert "Stopped before the end" in result.stderr
    assert "speculative@1" in result.stdout
    content = json.loads(out.read_text())
    assert content["unfinished"]
    assert [row["method"] for row in content["rows"]] != []
