"""Puts the tables of stored benchmarks into docs/performance.md.

``docs/bench/NAME.json`` is what ``weightsync bench ... --json`` printed; its tables go between the
lines ``<!-- bench NAME -->`` and ``<!-- end NAME -->``, with ``docs/bench/NAME.png`` where there is
one.

    python scripts/performance.py            write docs/performance.md
    python scripts/performance.py --check    fail if that would change it
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from weightsync_client.bench.view import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "performance.md"
PLACE = re.compile(r"<!-- bench (\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def tables(name: str, docs: Path = DOCS) -> str:
    """The Markdown of one stored benchmark."""
    text = markdown(json.loads((docs / "bench" / f"{name}.json").read_text()))
    plot = docs / "bench" / f"{name}.png"
    return f"{text}\n![bench {name}](bench/{name}.png)\n" if plot.exists() else text


def renewed(page: str, docs: Path = DOCS) -> str:
    """The page with every table made anew."""

    def place(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- bench {name} -->\n{tables(name, docs)}<!-- end {name} -->"

    return PLACE.sub(place, page)


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    before = PAGE.read_text()
    after = renewed(before)
    if argv == ["--check"]:
        if after != before:
            print("docs/performance.md is not what docs/bench/*.json say: run this script")
        return int(after != before)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
