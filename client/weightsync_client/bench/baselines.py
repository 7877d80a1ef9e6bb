"""The same bytes by other means, between two processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsync_client.bench.part import Part
from weightsync_client.demo.processes import Deadline, Processes

_START_S = 120.0
_CALL_S = 60.0
#: pieces of a write, from small to whole: each size is four times the last
_SMALLEST_PIECE = 1 << 16
_MOST_PIECES = 16_384


class Baselines:
    """Two processes, a source and a target, which are told what to move.

    Args:
        processes: Starts them.
        deadline: Of every wait.
        device: Where the bytes lie, ``cpu`` or ``cuda:0``.
        environs: What source and target see beside what all see.
    """

    def __init__(
        self,
        processes: Processes,
        deadline: Deadline,
        device: str,
        environs: Sequence[Mapping[str, str]] = ({}, {}),
    ) -> None:
        self._processes = processes
        self._sleeps = device == "cpu"
        module = [sys.executable, "-m", "weightsync_client.bench.pair", device]
        self._source, self._target = (
            Part(processes, f"baseline {role}", [*module, role], deadline, environ)
            for role, environ in zip(("source", "target"), environs, strict=True)
        )
        self._nbytes = 0

    def open_raw(self, nbytes: int, threads: int = 1) -> None:
        """Connect two raw NIXL ends of that many bytes, for writes by so many threads.

        Raises:
            WeightSyncError: NIXL does not start, or refuses.
        """
        target, _ = self._both("open_raw", _START_S, nbytes=nbytes, threads=threads)
        facts = {"metadata": target["metadata"], "addr": target["addr"], "threads": threads}
        self._source.ask("connect_raw", timeout_s=_CALL_S, **facts)
        self._nbytes = nbytes

    def write_raw(self, threads: int = 1, *, sleeping: bool = False) -> float:
        """Seconds of one write of all bytes, in one descriptor a thread.

        ``sleeping``: it waits as a push does; a loop that polls takes the core that the other end
        may need.
        """
        nbytes = self._nbytes
        return self._write(nbytes, nbytes, 1, threads=threads, sleeping=sleeping)

    def sweep(self, most_nbytes: int, repeats: int) -> list[dict[str, Any]]:
        """The rate against the size of a descriptor: seconds of the same bytes in pieces.

        On a CPU it waits as a push does: a loop that polls takes the core that the other end needs.

        Args:
            most_nbytes: How much is written each time, at most.
            repeats: Whose median counts.
        """
        nbytes = min(self._nbytes, most_nbytes)
        rows = []
        piece = _SMALLEST_PIECE
        while piece < nbytes:
            if nbytes <= piece * _MOST_PIECES:
                rows.append(self._row(nbytes, piece, repeats))
            piece *= 4
        return [*rows, self._row(nbytes, nbytes, repeats)]

    def join(self, backend: str, shapes: Sequence[Sequence[int]]) -> None:
        """Make a process group of the two, with bfloat16 tensors of these shapes.

        Raises:
            WeightSyncError: It does not come about.
        """
        self._both(
            "join", _START_S, backend=backend, port=self._processes.reserve_port(), shapes=shapes
        )

    def broadcast(self) -> float:
        """Seconds of one broadcast a tensor: of the end that was done last."""
        return max(float(answer["seconds"]) for answer in self._both("broadcast", _CALL_S))

    def copy_device(self, nbytes: int) -> float:
        """Seconds of a plain copy from GPU to GPU."""
        answer = self._source.ask("copy_device", timeout_s=_CALL_S, nbytes=nbytes)
        return float(answer["seconds"])

    def finish(self) -> None:
        """Let both end."""
        for part in (self._source, self._target):
            part.finish()

    def _row(self, nbytes: int, piece: int, repeats: int) -> dict[str, Any]:
        seconds = self._write(nbytes, piece, repeats, sleeping=self._sleeps)
        count = -(-nbytes // piece)
        rate = nbytes / seconds / 1e9
        return {"nbytes": piece, "count": count, "seconds": seconds, "gbytes_per_s": rate}

    def _write(
        self, nbytes: int, piece: int, repeats: int, *, threads: int = 1, sleeping: bool = False
    ) -> float:
        answer = self._source.ask(
            "write_raw", timeout_s=_CALL_S,
            nbytes=nbytes, piece_nbytes=piece, repeats=repeats, threads=threads, sleeping=sleeping,
        )  # fmt: skip
        return float(answer["seconds"])

    def _both(self, command: str, timeout_s: float, **facts: Any) -> list[dict[str, Any]]:
        """Tell both, wait for both: the target's answer, the source's."""
        parts = (self._target, self._source)
        for part in parts:
            part.tell(command, **facts)
        return [part.answer(timeout_s) for part in parts]


class VllmNccl:
    """vLLM's own NCCL weight transfer between two processes, both of vLLM's own code.

    Args:
        processes: Starts them.
        deadline: Of every wait.
        model: Folder with the model's config.
        environ: What the engine's process sees beside what all see.
    """

    def __init__(
        self, processes: Processes, deadline: Deadline, model: Path, environ: Mapping[str, str]
    ) -> None:
        self._processes = processes
        command = [sys.executable, "-m", "weightsync_server.engines.vllm_nccl"]
        self._engine = Part(
            processes, "vllm-nccl engine", [*command, "engine", str(model)], deadline, environ
        )
        self._trainer = Part(
            processes, "vllm-nccl trainer", [*command, "trainer", str(model)], deadline
        )
        self._weights: dict[str, Any] = {}
        self._engine.tell("load")

    def wait_loaded(self, timeout_s: float) -> None:
        """Wait until the engine is up.

        Raises:
            WeightSyncError: It does not come up.
        """
        self._engine.answer(timeout_s)

    def join(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """Let the two meet; the trainer makes bfloat16 weights of these names and shapes.

        Raises:
            WeightSyncError: They do not.
        """
        port = self._processes.reserve_port()
        self._weights = {"names": names, "shapes": shapes}
        self._trainer.tell("init", port=port, **self._weights)
        self._engine.ask("init", timeout_s=_START_S, port=port)
        self._trainer.answer(_START_S)

    def transfer(self, *, packed: bool) -> float:
        """Seconds of one transfer of all weights, as the engine's process sees it."""
        self._trainer.tell("send", packed=packed)
        answer = self._engine.ask("update", timeout_s=_CALL_S, packed=packed, **self._weights)
        self._trainer.answer(_CALL_S)
        return float(answer["seconds"])

    def finish(self) -> None:
        """Let both end."""
        for part in (self._trainer, self._engine):
            part.finish()
