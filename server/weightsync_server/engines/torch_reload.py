"""The embedded torch engine's own loader as a process, to be timed: no push, a file instead.

``python -m weightsync_server.engines.torch_reload MODEL`` answers the command ``reload`` with the
seconds that it took to load a safetensors file into the live weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from weightsync.lines import serve
from weightsync_server.engines.torch_engine import TorchAdapter


def reload(adapter: TorchAdapter, path: Path) -> float:
    """Seconds of loading a checkpoint file into the live weights, as the engine's start does."""
    started = time.perf_counter()
    with safe_open(path, framework="pt", device=str(adapter.device)) as file:
        adapter.load(adapter.live, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
    return time.perf_counter() - started


def main(argv: Sequence[str]) -> int:
    """Command line of the process; returns its exit status."""
    adapter = TorchAdapter(Path(argv[0]))
    return serve({"reload": lambda path: {"safetensors_reload": reload(adapter, Path(path))}})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
