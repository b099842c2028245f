"""Time the ways to decode with a model on the same prompts.

python examples/bench.py model text.txt
"""

import sys

import offramp

model, text = sys.argv[1:]
print(offramp.load(model).bench(text, prompts=2, max_new_tokens=16, repeats=1))
