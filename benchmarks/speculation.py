"""Compare speculative decoding with full depth: the same tokens, and how much sooner.

    python benchmarks/speculation.py MODEL TEXT [--prompts 50] [--repeats 1]

MODEL has exits, of which the first drafts; TEXT is a file or a folder. Prompts of 64 tokens lie at
equal distances in it, and 64 new tokens follow, one prompt at a time. For each weight format and
prompt, both ways run in turn, REPEATS times, after one run that warms up. Prints the prompts whose
tokens are those of full depth of the same weights, and the median over prompts of the ratio of
tokens/s, which is the median over the repeats; with the slowest prompt, and the prompts at 0.95 or
more.
"""

import argparse
import time
from statistics import median
from typing import Any

from offramp.commands.bench.formats import in_formats
from offramp.commands.text import read_text
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.base import EarlyExitModel
from offramp.models.open import open_model

PROMPT, NEW = 64, 64


def main() -> None:
    """Print a line for each weight format."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--weights", default="float32,bfloat16,int8,int4")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1)
    chosen = parser.parse_args()
    opened = open_model(chosen.model)
    ids = read_text(opened, chosen.text).ids
    apart = (len(ids) - PROMPT) // chosen.prompts
    prompts = [ids[n * apart : n * apart + PROMPT].tolist() for n in range(chosen.prompts)]
    for name, each in in_formats(opened, chosen.weights.split(",")).items():
        run(each.model, prompts[0])
        print(f"{name:9} {compared(each.model, prompts, chosen.repeats)}", flush=True)


def run(model: EarlyExitModel, prompt: list[int], **options: Any) -> tuple[list[int], float]:
    """Return the new tokens of a prompt, and the seconds of all but the first."""
    tokens = generate(model, prompt, GenerateConfig(max_new_tokens=NEW, **options))
    ids = [next(tokens).id]
    began = time.perf_counter()
    ids += [token.id for token in tokens]
    return ids, time.perf_counter() - began


def compared(model: EarlyExitModel, prompts: list[list[int]], repeats: int) -> str:
    """Return what the two ways gave, in words."""
    same, ratios = 0, []
    for prompt in prompts:
        equal, found = True, []
        for _ in range(repeats):
            full, slow = run(model, prompt)
            drafted, fast = run(model, prompt, speculative=True)
            equal = equal and full == drafted
            found.append(slow / fast)
        same += equal
        ratios.append(median(found))
    paid = sum(ratio >= 0.95 for ratio in ratios)
    return (
        f"{same} of {len(prompts)} texts are those of full depth; {median(ratios):.2f} times its "
        f"tokens/s, {min(ratios):.2f} on the slowest prompt; {paid} prompts at 0.95 or more"
    )


if __name__ == "__main__":
    main()
