"""The blocks of docs/integrations.md, for the tests that run them."""

from __future__ import annotations

import re
from typing import Any

from tests.support.stack import TOKEN
from tests.support.torch_host import ROOT

PAGE = (ROOT / "docs" / "integrations.md").read_text()


def block(heading: str, language: str, number: int = 0) -> str:
    """A block of code under a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[number]


def run(
    code: str, monkeypatch: Any, *, agent: str, engine: str = "", **names: Any
) -> dict[str, Any]:
    """Run a block with ``names`` as its globals and the test's addresses; its globals after it."""
    monkeypatch.setenv("WEIGHTSYNC_TOKEN", TOKEN)
    code = code.replace("http://agent:9100", agent)
    space = dict(names)
    exec(compile(code, "docs/integrations.md", "exec"), space)  # noqa: S102 - our own page
    return space
