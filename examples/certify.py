"""Find thresholds that change at most 5% of the predictions, with 95% confidence.

python examples/certify.py model calibration.txt certificate.json
"""

import sys

import offramp

model, text, out = sys.argv[1:]
certificate = offramp.load(model).certify(text, epsilon=0.05, delta=0.05)
certificate.save(out)
print(certificate)
