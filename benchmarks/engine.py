"""Time the engine for many requests: rows, exits by gain, rows that wait, memory, cancelling.

    python benchmarks/engine.py MODEL TEXT [ROUNDS]

MODEL has exits and fitted gates (``offramp tune`` fits them). Prompts of 64 tokens come from TEXT,
and 64 new tokens follow. All ways are timed in turn, ROUNDS (default 9) times; the table has the
medians of tokens/s after all prompts have run, and of the ratio to full depth with 8 rows in the
same round. The threshold of the exits is that at which at most 65% of the layers run.
"Step by step" decodes without the router of the compiled kernels, as rows that wait do; so that
row and those with max_wait show what waiting changes. "Reads" are the blocks whose weights are
read, for each token of a row. Then 2,000 short requests run, and the memory of the process is
printed after each 500.
"""

import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import offramp
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine

ROWS, PROMPT, NEW, SHARE = 8, 64, 64, 0.65
WAITS = (1, 2, 4, 8)
STEPS = "gain, 8 rows, step by step"


def decode(
    lm: Any,
    prompts: list[list[int]],
    config: GenerateConfig,
    max_wait: int = 0,
    *,
    routed: bool = True,
) -> tuple[float, float, float]:
    """Return (tokens a second, mean layers, reads) of the prompts, once all have run."""
    slots = EngineConfig(
        slots=len(prompts), capacity=PROMPT + NEW, prefill_tokens=None, max_wait=max_wait
    )
    router = lm.model.router
    if not routed:
        lm.model.router = lambda cache, spec: None
    engine = Engine(lm.model, slots, fitted=lm._opened.fitted)
    requests = [engine.submit(prompt, config) for prompt in prompts]
    engine.step()  # the prompts
    start = time.perf_counter()
    for _ in engine.run():
        pass
    seconds = time.perf_counter() - start
    lm.model.router = router
    tokens = sum(len(request.completion.tokens) - 1 for request in requests)
    reads = sum(engine.work.blocks.values())
    return tokens / seconds, engine.work.layers_run / tokens, reads / tokens


def threshold(lm: Any, prompts: list[list[int]]) -> float:
    """Return the largest threshold of gain (in nats, below 0) with at most SHARE of the layers."""
    low, high = -8.0, 0.0
    for _ in range(8):
        middle = (low + high) / 2
        if decode(lm, prompts, by_gain(middle))[1] > SHARE * lm.num_layers:
            high = middle
        else:
            low = middle
    return low


def by_gain(bound: float) -> GenerateConfig:
    """Return the config of exits by gain."""
    return GenerateConfig(max_new_tokens=NEW, threshold=bound, confidence="gain")


def memory(lm: Any, prompts: list[list[int]]) -> None:
    """Run 2,000 requests, cancel every tenth, and print the memory of the process."""
    engine = Engine(lm.model, EngineConfig(slots=ROWS, capacity=32), fitted=lm._opened.fitted)
    done, slowest = 0, 0.0
    while done < 2000:
        while len(engine.requests) < 2 * ROWS:
            done += 1
            request = engine.submit(prompts[done % ROWS][:8], GenerateConfig(max_new_tokens=4))
            if done % 10 == 0:
                start = time.perf_counter()
                engine.cancel(request)
                slowest = max(slowest, time.perf_counter() - start)
            if done % 500 == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{done:,} requests: at most {peak:,.0f} MiB, cache {engine.cache_bytes:,} B")
        engine.step()
    print(f"slowest cancel: {1e6 * slowest:.0f} microseconds")


def main() -> None:
    """Print the table and the memory."""
    lm = offramp.load(sys.argv[1])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 9
    ids = lm.tokenizer.encode(Path(sys.argv[2]).read_text(encoding="utf-8")[:40_000]).ids
    prompts = [ids[n * PROMPT : (n + 1) * PROMPT] for n in range(ROWS)]
    full = GenerateConfig(max_new_tokens=NEW)
    exits = by_gain(threshold(lm, prompts))
    ways: dict[str, tuple[Any, ...]] = {
        "full, 8 rows": (prompts, full),
        "full, 1 row": (prompts[:1], full),
        "gain, 8 rows": (prompts, exits),
        STEPS: (prompts, exits),
        **{f"gain, 8 rows, max_wait={wait}": (prompts, exits, wait) for wait in WAITS},
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(decode(lm, *way, routed=name != STEPS))
    base = [speed for speed, *_ in found["full, 8 rows"]]
    for name, runs in found.items():
        ratio = median(speed / of for (speed, *_), of in zip(runs, base, strict=True))
        speed, layers, reads = (median(each) for each in zip(*runs, strict=True))
        print(
            f"{name:26} {speed:7.1f} tokens/s  {ratio:5.2f} of full  {layers:5.1f} layers  "
            f"{reads:5.1f} reads"
        )
    memory(lm, prompts)


if __name__ == "__main__":
    main()
