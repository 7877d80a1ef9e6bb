"""Who takes part in a push, and how many may fail before it does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from weightsync.errors import InputError, WeightSyncError, from_problem
from weightsync_client.control import Agent, Fleet, first_of
from weightsync_client.report import AgentOutcome

T = TypeVar("T")

_log = logging.getLogger("weightsync.publisher")


@dataclass(frozen=True, slots=True)
class Quorum:
    """At least ``n`` agents get the version, or the push fails.

    Raises:
        InputError: ``n`` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"a quorum of {self.n} agents", hint="1 or more")


#: ``all``: any failure fails the push.  ``available``: at least one agent is left.
Policy = Literal["all", "available"] | Quorum


def check_policy(policy: object) -> None:
    """Refuse what is no :data:`Policy`.

    Raises:
        InputError: It is none.
    """
    if not isinstance(policy, Quorum) and policy not in ("all", "available"):
        raise InputError(
            f"unknown policy {policy!r}", hint='"all", "available", or Quorum(n) for at least n'
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an agent was dropped, and in which phase."""

    phase: str
    error: WeightSyncError


class Roster:
    """The agents of one push: those that are present, and those that were dropped.

    An agent is dropped for the rest of the push, and of the epoch.

    Args:
        fleet: Its present agents take part.
        policy: How many may be dropped.

    Attributes:
        strict: No agent may be dropped.
        agents: All that the push started with.
        present: Those that are left.
        failures: Those that are not, by URL.
        on_drop: Called with each agent that is dropped; must not raise.

    Raises:
        InputError: The quorum is larger than the fleet.
    """

    def __init__(self, fleet: Fleet, policy: Policy = "all") -> None:
        self.fleet = fleet
        self.strict = policy == "all"
        self.agents = fleet.agents
        self.present = list(fleet.agents)
        self.failures: dict[str, Failure] = {}
        self.on_drop: Callable[[Agent], None] = lambda _: None
        self._least = len(self.agents) if self.strict else 1
        if isinstance(policy, Quorum):
            self._least = policy.n
            if policy.n > len(self.agents):
                raise InputError(
                    f"a quorum of {policy.n} of {len(self.agents)} agents",
                    hint="name more agents, or a smaller quorum",
                )

    @property
    def urls(self) -> list[str]:
        """Of those that are present."""
        return [agent.url for agent in self.present]

    def each(
        self, phase: str, call: Callable[[Agent], T], agents: Sequence[Agent] | None = None
    ) -> dict[str, T]:
        """``call`` of every present agent, or of some, all at once; those that fail are dropped.

        Raises:
            WeightSyncError: See :meth:`drop`.
        """
        answers = self.fleet.attempt(call, self.present if agents is None else agents)
        self.drop(phase, {u: a for u, a in answers.items() if isinstance(a, WeightSyncError)})
        return {u: a for u, a in answers.items() if not isinstance(a, WeightSyncError)}

    def drop(self, phase: str, failed: Mapping[str, WeightSyncError]) -> None:
        """Go on without these agents, if the policy bears it.

        Raises:
            WeightSyncError: It does not: the first agent's error; all others are notes on it.
        """
        failed = {agent.url: failed[agent.url] for agent in self.present if agent.url in failed}
        if not failed:
            return
        left = len(self.present) - len(failed)
        if left < self._least:
            error = first_of(list(failed.values()))
            for url, before in self.failures.items():
                error.add_note(f"dropped before, in {before.phase}: {url}: {before.error}")
            if not self.strict:
                error.add_note(
                    f"{left} of {len(self.agents)} agents are left, the policy wants {self._least}"
                )
            raise error
        for agent in [a for a in self.present if a.url in failed]:
            error = failed[agent.url]
            self.failures[agent.url] = Failure(phase, error)
            self.present.remove(agent)
            if phase != "check":  # a look at each step would say the same at each step
                _log.warning("agent %s is dropped in phase %s: %s", agent.url, phase, error)
            self.on_drop(agent)

    def forget(self, urls: Collection[str]) -> None:
        """On the other ranks: rank 0 has dropped these."""
        self.present = [agent for agent in self.present if agent.url not in urls]

    def outcome(
        self, url: str, state: str, version: int, seconds: dict[str, float] | None = None
    ) -> AgentOutcome:
        """An agent, and whether and why it was dropped."""
        failure = self.failures.get(url)
        if failure is None:
            return AgentOutcome(url, state, version, seconds or {})
        code, text = failure.error.code, str(failure.error)
        return AgentOutcome(
            url, state, version, seconds or {},
            ok=False, phase=failure.phase, code=code, error=text,
        )  # fmt: skip

    def bear(self, failed: Mapping[str, WeightSyncError]) -> None:
        """On any rank, before rank 0 hears of it: under policy ``all`` a failure is an error.

        Raises:
            WeightSyncError: The first agent's.
        """
        if failed and self.strict:
            raise first_of(list(failed.values()))


def failures(parts: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, WeightSyncError]:
    """What the ranks tell of agents that failed there, one problem an agent: the lowest rank's."""
    found: dict[str, WeightSyncError] = {}
    for rank, problems in enumerate(parts):
        for url, problem in problems.items():
            if url not in found:
                error = found[url] = from_problem(problem)
                error.context.setdefault("rank", rank)
                if len(parts) > 1:
                    error.message = f"rank {rank}: {error.message}"
                    error.args = (error.message,)
    return found
