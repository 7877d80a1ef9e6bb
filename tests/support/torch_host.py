"""Starts the embedded torch engine as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-for-the-tests"


@dataclass(frozen=True)
class TorchHost:
    """A running engine: its address, process and log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, *, timeout_s: float = 20.0) -> httpx.Client:
        """A client that holds the engine's secret."""
        headers = {"X-Weightsync-Secret": SECRET}
        return httpx.Client(base_url=self.url, timeout=timeout_s, headers=headers)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running_torch_host(
    model: Path, log: Path, *options: str, start_timeout_s: float = 60.0
) -> Iterator[TorchHost]:
    """The engine on a free port, from the moment that ``/health`` answers; then SIGTERM."""
    port = free_port()
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "WEIGHTSYNC_ENGINE_SECRET": SECRET,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "weightsync_server.engines.torch_host"]
    command += ["--model", str(model), "--port", str(port), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=out)
    host = TorchHost(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_healthy(host, start_timeout_s)
        yield host
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], timeout_s: float = 20.0) -> int:
    """SIGTERM, then SIGKILL; returns the exit status."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(timeout_s)


def _wait_until_healthy(host: TorchHost, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and host.process.poll() is None:
        try:
            if httpx.get(f"{host.url}/health", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"the torch engine did not start:\n{host.log.read_text()}")
