"""The table of families in docs/models.md, as the installed ``transformers`` gives it.

``python tests/families/table.py`` writes it between the two markers of this version.
"""

import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from configs import families
from outcome import GROUPS, outcome_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def markers(version: str) -> tuple[str, str]:
    """Return the lines before and after the table of a version."""
    return f"<!-- families of transformers {version} -->", f"<!-- end of {version} -->"


def table() -> str:
    """Return the table in Markdown: a row for each outcome and reason, with its families."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in families():
        outcome = outcome_of(name)
        rows[outcome.group, reason(name, outcome.group, outcome.why)].append(f"`{name}`")
    lines = [
        f"transformers {transformers.__version__}: {len(families())} families.",
        "",
        "| Runs | Why | Families |",
        "|---|---|---|",
    ]
    for group, words in GROUPS.items():
        for (of, why), names in sorted(rows.items(), key=lambda row: (-len(row[1]), row[0])):
            if of == group:
                lines.append(f"| {words} | {why} | {len(names)}: {', '.join(names)} |")
    return "\n".join(lines)


def reason(name: str, group: str, why: str) -> str:
    """Return a reason without the names of the family, of other methods and of long errors."""
    if group == "blocks":
        return ""
    if group == "broken":
        return "an error of transformers"
    if group == "no cache":
        return why.split("since ")[1].split(";")[0]
    if group == "refused":
        why = why.split(": ", 1)[1]
    why = re.sub(r", got one of shape .*", "", why)
    why = re.sub(
        r"^its blocks need \w+$", "its blocks need what only the whole model computes", why
    )
    return why.split(": ")[0].replace("|", "/")


def committed(version: str) -> str | None:
    """Return the table of a version in the page; None if there is none."""
    start, end = markers(version)
    page = PAGE.read_text(encoding="utf-8")
    if start not in page:
        return None
    return page.split(start)[1].split(end)[0].strip()


def main() -> None:
    """Write the table of the installed version into the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    version = transformers.__version__
    old, (start, end) = committed(version), markers(version)
    if old is None:
        sys.exit(f"{PAGE}: expected the line {start}")
    new = table()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(start)
    PAGE.write_text(f"{before}{start}\n{new}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
