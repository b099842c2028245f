"""Generate text and print the exit layer of each token.

python examples/generate.py model "The quick "
"""

import sys

import offramp

model, prompt = sys.argv[1:]
for token in offramp.load(model).generate(prompt, threshold=0.9, max_new_tokens=40):
    print(f"{token.text!r} exits after layer {token.exit_layer}")
