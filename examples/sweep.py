"""Measure quality and cost at several thresholds, in one pass over a text.

python examples/sweep.py model text.txt
"""

import sys

import offramp

model, text = sys.argv[1:]
for row in offramp.load(model).sweep(text, thresholds=[0.5, 0.7, 0.9]).rows:
    print(f"{row.threshold}: PPL {row.ppl:.2f} at {row.flops_pct:.0f}% of the FLOPs")
