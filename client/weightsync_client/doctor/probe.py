"""A measured write: two processes on this host, NIXL between them, a plain copy beside it.

``python -m weightsync_client.doctor.probe target|source`` is one end.  The target offers its
memory in a line of JSON and lives until its stdin ends; the source reads that line and answers with
one of its own.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from weightsync.errors import TransportError, WeightSyncError
from weightsync.transport.base import LocalMemory, Side, WriteOp
from weightsync_client.doctor.finding import Finding, Severity
from weightsync_client.report import human_bytes

_NBYTES = {"DRAM": 64 << 20, "VRAM": 256 << 20}
_REPEATS = 3
_TIMEOUT_S = 60.0
#: of the rate of a plain copy: below the one a push is slow, below the other something is broken
_SLOW, _BROKEN = 0.1, 0.02
_LANES = re.compile(r"(?:intra|inter)-node cfg#\d+ (.*)$", re.MULTILINE)
_VERSION = re.compile(r"UCX +INFO +Version (\S+)")
_WHY = "it is what a push does; a wrong transport or allocator still works, a thousand times slower"


def probe(environ: Mapping[str, str], *, gpu: bool, timeout_s: float = _TIMEOUT_S) -> list[Finding]:
    """Write from process to process, and tell the rate and what UCX chose.

    Args:
        environ: Of both processes: what is set there decides what UCX does.
        gpu: From GPU memory to GPU memory, as torch allocates it, instead of host memory.
        timeout_s: For all of it.
    """
    env = {**environ, "UCX_LOG_LEVEL": "info"}
    kind = "VRAM" if gpu else "DRAM"
    try:
        answer, log = _run(env, kind, timeout_s)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [
            Finding(
                "probe.write",
                "fail",
                f"no write between two processes of this host: {error}",
                _WHY,
                "see the findings on nixl, memlock and ucx_variables",
            )
        ]
    return [judge(answer), *chosen(log)]


def judge(answer: Mapping[str, Any]) -> Finding:
    """What the rate means beside that of a plain copy of the same bytes."""
    nbytes, rate = int(answer["nbytes"]), answer["nbytes"] / answer["write_s"]
    expected = answer["nbytes"] / answer["copy_s"]
    slow = rate < _SLOW * expected
    severity: Severity = "fail" if rate < _BROKEN * expected else "warn" if slow else "ok"
    return Finding(
        "probe.write",
        severity,
        f"{human_bytes(nbytes)} of {answer['kind']} from process to process: {human_bytes(rate)}/s;"
        f" a plain copy here: {human_bytes(expected)}/s",
        _WHY,
        "unset PYTORCH_CUDA_ALLOC_CONF UCX_TLS UCX_NET_DEVICES  # and run it again" if slow else "",
    )


def chosen(log: str) -> Iterator[Finding]:
    """UCX's version and lanes, as its log has them."""
    why = "what UCX uses on this host; between hosts a card's name has to show here, as mlx5_0:1"
    lanes = list(dict.fromkeys(" ".join(found.split()) for found in _LANES.findall(log)))
    version = _VERSION.search(log)
    name = f"UCX {version[1]}" if version else "UCX"
    if lanes:
        yield Finding("probe.transports", "ok", f"{name}: {'; '.join(lanes)}", why)
    else:
        yield Finding(
            "probe.transports", "warn", f"{name} did not tell what it chose", why,
            "UCX_LOG_LEVEL=info weightsync doctor",
        )  # fmt: skip


def _run(env: Mapping[str, str], kind: str, timeout_s: float) -> tuple[dict[str, Any], str]:
    """Both processes; the source's answer, and its log.

    Raises:
        ValueError: One ended without an answer; the message is the last line of its log.
    """
    command = [sys.executable, "-m", __spec__.name]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*command, "target", kind], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as target,
    ):  # fmt: skip
        stop = threading.Timer(timeout_s, target.kill)  # ends the read below, too (WS-6)
        stop.start()
        try:
            offer = _answer(target.stdout or (), log)
            done = subprocess.run(
                [*command, "source", kind], env=env, text=True, input=json.dumps(offer) + "\n",
                capture_output=True, timeout=timeout_s, check=False,
            )  # fmt: skip
        finally:
            stop.cancel()
            target.kill()
    return _answer(done.stdout.splitlines(), io.StringIO(done.stderr)), done.stderr


def _answer(lines: Iterable[str], log: TextIO) -> dict[str, Any]:
    """The JSON object that a process answers with."""
    for line in lines:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise ValueError(answer["error"])
            return answer
    log.seek(0)
    last = log.read().strip().splitlines()[-1:]
    raise ValueError(last[0] if last else "the process ended without a word")


# ------------------------------------------------------------------ the two processes


def _memory(kind: str, last: bool) -> tuple[Any, LocalMemory, Callable[[], None]]:
    """What is written from or to, and how to wait for a copy of it."""
    nbytes = _NBYTES[kind]
    if kind == "DRAM":
        import numpy as np

        data = np.ones(nbytes, dtype=np.uint8)
        return data, LocalMemory(data.ctypes.data, nbytes), lambda: None
    import torch

    if not torch.cuda.is_available():
        raise TransportError(
            "torch cannot use the GPU", hint="is it a CUDA build, and the driver loaded?"
        )
    device = torch.cuda.device_count() - 1 if last else 0
    tensor = torch.ones(nbytes, dtype=torch.uint8, device=torch.device("cuda", device))
    torch.cuda.synchronize(device)
    memory = LocalMemory(tensor.data_ptr(), nbytes, "VRAM", device)
    return tensor, memory, lambda: torch.cuda.synchronize(device)


def _best_s(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _target(kind: str) -> None:
    from weightsync.transport.nixl import NixlTransport

    data, memory, _ = _memory(kind, last=True)
    with NixlTransport("doctor-target") as transport:
        transport.register([memory])
        metadata = base64.b64encode(transport.metadata()).decode("ascii")
        _tell({"metadata": metadata, "addr": memory.addr, "device": memory.device_id})
        sys.stdin.read()
    del data


def _source(kind: str) -> None:
    from weightsync.transport.nixl import NixlTransport

    offer = json.loads(sys.stdin.readline())
    data, here, _ = _memory(kind, last=False)
    with NixlTransport("doctor-source", progress_thread=False) as transport:
        transport.register([here])
        peer = transport.add_peer(base64.b64decode(offer["metadata"]))
        write = transport.prepare(
            peer, [WriteOp(here.addr, offer["addr"], here.nbytes)],
            local=Side(here.kind, here.device_id), remote=Side(here.kind, offer["device"]),
        )  # fmt: skip

        def once() -> None:
            transport.post(write, b"doctor")
            transport.wait([write], timeout_s=_TIMEOUT_S)

        write_s = _best_s(once)
        write.close()
    other, _, done = _memory(kind, last=True)

    def copy() -> None:
        other[:] = data
        done()

    _tell({"kind": kind, "nbytes": here.nbytes, "write_s": write_s, "copy_s": _best_s(copy)})


def _tell(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(role: str, kind: str) -> None:
    """One end; its errors are its answer."""
    try:
        _target(kind) if role == "target" else _source(kind)
    except WeightSyncError as error:
        _tell({"error": str(error)})


if __name__ == "__main__":
    main(*sys.argv[1:])
