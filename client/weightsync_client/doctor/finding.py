"""What the doctor found: one thing, why it matters, and what mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        id: Stable name, for programs.
        severity: ``fail``: pushes fail, or crawl; ``warn``: they may, or nobody could see.
        what: What is there.
        why: Why it matters to a push.
        fix: The command, or the act, that mends it; empty where nothing is to be mended.
        where: ``host``, or the address that was asked.
    """

    id: str
    severity: Severity
    what: str
    why: str
    fix: str = ""
    where: str = "host"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)
