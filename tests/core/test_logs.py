"""Log lines of phases, as text and as JSON."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from weightsync.logs import JsonFormatter, log_fields

log = logging.getLogger("tests.logs")


def test_a_phase_is_one_line_whatever_its_values_hold(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="tests.logs")
    log_fields(log, logging.INFO, "push", phase="write", version=3, seconds=0.25, nbytes=1 << 40,
               detail='two\nlines phase=done "x"', hint=None)  # fmt: skip
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("push phase=write version=3 seconds=0.250000 nbytes=1099511627776 ")
    assert text.endswith('detail="two\\nlines phase=done \\"x\\""')
    assert "\n" not in text
    assert "hint" not in text
    told = json.loads(JsonFormatter().format(record))
    assert told["detail"] == 'two\nlines phase=done "x"'
    assert (told["event"], told["phase"], told["seconds"]) == ("push", "write", 0.25)
    assert (told["level"], told["logger"]) == ("info", "tests.logs")
    assert "message" not in told


def test_other_lines_are_json_too_and_a_traceback_stays_on_the_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="tests.logs")
    try:
        raise ValueError("a\nb")
    except ValueError:
        log.exception("it %s", "failed")
    line = JsonFormatter().format(caplog.records[0])
    told = json.loads(line)
    assert "\n" not in line
    assert told["message"] == "it failed"
    assert "ValueError" in told["traceback"]


def test_a_process_logs_json_to_standard_error() -> None:
    code = (
        "import logging; from weightsync.logs import log_fields, log_to_stderr;"
        "log_to_stderr('json'); log_fields(logging.getLogger('x'), 20, 'push', phase='done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30,
                          check=True)  # fmt: skip
    assert done.stdout == ""
    assert json.loads(done.stderr)["phase"] == "done"
