"""Give a Hugging Face model exits at a quarter, half and three quarters of its depth.

python examples/tune.py smollm2-135m text.txt tuned    # a model, a text, and the new folder
"""

import sys

import offramp

model, corpus, out = sys.argv[1:]
lm = offramp.tune(model, corpus, tokens=5_000, out=out)
print(lm)
