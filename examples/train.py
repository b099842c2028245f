"""Train a small model with an exit after layer 2.

python examples/train.py pangram model    # a corpus or a text file, and the new folder
"""

import sys

import offramp

corpus, out = sys.argv[1:]
shape = {"layers": 4, "dim": 64, "exits": [2]}
lm = offramp.train(corpus, **shape, loss_weights="asymmetric:0.5", steps=50, batch_size=8, out=out)
print(lm.generate("The ", threshold=0.9, max_new_tokens=40).text)
