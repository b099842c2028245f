"""Write the language reference bundled with Python as a corpus with named splits.

python examples/split_docs.py FOLDER    # FOLDER/train.txt, valid.txt and test.txt
"""

import sys
from pathlib import Path

from offramp.data import load_corpus


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus("python-docs")
    half = len(corpus.validation) // 2
    parts = {
        "train": corpus.train,
        "valid": corpus.validation[:half],
        "test": corpus.validation[half:],
    }
    for name, text in parts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
