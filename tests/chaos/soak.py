"""Hundreds of pushes with random faults: is anything lost, does anything grow?

``python -m tests.chaos.soak --pushes 500 --seed 1``.  Every push that is said to be done is
compared with a fresh load, byte for byte.  Agent and engine are killed in the first part alone, and
what each process holds is looked at from then on.  In the first part a trainer may keep something
of each engine that was killed, and no more (docs/failure-model.md).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.counts import Holds, holds, open_registrations
from tests.chaos.moments import settled
from tests.chaos.proxy import Link
from tests.support.models import make_model
from tests.support.stack import (
    QUICK,
    TOKEN,
    AtPhase,
    Daemon,
    Stack,
    environ,
    fresh_checksums,
    wait_until,
)
from weightsync.errors import WeightSyncError
from weightsync.transport.nixl_request import copying_threads
from weightsync_client import Publisher

PHASES = ("fill", "pause", "begin", "write", "commit", "resume")
#: a push without a fault keeps its deadlines on a busy machine, too
STEP_S, IDLE_S = 4.0, 10.0
DEADLINES = QUICK.model_copy(
    update=dict.fromkeys(
        ("pause_s", "begin_s", "write_s", "commit_s", "resume_s", "abort_s"), STEP_S
    )
)
OPTIONS = ["--engine-timeout-s", str(STEP_S), "--push-idle-timeout-s", str(IDLE_S)]
#: of all pushes, those in which something happens
FAULTY = 0.15
#: of all pushes, those at the beginning in which processes are killed, too
KILLING = 0.2
#: what a process may hold more at the end than when the killing was over
MORE_RSS_MIB, MORE_FDS, MORE_THREADS, MORE_REGISTRATIONS = 48.0, 8, 4, 0
#: file descriptors that a trainer keeps of a killed engine, for each thread that copies
KEPT_FDS = 11


class BrokenTrainerError(Exception):
    """A trainer's own error, in the middle of a push."""


@dataclass
class Soak:
    """The stack under test and what was seen of it."""

    stack: Stack
    link: Link
    publisher: Publisher
    draw: random.Random
    counts: Path
    done: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seen: dict[str, list[Holds]] = field(default_factory=dict)

    def fault(self, *, kills: bool) -> tuple[str, str, Callable[[], object]]:
        """A fault's name, its phase, and what does it."""
        stack = self.stack
        at_write = {"bytes change": lambda: stack.slab()[self.draw.randrange(1000)].bitwise_xor_(1)}
        anywhere: dict[str, Callable[[], object]] = {
            "trainer fails": self._break,
            "agent stops": stack.agent.freeze,
            "engine stops": stack.engine.freeze,
            "link cut": lambda: self.link.become("refuse"),
            "link stalls": lambda: self.link.become("stall"),
            "answer lost": lambda: self.link.become("deaf", loses=1),
        }
        if kills:
            anywhere |= {"agent killed": stack.agent.kill, "engine killed": stack.engine.kill}
        name = self.draw.choice([*anywhere, *at_write])
        phase = "write" if name in at_write else self.draw.choice(PHASES)
        return name, phase, (anywhere | at_write)[name]

    def _break(self) -> None:
        raise BrokenTrainerError

    def heal(self) -> None:
        """Whoever runs the processes does what he would do."""
        self.link.become("pass")
        for daemon in (self.stack.engine, self.stack.agent):
            if daemon.runs:
                daemon.thaw()
            else:
                daemon.start()
                daemon.wait_alive()
        wait_until(lambda: self.stack.state != "detached", "the agent has its engine", 60)
        if settled(self.stack) == "paused":
            self.stack.post("/resume")

    def sample(self) -> None:
        """What every process holds now."""
        pids = {
            "trainer": os.getpid(),
            "agent": self.stack.agent.pid,
            "engine": self.stack.engine.pid,
        }
        self.counts.unlink(missing_ok=True)
        os.kill(pids["engine"], signal.SIGUSR1)
        wait_until(lambda: self.counts.is_file() and self.counts.read_text(), "the engine counts")
        counted = {
            "trainer": open_registrations(),
            "engine": json.loads(self.counts.read_text()),
        }
        for name, pid in pids.items():
            self.seen.setdefault(name, []).append(holds(pid, counted.get(name)))


