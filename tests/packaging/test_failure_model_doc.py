"""docs/failure-model.md: every test that it names is there, every row of the fault suite in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chaos.rows import CONTROL, ENGINE, PROCESSES, SHADOW, Row

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "failure-model.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
ROWS = [*PROCESSES, *SHADOW, *CONTROL, *ENGINE]


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_every_test_that_is_named_is_there(file: str, name: str) -> None:
    source = (ROOT / file).read_text()
    assert re.search(rf"^(async )?def {name}\(|^{name} = ", source, re.MULTILINE), file


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_every_row_of_the_fault_suite_is_told_with_its_end_state(row: Row) -> None:
    assert row.line in TEXT


def test_no_row_is_told_that_is_not_run() -> None:
    told = re.findall(r"^\| .* \| `([\w-]+)` \|$", TEXT, re.MULTILINE)
    assert sorted(told) == sorted(row.id for row in ROWS)
    assert len(set(told)) == len(told)


def test_every_table_row_names_its_test() -> None:
    last = ""
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if not cells or set(line) <= set("|-"):
            last = last if cells else ""
        elif not last:
            last = cells[-1]  # of the heading: what the column tells
            assert last in {"shown by", "row", "test", "end"}, line
        elif last != "end":  # the soak's figures
            assert all(re.fullmatch(r"`[\w/.:-]+`", name) for name in cells[-1].split(", ")), line
