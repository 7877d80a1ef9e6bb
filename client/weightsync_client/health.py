"""A look at all agents between two pushes, cheap enough for every step."""

from __future__ import annotations

import logging
from typing import Any

from weightsync.errors import EngineDetachedError, EnginePausedError, WeightSyncError
from weightsync_client.control import Agent
from weightsync_client.opened import Open, PushSettings
from weightsync_client.policy import Roster
from weightsync_client.report import AgentOutcome

_log = logging.getLogger("weightsync.publisher")


def check(held: Open, settings: PushSettings) -> tuple[AgentOutcome, ...]:
    """What the agents would be to a push now; all ranks call this, rank 0 asks.

    An engine that is gone is let go: its GPU memory, where this process has mapped it, is free for
    the next one only then.

    Raises:
        WeightSyncError: So many are lost that the next push would fail.
    """
    deadlines = settings.deadlines
    try:
        found: tuple[AgentOutcome, ...] = held.ranks.meet(
            "check", lambda: None, lambda _: _look(held, settings), kind=None,
            result=tuple[AgentOutcome, ...],
            decide_s=deadlines.status_s + deadlines.check_s + deadlines.grace_s,
        )  # fmt: skip
    except EngineDetachedError as error:
        _let_go(held, str(error.context.get("agent")))
        raise
    for agent in found:
        if agent.code == EngineDetachedError.code:
            _let_go(held, agent.url)
    return found


def _let_go(held: Open, url: str) -> None:
    if held.session is not None and url in held.session.members:
        held.session.drop(url)


def _look(held: Open, settings: PushSettings) -> tuple[AgentOutcome, ...]:
    def ask(agent: Agent) -> dict[str, Any]:
        status = agent.get("/status", timeout_s=settings.deadlines.check_s)
        if (error := _obstacle(agent.url, status)) is not None:
            raise error
        return status

    held.fleet.use(settings.members())
    roster = Roster(held.fleet, settings.policy)
    answers = held.fleet.attempt(ask)
    lost = {u: a for u, a in answers.items() if isinstance(a, WeightSyncError)}
    for url in lost.keys() - held.lost:
        _log.warning("agent %s is lost: %s", url, lost[url])
    for url in held.lost - lost.keys():
        _log.info("agent %s is back", url)
    held.lost = set(lost)
    roster.drop("check", lost)
    found = []
    for url, answer in answers.items():
        status = answer if isinstance(answer, dict) else {}
        state, version = status.get("state", "unknown"), status.get("version") or 0
        found.append(roster.outcome(url, str(state), int(version)))
    return tuple(found)


def _obstacle(url: str, status: dict[str, Any]) -> WeightSyncError | None:
    """Why a push could not reach this engine; None: it could.  A torn one is repaired by it."""
    if status.get("state") == "detached":
        return EngineDetachedError(
            f"agent {url} has lost its engine", hint="look at the engine's log", agent=url
        )
    if status.get("state") == "paused" and not status.get("pause_owner"):
        return EnginePausedError(
            f"the engine of agent {url} is paused by hand", hint="POST /resume", agent=url
        )
    return None
