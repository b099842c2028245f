"""Make the questions of the task python_docs from the language reference bundled with Python.

Each question is the beginning of a paragraph. The choices are the sentence that follows it there,
and three sentences that follow elsewhere in the reference.

    python examples/tasks/make_python_docs.py [FILE]

The file beside this script was made with Python 3.11. The text of the reference is copyright of the
Python Software Foundation and licensed under the PSF License Version 2.
"""

import json
import random
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

QUESTIONS = 120
CHOICES = 4
SENTENCE = re.compile(r"(?<=[a-z)][.]) +(?=[A-Z])")
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:()'\"`.*_/=\[\]{}<>+-]+\.")


def passages() -> list[tuple[str, str, str]]:
    """Return (topic, beginning of a paragraph, next sentence) of every prose paragraph."""
    found, seen = [], set()
    for topic, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            if re.search(r"^ {3,}|::$|^[*+|=-]", paragraph, flags=re.MULTILINE):
                continue  # code, a list or a table
            plain = re.sub(r'[*`"]', "", " ".join(paragraph.split()))
            sentences = SENTENCE.split(plain)
            if len(sentences) < 2 or plain in seen or not PROSE.fullmatch(plain):
                continue
            seen.add(plain)
            begin, follow = " ".join(sentences[:-1]), sentences[-1]
            if 60 <= len(begin) <= 400 and 40 <= len(follow) <= 160:
                found.append((topic, begin, follow))
    return found


def questions() -> list[dict[str, object]]:
    """Return the questions; they are the same each time for one version of Python."""
    draw = random.Random(0)
    every = passages()
    asked = draw.sample(every, min(QUESTIONS, len(every)))
    rows = []
    for topic, begin, follow in asked:
        others = [other for name, _, other in every if name != topic and other != follow]
        others.sort(key=lambda other: abs(len(other) - len(follow)))
        choices = [follow, *draw.sample(others[:30], CHOICES - 1)]
        draw.shuffle(choices)
        rows.append({"context": begin, "choices": choices, "label": choices.index(follow)})
    return rows


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("python_docs.jsonl")
    rows = questions()
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} questions")


if __name__ == "__main__":
    main()
