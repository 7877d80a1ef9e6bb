"""docs/performance.md holds the figures that were measured, and no others."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()
STORED = sorted((ROOT / "docs" / "bench").glob("*.json"), key=lambda path: path.stem)


def load():
    spec = importlib.util.spec_from_file_location(
        "_performance", ROOT / "scripts" / "performance.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_stored_figures() -> None:
    assert load().renewed(PAGE) == PAGE, "run scripts/performance.py"


def test_every_stored_benchmark_is_on_the_page_once() -> None:
    assert sorted(re.findall(r"<!-- bench (\S+) -->", PAGE)) == [path.stem for path in STORED]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_figures_name_their_machine_and_judge_their_targets(path: Path) -> None:
    said = json.loads(path.read_text())
    assert said["machine"]["packages"]["torch"]
    for target in said["targets"]:
        assert (target["met"] is None) == (target["measured"] is None)


def test_a_table_is_put_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    stored = json.loads(STORED[0].read_text())
    (tmp_path / "bench" / "x.json").write_text(json.dumps(stored))
    page = "before\n<!-- bench x -->\nold\n<!-- end x -->\nafter\n"
    made = load().renewed(page, tmp_path)
    assert made.startswith("before\n<!-- bench x -->\nweightsync ")
    assert made.endswith("<!-- end x -->\nafter\n")
    assert "old" not in made
    assert load().renewed(made, tmp_path) == made
