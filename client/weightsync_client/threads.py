"""Threads for calls that wait on somebody else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: how long a Ctrl-C may go unheard
_STEP_S = 0.2


def wait_for_all(futures: Collection[Future[T]]) -> None:
    """Wait until all calls are over; each ends at a deadline of its own (WS-6).

    In steps: a signal that comes just before a thread goes to sleep does not wake it, and a wait
    without an end would never hear of it.
    """
    while wait(futures, timeout=_STEP_S).not_done:
        pass


class DaemonPool:
    """Runs calls in a bounded number of threads that the end of the process does not wait for.

    Those of :mod:`concurrent.futures` are joined at exit: after a Ctrl-C a call to an agent that
    stands still would hold the process up to that call's own deadline.

    Args:
        most: Threads; further calls queue.
        name: Of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads = 0

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call soon."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = call(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(run)
        with self._lock:
            if not self._idle.acquire(blocking=False) and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    def close(self) -> None:
        """No more calls; those that run go on, each until its own deadline."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                self._idle.release()  # whoever submits next need start no thread
                call = self._calls.get()
            if call is None:
                return
            call()
