"""The embedded torch engine's own loader as a process, to be timed: no push, a file instead.

``python -m weightsync_server.engines.torch_reload MODEL``: each line of standard input, an object
with the ``path`` of a safetensors file, loads that file into the live weights and is answered with
``{"safetensors_reload": seconds}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from weightsync_server.engines.torch_engine import TorchAdapter


def reload(adapter: TorchAdapter, path: Path) -> float:
    """Seconds of loading a checkpoint file into the live weights, as the engine's start does."""
    started = time.perf_counter()
    with safe_open(path, framework="pt", device=str(adapter.device)) as file:
        adapter.load(adapter.live, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
    return time.perf_counter() - started


def main(argv: Sequence[str]) -> int:
    """Command line of the process; ends with its input."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print is no answer
        adapter = TorchAdapter(Path(argv[0]))
        for line in sys.stdin:
            seconds = reload(adapter, Path(json.loads(line)["path"]))
            out.write(json.dumps({"safetensors_reload": seconds}) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
