import io

import pytest
from rich.console import Console

from offramp.report.bench import bench_table, summary_table
from offramp.report.bench_verdict import bench_verdict

BITS = {"float32": 32, "f32": 32, "int8": 8, "q8_0": 8}


def row(
    method,
    speedup,
    *,
    worst=None,
    layers=6.0,
    acceptance=None,
    identical=True,
    weights="float32",
    ppl=None,
):
    return {
        "method": method,
        "weights": weights,
        "bits": BITS[weights],
        "ppl": ppl,
        "first_token_s": 0.123,
        "share_of_limit": 0.876,
        "prefill_tokens_per_s": None,
        "tokens_per_s": {"median": 100 * speedup, "min": 90 * speedup, "max": 110 * speedup},
        "speedup_vs_hf": 2 * speedup,
        "speedup_vs_full": speedup,
        "speedup_vs_full_worst": speedup if worst is None else worst,
        "mean_layers": layers,
        "acceptance_rate": acceptance,
        "identical_to_greedy": identical,
        "predicted_tokens_per_s": None,
    }


FULL = row("full", 1.0)


def content(*rows):
    return {
        "rows": rows,
        "config": {
            "prompts": 4,
            "prompt_tokens": 64,
            "max_new_tokens": 64,
            "batch_size": 1,
            "repeats": 3,
            "ppl_tokens": 4096,
            "prefill_tokens": None,
        },
        "summary": [],
        "formats": {"float32": {"limit_tokens_per_s": 40.0}},
        "parts": {"block": {"share_of_bandwidth": 0.9}},
        "dtype": "float32",
        "bandwidth_gb_s": 20.0,
    }


def printed(table, width=80):
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


SLOW_EXIT = row("exit@0.9:propagate", 0.8, layers=3.6, identical=False)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [FULL, SLOW_EXIT, row("speculative@2", 1.6, acceptance=0.7)],
            "Speculative decoding is fastest here: 1.6 times full depth, with identical tokens. "
            "Confident exit at 60% of the layers (propagate) is slower than full depth "
            "(0.8 times): evaluating the exits costs more than the layers it saves.",
        ),
        (
            [
                FULL,
                row("exit@0.9:propagate", 1.3, worst=0.9, layers=4.2, identical=False),
                row("exit@0.9:recompute", 1.1, layers=4.2, identical=False),
                row("speculative@2", 0.9, acceptance=0.25),
            ],
            "Confident exit at 70% of the layers (propagate) is fastest here: 1.3 times full "
            "depth, with different tokens, but slower on at least one prompt. Speculative "
            "decoding is slower than full depth (0.9 times): 25% of the drafted tokens were "
            "accepted.",
        ),
        ([FULL, row("hf", 0.5)], "Full depth is fastest here."),
        (
            [row("hf", 1.2), FULL, row("speculative@2", 1.1, acceptance=0.5)],
            "Generate of transformers is fastest here: 1.2 times full depth, with identical "
            "tokens. Speculative decoding is 1.1 times full depth.",
        ),
        (
            [FULL, row("speculative@2", 0.9), row("exit@inf:recompute", 1.01)],
            "Full depth is fastest here. Speculative decoding is slower than full depth "
            "(0.9 times): it made no drafts, because they did not pay. Confident exit at 100% of "
            "the layers (recompute) is as fast as full depth.",
        ),
        (
            [
                row("full", 1.0, ppl=38.82),
                row("exit@-0.1:gain:propagate", 1.31, layers=3.6, identical=False, ppl=41.25),
                row("exit@0.9:propagate", 0.81, layers=3.6, identical=False, ppl=45.0),
                row("llama_cpp_f32", 0.97, ppl=38.82, weights="f32"),
                row("llama_cpp_q8_0", 1.9, ppl=38.9, weights="q8_0"),
            ],
            "Confident exit at 60% of the layers (gain, propagate) is fastest here: 1.31 times "
            "full depth, with different tokens and PPL 41.25 instead of 38.82. llama.cpp with "
            "f32 weights is slower than full depth (0.97 times). Confident exit at 60% of the "
            "layers (propagate) is slower than full depth (0.81 times): evaluating the exits costs "
            "more than the layers it saves.\n"
            "llama.cpp with q8_0 weights is 1.9 times full depth in float32, with PPL 38.9 instead "
            "of 38.82.",
        ),
        (
            [FULL, row("full", 1.0, weights="int8"), row("llama_cpp_q8_0", 0.7, weights="q8_0")],
            "float32: Full depth is fastest here.\n"
            "int8: Full depth is fastest here. llama.cpp with q8_0 weights is slower than full "
            "depth (0.7 times).",
        ),
    ],
)
def test_the_verdict_names_the_fastest_and_why_others_are_slow(rows, expected):
    assert bench_verdict(content(*rows)) == expected


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_drops_columns_and_no_letters(width):
    rows = (row("hf_prompt_lookup", 0.6), FULL, SLOW_EXIT, row("speculative@2", 1.6))
    text = printed(bench_table(content(*rows), width=width), width)
    assert max(map(len, text.splitlines())) <= width
    for whole in ("hf_prompt_lookup", "exit@0.9:propagate", "tokens/s", "160.0", "1.60"):
        assert whole in text
    assert ("144.0 to 176.0" in text) == (width == 200)
    assert ("range" in text.split("not shown for lack of width")[-1]) or width == 200


def test_rows_of_as_many_bits_are_in_one_section():
    rows = (
        row("full", 1.0, ppl=38.82),
        row("full", 1.0, weights="int8", ppl=38.9),
        row("llama_cpp_f32", 0.97, weights="f32", ppl=38.82),
        row("llama_cpp_q8_0", 0.7, weights="q8_0", ppl=12345.678),
    )
    lines = printed(bench_table(content(*rows), width=80)).splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    assert names[names.index("float32:") :][:6] == [
        *("float32:", "full", "llama_cpp_f32", "int8:", "full", "llama_cpp_q8_0")
    ]
    [last] = [line for line in lines if "q8_0" in line]
    assert last.split()[1:6] == ["70.0", "1.23e+04", "123", "ms", "88%"]


def test_the_ratios_fit_80_columns():
    ratio = {"weights": "int8", "ratio": 1.406, "low": 1.35, "high": 1.449, "prompts": 20}
    compared = [
        {"method": "full", "beside": "llama_cpp_q8_0", "of": "decoding", "nearly": 19},
        {"method": "full", "beside": "llama_cpp_q8_0", "of": "prefill", "nearly": 20},
        {"method": "exit@-0.02134:gain:propagate", "beside": "full", "of": "decoding", "nearly": 9},
    ]
    whole = content(FULL) | {"summary": [ratio | each for each in compared]}
    whole["formats"]["int8"] = {"limit_tokens_per_s": 150.0}
    whole["config"]["prefill_tokens"] = 512
    text = printed(summary_table(whole, width=80))
    assert max(map(len, text.splitlines())) <= 80
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "full int8 llama_cpp_q8_0 1.41 1.35 to 1.45 19 of 20" in rows
    assert "full int8, 512 tokens' prefill llama_cpp_q8_0 1.41 1.35 to 1.45 20 of 20" in rows
    assert "exit@-0.02134:gain:propagate int8 full 1.41 1.35 to 1.45 9 of 20" in rows
