"""What ``make docs`` does to pages on their way."""

from __future__ import annotations

import re
from typing import Any

# Docstrings name things as Sphinx does, ":class:`x.Y`": the name is all that a reader needs.
_ROLE = re.compile(r":(?:class|meth|func|mod|exc|data|attr):(?=<code>)")
# What says to tests that a block runs.
_RUN = re.compile(r"^<!-- run[^>]*-->\n", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Before a page is rendered."""
    return _RUN.sub("", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """After a page was rendered."""
    return _ROLE.sub("", html)
