"""Processes that stay: a gloo job whose ranks run one function of ``scenarios`` after the other."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_DONE_S = 20.0


class Pool:
    """``world_size`` spawned ranks; a context manager, and what still runs at its end is killed."""

    def __init__(self, world_size: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.world_size = world_size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            here, there = context.Pipe()
            args = (there, rank, world_size, str(folder / "store"))
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """``function(*args)`` on all ranks: what each returned, or the error that it raised.

        A rank that is dead, or not done in time, has None.
        """
        for pipe in self.pipes:
            try:
                pipe.send((function, args))
            except OSError:
                continue
        deadline = time.monotonic() + timeout_s
        results: list[Any] = []
        for pipe in self.pipes:
            try:
                come = pipe.poll(max(deadline - time.monotonic(), 0.01))
                results.append(pipe.recv() if come else None)
            except (EOFError, OSError):
                results.append(None)
        return results

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        deadline = time.monotonic() + _DONE_S
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.is_alive():
                process.kill()
                process.join(5)


def _serve(pipe: Connection, rank: int, world_size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(function(*args))
        except BaseException as error:
            pipe.send((type(error).__name__, str(error), list(getattr(error, "__notes__", ()))))
    dist.destroy_process_group()
    os._exit(0)  # torch takes a second to unload
