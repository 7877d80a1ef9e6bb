"""The documentation site is built without a warning, has every page, and loads nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import weightsync_client

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(nav: list | dict | str) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    items = nav.values() if isinstance(nav, dict) else nav
    return set().union(*(pages(item) for item in items))


def test_every_page_has_its_place_in_the_navigation(site):
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.SafeLoader)["nav"]
    assert pages(nav) == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    for page in pages(nav):
        assert (site / page).with_suffix(".html").is_file()


def test_a_reader_loads_nothing_from_elsewhere(site):
    tag = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*>")
    for page in site.rglob("*.html"):
        loads = [t for t in tag.findall(page.read_text()) if re.search(r"""["'=](https?:)?//""", t)]
        assert loads == [], page.name


def test_the_api_has_everything_that_a_trainer_imports_and_its_arguments(site):
    text = (site / "api.html").read_text()
    for name in weightsync_client.__all__:
        home = f"weightsync_client.{weightsync_client._HOMES[name]}"
        assert f'id="{home}.{name}"' in text, name
    assert "max_slot_bytes" in text
    assert not re.search(r":(?:class|meth|func|mod|exc):", text)


def test_what_tells_tests_to_run_a_block_is_not_shown(site):
    assert "<!-- run" in (DOCS / "quickstart.md").read_text()
    for page in site.glob("*.html"):
        assert "&lt;!-- run" not in page.read_text()
        assert "<!-- run" not in page.read_text()
