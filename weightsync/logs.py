"""One structured log line a phase: ``key=value`` in text, the same fields in JSON."""

from __future__ import annotations

import json
import logging
import re
from typing import Literal

_PLAIN = re.compile(r"[\w.:/+-]+")


def log_fields(log: logging.Logger, level: int, event: str, **fields: object) -> None:
    """Log ``event key=value ...``; :class:`JsonFormatter` writes each field as one of JSON's.

    Values with spaces or anything else that could be taken for another field are quoted as in
    JSON, so a line stays one line whatever an engine's error says.  None is left out.
    """
    if not log.isEnabledFor(level):
        return
    told = {name: value for name, value in fields.items() if value is not None}
    text = " ".join(f"{name}={_value(value)}" for name, value in told.items())
    log.log(level, "%s %s", event, text, extra={"event": event, "fields": told}, stacklevel=2)


def _value(value: object) -> str:
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``at`` (seconds since 1970), ``level``, ``logger``, ``message``.

    Lines of :func:`log_fields` have ``event`` and their fields instead of the message, those of
    an exception ``traceback`` too.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "at": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= {"event": getattr(record, "event", ""), **fields}
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(kind: Literal["text", "json"], level: str = "INFO") -> None:
    """Have this process write its log to standard error, unless somebody has set that up."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter()
        if kind == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level, handlers=[handler])
