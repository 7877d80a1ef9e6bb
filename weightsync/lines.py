"""Processes that are told what to do by lines of JSON, and answer with one each."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from weightsync.errors import EngineError, WeightSyncError

_log = logging.getLogger(__name__)


def serve(handlers: Mapping[str, Callable[..., Mapping[str, Any]]]) -> int:
    """Answer commands until standard input ends; returns the process's exit status.

    A line is an object with the ``command`` and what its handler takes.  The answer is what the
    handler returns, or ``{"problem": ...}``, the problem details of what it raised.  Standard
    output is for answers alone: what libraries print goes to standard error.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            facts = json.loads(line)
            try:
                answer = dict(handlers[facts.pop("command")](**facts))
            # whatever it is, the other end is to hear of it and goes on
            except Exception as error:
                _log.exception("%s", line.strip()[:200])
                answer = {"problem": _problem(error)}
            out.write(json.dumps(answer) + "\n")
            out.flush()
    return 0


def _problem(error: Exception) -> dict[str, Any]:
    if not isinstance(error, WeightSyncError):
        error = EngineError(f"{type(error).__name__}: {error}")
    # what is no JSON in the context is of use to a reader of the log alone
    problem: dict[str, Any] = json.loads(json.dumps(error.to_problem(), default=str))
    return problem
