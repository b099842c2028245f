"""Compare values of alpha at equal cost, with one seed and few tokens.

python examples/study.py train.txt test.txt study    # two texts, and the folder of the study
"""

import sys

import offramp

if __name__ == "__main__":  # a study starts processes, which import this file again
    corpus, test, out = sys.argv[1:]
    table = offramp.study("alpha", corpus, test=test, tokens=8_192, seeds=1, out=out)
    for answer in table.content["answers"]:
        print(answer)
