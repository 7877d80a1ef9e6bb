"""Whether a push still holds its engines, asked right before it writes."""

from __future__ import annotations

import time

from weightsync.errors import DeadlineError, StaleEpochError, WeightSyncError
from weightsync_client.control import Agent
from weightsync_client.policy import Roster
from weightsync_client.settings import Deadlines

_TRIES = 3


def check_held(
    roster: Roster, push_id: str, deadlines: Deadlines, *, heard_at: float, fresh_s: float
) -> dict[str, WeightSyncError]:
    """Right before the writes: if the begin was a while ago, ask the agents if it still holds.

    A trainer that stood still was given up meanwhile, and the engine may serve the version of
    another push by now.  A network card would refuse the late writes; on one host, where a
    peer's memory can be written without its help, nothing else does (WS-8).

    Args:
        roster: The agents that the push began at.
        push_id: Of the push.
        deadlines: Of the looks.
        heard_at: When, by the monotonic clock, the push surely was not given up.
        fresh_s: It is not given up so soon after that.

    Returns:
        Which agents do not hold it, and why, if the policy bears that.

    Raises:
        StaleEpochError: An agent has given this push up; nothing was written from here.
        DeadlineError: Agents or this process are too slow to be sure; nothing was written.
    """

    def call(agent: Agent) -> None:
        status = agent.get("/status", timeout_s=deadlines.status_s)
        begun = status.get("state") in ("shadowing", "receiving")
        if not begun or status.get("pause_owner") != push_id:
            raise StaleEpochError(
                f"agent {agent.url} has given push {push_id} up: it was not heard of for "
                f"too long, and the engine is {status.get('state')} now",
                hint="push again; raise the agent's --push-idle-timeout-s if this trainer may "
                "stand still for so long",
                agent=agent.url,
            )

    failed: dict[str, WeightSyncError] = {}
    for _ in range(_TRIES):
        asked = time.monotonic()
        if asked - heard_at < fresh_s:
            return failed
        answers = roster.fleet.attempt(call, [a for a in roster.present if a.url not in failed])
        failed |= {u: a for u, a in answers.items() if isinstance(a, WeightSyncError)}
        roster.bear(failed)
        heard_at = asked
    raise DeadlineError(
        f"{_TRIES} looks at the agents, one after another, took over {fresh_s:g} s each",
        hint="is this machine, or an agent's, out of memory or CPU?",
    )
