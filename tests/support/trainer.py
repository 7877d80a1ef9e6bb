"""A trainer process that pushes once and stops at a phase, to be killed there or let go on.

The phase ``mid-write`` is in the middle of the writes, which then go in several rounds.

It prints a JSON object a line: ``{"held": PHASE}`` when it stops, and it goes on when a line comes
in; at the end ``{"done": VERSION}`` or what went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Trainer:
    """The parent's end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read(self) -> dict[str, Any]:
        """The next object; the test's own timeout bounds it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # UCX logs to stdout, too
                return dict(json.loads(line))
        raise AssertionError(f"the trainer ended with {self._process.wait(10)}")

    def go_on(self) -> dict[str, Any]:
        """Let it go on; how it ended."""
        self.let_go()
        return self.read()

    @property
    def pid(self) -> int:
        return self._process.pid

    def let_go(self) -> None:
        """Let it go on, without waiting for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit status."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(20)


@contextmanager
def trainer_held_at(
    phase: str,
    *,
    agent: str,
    token: str,
    weights: Path,
    env: dict[str, str],
    log: Path,
    mode: str = "direct",
) -> Iterator[Trainer]:
    """A trainer that pushes the safetensors file ``weights`` and has come to ``phase``."""
    command = [sys.executable, str(Path(__file__)), agent, token, str(weights), phase, mode]
    pipe = subprocess.PIPE
    with log.open("ab") as err:
        process = subprocess.Popen(
            command, env=env, stdin=pipe, stdout=pipe, stderr=err, text=True, bufsize=1
        )
    trainer = Trainer(process)
    try:
        held = trainer.read()
        assert held == {"held": phase}, held
        yield trainer
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _main(agent: str, token: str, weights: str, phase: str, mode: Any) -> None:
    from dataclasses import replace

    from safetensors.torch import load_file

    from weightsync.errors import WeightSyncError
    from weightsync_client import Publisher
    from weightsync_client.progress import LogProgress
    from weightsync_client.slots import Slots
    from weightsync_client.source import WeightSource

    def tell(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    def reached(now: str) -> None:
        if now == phase:
            tell(held=now)
            sys.stdin.readline()

    class Hold(LogProgress):
        def started(self, now: str, version: int) -> None:
            reached(now)

    given = load_file(weights)
    bound = None
    if phase == "in post":
        from weightsync.transport.nixl import NixlTransport

        post = NixlTransport.post

        def frozen_post(*args: Any) -> None:
            tell(held=phase)
            os.kill(os.getpid(), signal.SIGSTOP)
            post(*args)
            tell(posted=True)

        NixlTransport.post = frozen_post  # type: ignore[method-assign]
    if phase == "mid-write":
        bound = sum(t.nbytes for t in given.values()) // 4
        refill = Slots.refill

        def held_refill(slots: Slots, source: WeightSource, number: int) -> None:
            reached("mid-write" if number == 3 else "")
            refill(slots, source, number)

        Slots.refill = held_refill  # type: ignore[method-assign]

    with Publisher(
        [agent], token=token, progress=Hold(), max_slot_bytes=bound, mode=mode
    ) as publisher:
        # the calls that several agents get, though it has one: it is held between them
        publisher._settings = replace(publisher._settings, joined=False)
        try:
            report = publisher.push(given)
        except WeightSyncError as error:
            tell(error=type(error).__name__, message=str(error), phase=error.context["phase"])
        else:
            tell(done=report.version)


if __name__ == "__main__":
    _main(*sys.argv[1:])
