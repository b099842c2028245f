"""Every way to decode, timed in one run."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest

from offramp.commands.bench import clocks as clocks_module
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
        assert row["ppl"] > 1
        assert (row["predicted_tokens_per_s"] is None) == row["method"].startswith("hf")
    assert rows["hf"]["ppl"] == pytest.approx(rows["full"]["ppl"], rel=1e-4)
    assert rows["exit@inf:recompute"]["ppl"] == rows["full"]["ppl"] == rows["speculative@2"]["ppl"]
    assert rows["exit@0.3:propagate"]["ppl"] > rows["full"]["ppl"]
    assert rows["hf"]["bytes_per_token"] == rows["full"]["bytes_per_token"]
    assert rows["hf"]["speedup_vs_hf"] == rows["full"]["speedup_vs_full"] == 1.0
    assert "fastest here" in result.stdout
    assert content["limit_tokens_per_s"] > 0
    assert content["bandwidth_gb_s"] > 0


@pytest.mark.slow
def test_every_format_has_its_rows_by_gain_and_max_prob(offramp, checkpoint, native, tmp_path):
    fitted, out = tmp_path / "fitted", tmp_path / "bench.json"
    shutil.copytree(native, fitted)
    text = checkpoint / "text.txt"
    result = offramp("confidence", fitted, "--corpus", text, "--fit", text)
    assert result.returncode == 0, result.stderr
    result = offramp(
        *("bench", fitted, "--corpus", text, "--out", out, *SHORT, "--no-peers"),
        *("--weights", "int8,float32", "--prefill-tokens", 40, "--ppl-tokens", 500),
    )
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    assert list(content["formats"]) == ["int8", "float32"]
    for weights in ("int8", "float32"):
        rows = [row for row in content["rows"] if row["weights"] == weights]
        kinds = [re.sub(r"@[^:]*", "@X", row["method"]) for row in rows]
        assert kinds == [
            *("full", "exit@X:gain:propagate", "exit@X:gain:recompute", "exit@X:propagate"),
            "speculative@X",
        ]
        full, *_, drafts = rows
        assert full["prefill_tokens_per_s"] > 0
        assert drafts["prefill_tokens_per_s"] is None
        assert full["ppl"] == drafts["ppl"]
        assert len({row["ppl"] for row in rows[:2]}) == 2
        for row in rows:
            assert 1 < row["ppl"] < 1000
            assert row["first_token_s"] > 0
            assert row["share_of_limit"] > 0
            assert row["speedup_vs_full"] > 0
            layers = row["bytes_per_token"] / full["bytes_per_token"]
            assert layers == 1 if row is full else layers < 1.5
    wide, narrow = (next(r for r in content["rows"] if r["bits"] == bits) for bits in (32, 8))
    assert 2.5 < wide["bytes_per_token"] / narrow["bytes_per_token"] < 4
    assert len(content["summary"]) == 8
    assert {row["beside"] for row in content["summary"]} == {"full"}
    assert {row["prompts"] for row in content["summary"]} == {2}
    assert "float32: " in result.stdout
    assert "int8: " in result.stdout
    assert max(map(len, result.stdout.split("ratio of median")[0].splitlines())) <= 80


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

    monkeypatch.setattr(clocks_module, "measure_clock", timed)
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
        (["--weights", "int3"], ["weights", "float32", "'int3'"]),
        (["--weights", "float32,float32"], ["weights", "each format once"]),
        (["--weights", "float32", "--dtype", "bfloat16"], ["dtype", "--weights", "bfloat16"]),
        (["--llama-cpp", "q3_k"], ["llama_cpp", "q8_0", "'q3_k'"]),
        (["--gguf", "nowhere.gguf", "--no-peers"], ["gguf", "without peers", "nowhere.gguf"]),
        (["--gguf", "nowhere.gguf"], ["gguf"]),  # no package, or no file
        (["--prefill-tokens", 0], ["prefill_tokens", "at least 1"]),
        (["--prefill-tokens", 5000], ["prefill_tokens", "at most 4096", "5000"]),
        (["--ppl-tokens", -1], ["ppl_tokens", "at least 0"]),
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

    monkeypatch.setattr(run, "evaluated_at_full_depth", interrupt)
    result = offramp(*command)
    assert result.returncode == 130
    assert "Stopped before the end" in result.stderr
    assert "speculative@1" in result.stdout
    content = json.loads(out.read_text())
    assert content["unfinished"]
    assert [row["method"] for row in content["rows"]] != []
