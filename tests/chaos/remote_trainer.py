"""A trainer on another host: it pushes what it is told to, and stops at a phase if it should.

It reads a JSON object a line, ``{"weights": FILE, "hold": PHASE}``, and prints one: ``{"held":
PHASE}`` (it goes on when a line comes in), ``{"done": VERSION}`` or ``{"error": NAME, ...}``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from safetensors.torch import load_file

from tests.support.stack import QUICK
from weightsync.errors import WeightSyncError
from weightsync_client import Publisher
from weightsync_client.progress import LogProgress

#: every frame may be lost, and the switch between the hosts is a busy process
_DEADLINES = QUICK.model_copy(update={"connect_s": 8.0, "status_s": 10.0})


class _Hold(LogProgress):
    phase = ""

    def started(self, phase: str, version: int) -> None:
        if phase == self.phase:
            _tell(held=phase)
            sys.stdin.readline()


def _tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    token, *agents = sys.argv[1:]
    hold = _Hold()
    with Publisher(agents, token=token, deadlines=_DEADLINES, progress=hold) as publisher:
        # the calls that several agents get, though it has one: it is held between them
        publisher._settings = replace(publisher._settings, joined=False)
        _tell(ready=True)
        for line in sys.stdin:
            order = json.loads(line)
            hold.phase = order.get("hold", "")
            try:
                report = publisher.push(load_file(order["weights"]))
            except WeightSyncError as error:
                _tell(error=type(error).__name__, message=str(error))
            else:
                _tell(done=report.version)


if __name__ == "__main__":
    main()