def run(pushes: int, seed: int, folder: Path) -> Soak:
    """All pushes; raises AssertionError if one that was done is not what the engine holds."""
    checkpoint = make_model("qwen3", folder / "model", seed=0)
    counts = folder / "counts"
    os.environ["COUNTS_FILE"] = str(counts)
    engine = Daemon(
        "tests.chaos.counting_engine",
        ["--model", str(checkpoint)],
        folder / "engine.log",
        alive="/health",
    )
    engine.start()
    stack = Stack(checkpoint, folder, engine, OPTIONS, DEADLINES)
    link = Link(stack.agent.port)
    try:
        stack.agent.start()
        engine.wait_alive()
        stack.agent.wait_alive()
        given = [stack.weights() for _ in range(4)]
        fresh = [
            fresh_checksums(weights, checkpoint, folder / f"saved-{k}")
            for k, weights in enumerate(given)
        ]
        stack.wait_for_state("ready")
        progress = AtPhase()
        with Publisher(
            [link.url], token=TOKEN, deadlines=DEADLINES, progress=progress
        ) as publisher:
            stack.publisher.close()
            stack.publisher = publisher  # its slab is the one that changes
            soak = Soak(stack, link, publisher, random.Random(seed), counts)
            _push_all(soak, progress, pushes, given, fresh)
        return soak
    finally:
        link.close()
        stack.close()
        engine.stop()


def _push_all(soak: Soak, progress: AtPhase, pushes: int, given: list, fresh: list) -> None:
    after_fault = False
    last = fds = 0
    for number in range(pushes):
        kills = number < KILLING * pushes
        name = ""
        if not after_fault and soak.draw.random() < FAULTY:
            name, phase, do = soak.fault(kills=kills)
            progress.hooks[phase] = do
            soak.faults[name] += 1
        index = soak.draw.randrange(len(given))
        try:
            report = soak.publisher.push(given[index])
        except (WeightSyncError, BrokenTrainerError) as error:
            if not name:
                raise AssertionError(f"push {number} failed with no fault") from error
            soak.failed[type(error).__name__] += 1
            version = None
        else:
            soak.done += 1
            version = report.version
        progress.hooks.clear()
        if name:
            soak.heal()
        after_fault = bool(name)
        if version is not None and name != "engine killed":
            assert version > last or kills, f"version {version} after {last}"
            last = version
            if kills:
                now = holds(os.getpid()).fds
                fds = fds or now
                kept = KEPT_FDS * copying_threads() * soak.faults["engine killed"]
                assert now <= fds + MORE_FDS + kept, f"push {number}: {now} descriptors, were {fds}"
            held = soak.stack.get("/checksums").json()
            assert (held["version"], held["sha256"]) == (version, fresh[index]), f"push {number}"
        if number % 5 == 4 and not kills:
            soak.sample()
        if sys.stderr.isatty() or number % 50 == 49:
            print(f"{number + 1}/{pushes} pushes, {sum(soak.faults.values())} faults",
                  file=sys.stderr)  # fmt: skip


def table(soak: Soak) -> tuple[list[str], list[str]]:
    """The figures at the start, in the middle and at the end; and what grew too much."""
    lines = [f"{'process':<10}{'figure':<16}{'start':>9}{'middle':>9}{'end':>9}"]
    grew = []
    bounds = {
        "rss_mib": MORE_RSS_MIB,
        "fds": MORE_FDS,
        "threads": MORE_THREADS,
        "registrations": MORE_REGISTRATIONS,
    }
    for name, seen in soak.seen.items():
        third = max(len(seen) // 5, 1)
        middle = (len(seen) - third) // 2
        windows = (seen[:third], seen[middle : middle + third], seen[-third:])
        for figure, more in bounds.items():
            if getattr(seen[-1], figure) is None:
                continue
            at = [statistics.median(getattr(each, figure) for each in w) for w in windows]
            lines.append(f"{name:<10}{figure:<16}" + "".join(f"{x:>9.0f}" for x in at))
            if at[2] - at[0] > more:
                grew.append(f"{name}: {figure} went from {at[0]:.0f} to {at[2]:.0f}")
    return lines, grew


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--pushes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(environ())
        soak = run(options.pushes, options.seed, Path(folder))
    lines, grew = table(soak)
    print(f"{options.pushes} pushes, seed {options.seed}, {time.monotonic() - started:.0f} s")
    print(f"done {soak.done}, each equal to a fresh load; failed {sum(soak.failed.values())}")
    print("faults:", ", ".join(f"{name} {n}" for name, n in sorted(soak.faults.items())))
    print("errors:", ", ".join(f"{name} {n}" for name, n in sorted(soak.failed.items())))
    print(*lines, sep="\n")
    print(*(grew or ["nothing grew"]), sep="\n")
    return 1 if grew else 0


if __name__ == "__main__":
    sys.exit(main())
