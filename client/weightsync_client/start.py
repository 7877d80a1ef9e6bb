"""The first meeting of a push: who is there, which version it makes, what is used again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsync.errors import (
    AgentUnreachableError,
    DeadlineError,
    InputError,
    StaleVersionError,
    WeightSyncError,
)
from weightsync_client.attempt import Attempt
from weightsync_client.control import Agent
from weightsync_client.opened import Open, PushSettings
from weightsync_client.policy import Roster

#: between two looks at agents that are awaited
_LOOK_S = 0.5

Status = dict[str, Any]


@dataclass(frozen=True)
class Hello:
    """What a rank comes with: the session that it could use again, and the version it was told."""

    session: str
    wanted: int | None


@dataclass(frozen=True)
class Start:
    """What a push starts with.

    Attributes:
        version: That it makes.
        push_id: That it has.
        agents: Who takes part.
        stale: Those whose epoch is over, or never was: they need a rendezvous.
        fresh: All ranks and agents need one.
    """

    version: int
    push_id: str
    agents: list[str]
    stale: list[str]
    fresh: bool


def start(attempt: Attempt, key: Callable[[], str], wanted: int | None) -> Start:
    """Meet; on every rank the fleet and the roster are those of this push afterwards.

    Args:
        attempt: Gets its roster, version and push_id.
        key: Tells that of this rank's session, if it would do; empty: there is none.
        wanted: The version that this rank was told; None: the next.

    Raises:
        InputError: The ranks were told different versions, or there are no agents.
        StaleVersionError: An engine has that version.
        WeightSyncError: Agents do not answer, more than the policy bears.
    """
    settings = attempt.settings
    wait_s = 0.0 if attempt.held.met else settings.wait_for_agents_s
    begun = attempt.meet(
        "status",
        lambda: Hello(key(), wanted),
        lambda hellos: _decide(attempt, hellos, wait_s),
        kind=Hello,
        result=Start,
        decide_s=wait_s + 2 * settings.deadlines.status_s + settings.deadlines.grace_s,
    )
    attempt.version, attempt.push_id = begun.version, begun.push_id
    if attempt.held.ranks.rank:
        attempt.held.fleet.use(begun.agents)
        attempt.roster = Roster(attempt.held.fleet, settings.policy)
    return begun


def _decide(attempt: Attempt, hellos: Sequence[Hello], wait_s: float) -> Start:
    held = attempt.held
    wanted = {h.wanted for h in hellos}
    if len(wanted) > 1:
        raise InputError(
            f"the ranks push different versions: {wanted}",
            hint="hand the same version to push on every rank, or none",
        )
    attempt.enter("status")
    attempt.roster, statuses = look(held, attempt.settings, wait_s)
    attempt.statuses = statuses
    session = held.session
    usable = session is not None and {h.session for h in hellos} == {session.key}
    stale = [
        url
        for url, status in statuses.items()
        if not usable
        or session is None
        or url not in session.members
        or not session.members[url].open_at(status)
    ]
    version = choose_version(hellos[0].wanted, list(statuses.values()), held.last_version)
    attempt.version = version
    fresh = len(stale) == len(statuses)
    return Start(version, attempt.push_id, attempt.roster.urls, stale, fresh)


def look(held: Open, settings: PushSettings, wait_s: float) -> tuple[Roster, dict[str, Status]]:
    """Who is there, and the status of each; who does not answer is dropped.

    Args:
        held: Whose fleet it is.
        settings: Name the agents, and the policy.
        wait_s: For agents and engines that are not there yet.

    Raises:
        InputError: There are no agents.
        WeightSyncError: Agents do not answer, more than the policy bears.
    """

    def ask(agent: Agent) -> Status:
        return agent.get("/status", timeout_s=settings.deadlines.status_s)

    deadline = time.monotonic() + wait_s
    while True:
        over = time.monotonic() >= deadline
        try:
            held.fleet.use(settings.members())
            roster = Roster(held.fleet, settings.policy)
        except WeightSyncError:
            if over:
                raise
        else:
            answers = held.fleet.attempt(ask)
            if over or not any(_may_come(answer) for answer in answers.values()):
                roster.drop(
                    "status", {u: a for u, a in answers.items() if isinstance(a, WeightSyncError)}
                )
                return roster, {u: a for u, a in answers.items() if isinstance(a, dict)}
        time.sleep(min(_LOOK_S, max(deadline - time.monotonic(), 0.0)))


def _may_come(answer: Status | WeightSyncError) -> bool:
    """Whether an agent, or its engine, may only be slow to start."""
    if isinstance(answer, WeightSyncError):
        return isinstance(answer, (AgentUnreachableError, DeadlineError))
    return answer.get("state") == "detached"


def choose_version(
    wanted: int | None, statuses: Sequence[Mapping[str, Any]], last_version: int
) -> int:
    """The version that a push makes.

    Raises:
        StaleVersionError: An engine has ``wanted`` or a newer one.
    """
    versions = [int(s.get("version") or 0) for s in statuses]
    # a torn engine may tell which version was interrupted
    targets = [int(s.get("target") or 0) for s in statuses]
    # one that was started anew may have had later versions before
    committed = [int(s.get("committed") or 0) for s in statuses]
    # one that was given up is not served, and not used again either
    given_up = [int(s.get("rolled_back_from") or 0) for s in statuses]
    lowest = max(*versions, *targets, *committed, *given_up, last_version) + 1
    if wanted is None:
        return lowest
    if wanted <= max(versions):
        # The agents would refuse it too, but only after the fill and the pause.
        raise StaleVersionError(
            f"version {wanted} is not newer than what an engine has: {max(versions)}",
            hint=f"push version {lowest} or later, or leave the version out",
            lowest=lowest,
        )
    return wanted
