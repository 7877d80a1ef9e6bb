"""The torch engine as a process, which tells on SIGUSR1 how much NIXL holds open in it.

``COUNTS_FILE`` in the environment names the file that it writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from tests.chaos.counts import open_registrations
from weightsync_server.engines import torch_host


def _tell(*_: object) -> None:
    Path(os.environ["COUNTS_FILE"]).write_text(json.dumps(open_registrations()))


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _tell)
    sys.exit(torch_host.main())
