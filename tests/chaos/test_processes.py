"""Trainer, agent and engine are killed and stopped at every moment of a push.

Each row tells how the push ends for its trainer, what the engine serves then, and within which
time.  At the end of each a whole push succeeds and equals a fresh load, byte for byte.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.chaos.moments import BOUND_S, START_S, settled, strike, what_is_served
from tests.chaos.rows import PROCESSES, SHADOW, Row
from tests.support.stack import TOKEN, Daemon, Stack, environ, save, wait_until
from tests.support.trainer import trainer_held_at

pytestmark = [pytest.mark.nixl, pytest.mark.chaos, pytest.mark.timeout(240)]


@pytest.mark.parametrize("row", [*PROCESSES, *SHADOW], ids=lambda row: row.id)
def test_a_process_that_dies_or_stands_still(row: Row, stack: Stack, tmp_path: Path) -> None:
    stack.push()  # what it goes back to is no checkpoint
    held = stack.held()
    started = time.monotonic()
    if row.who.endswith("trainer"):
        told = hurt_trainer(stack, row, tmp_path)
    else:
        told = hurt_daemon(stack, row, stack.agent if row.who.endswith("agent") else stack.engine)
    assert told in (row.told or {"nothing"})
    ended = settled(stack)
    took_s = time.monotonic() - started
    serves = what_is_served(stack, ended, held.version)
    assert serves in row.ends
    assert took_s < BOUND_S + START_S * (serves == "started")
    if serves == "old":
        stack.assert_serves(held)
    elif serves == "torn":
        stack.assert_torn()
    elif serves == "paused":
        stack.post("/resume")
    stack.assert_a_whole_push_works()


def hurt_trainer(stack: Stack, row: Row, folder: Path) -> str:
    """A trainer process is hurt; what it says in the end, or "nothing"."""
    weights = save(stack.weights(), stack.checkpoint, folder / "weights") / "model.safetensors"
    phase = row.when.removeprefix("in ")
    with trainer_held_at(
        phase, agent=stack.agent.url, token=TOKEN, weights=weights, env=environ(),
        log=stack.folder / "trainer.log", mode=row.mode,
    ) as trainer:  # fmt: skip
        if row.how == "kill":
            if phase != row.when:
                stack.engine.freeze()
                trainer.let_go()
                time.sleep(0.4)
            trainer.kill()
            stack.engine.thaw()
            return "nothing"
        trainer.freeze()
        owner = stack.status()["pause_owner"]
        if owner is not None:
            wait_until(lambda: stack.status()["pause_owner"] is None, "it is given up")
        trainer.thaw()
        said = trainer.go_on()
        return "done" if "done" in said else str(said["error"])


def hurt_daemon(stack: Stack, row: Row, daemon: Daemon) -> str:
    """Agent or engine is hurt in a push of this process; what the push ended with."""
    try:
        do = daemon.kill if row.how == "kill" else daemon.freeze
        return strike(stack, row.when, do, mode=row.mode).how
    finally:
        if daemon.runs:
            daemon.thaw()
        else:
            daemon.start()
            daemon.wait_alive()
