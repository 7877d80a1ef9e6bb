"""From filled slots to engines that serve them: pause, begin, write, commit, resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsync.errors import NoSessionError, WeightSyncError
from weightsync.protocol import RankDigests
from weightsync_client.attempt import Attempt
from weightsync_client.fresh import check_held
from weightsync_client.policy import failures
from weightsync_client.report import PushReport
from weightsync_client.session import Session
from weightsync_client.shadow import ShadowTransaction, lands_aside
from weightsync_client.source import WeightSource
from weightsync_client.trace import Span
from weightsync_client.transaction import Transaction

#: a push is not given up by its agents, nor by rank 0, so soon after the slots were filled
_FOLLOWER_FRESH_S = 20.0

#: digests of what a rank writes, by the agent's URL
Digests = dict[str, list[str]]


@dataclass(frozen=True)
class _Wrote:
    """What a rank could not write, as problems by the agent's URL, and its part of the trace."""

    failed: dict[str, dict[str, Any]]
    marks: list[Span]


class Transfer:
    """What the slots hold goes to the agents of an attempt's roster; one on each rank.

    Args:
        attempt: Whose version it is.
        session: The agents are in it.
    """

    def __init__(self, attempt: Attempt, session: Session) -> None:
        self._attempt = attempt
        self._session = session
        self._deadlines = attempt.settings.deadlines
        self._filled_at = 0.0
        self._marks: list[list[Span]] = []
        # what lands beside live weights goes before the pause; all of it, or what there is room for
        aside = lands_aside(session)
        self._splits = not aside and session.split and session.most_rounds == 1
        self._waits = attempt.settings.mode == "shadow" and (aside or self._splits)

    def run(
        self,
        fill: Callable[[], Digests],
        *,
        source: Callable[[], WeightSource | None],
        fill_s: float,
    ) -> PushReport:
        """Fill, pause, begin, write, commit, resume; all ranks call this.

        Args:
            fill: Makes the slots whole, and tells their digests.
            source: What later rounds are filled from, once ``fill`` is done.
            fill_s: That ``fill`` may take.
        """
        attempt, session, deadlines = self._attempt, self._session, self._deadlines

        def work() -> Digests:
            digests = fill()
            self._filled_at = time.monotonic()
            return digests

        lost = attempt.meet(
            "fill", work, self._pause_and_begin, kind=Digests, result=list[str], work_s=fill_s,
            decide_s=deadlines.pause_s + deadlines.begin_s + 2 * deadlines.grace_s,
        )  # fmt: skip
        self._drop(lost)
        if attempt.held.ranks.rank:
            attempt.recorder.anchor = time.perf_counter()
        attempt.held.used(attempt.version)
        # From here on another rank may have written, whatever becomes of this one.
        attempt.wrote_nothing = False
        write_s = deadlines.for_bytes(deadlines.write_s, session.nbytes)
        commit_s = deadlines.for_bytes(deadlines.commit_s, session.job.nbytes)
        if self._splits:
            lost = attempt.meet(
                "aside", lambda: self._write(source(), write_s, (0,)),
                lambda parts: self._check_and_pause(parts, commit_s),
                kind=_Wrote, result=list[str],
                work_s=write_s if attempt.roster.strict else 2 * write_s,
                decide_s=commit_s + deadlines.pause_s + deadlines.begin_s + 3 * deadlines.grace_s,
            )  # fmt: skip
            self._drop(lost)
        report = attempt.meet(
            "write",
            lambda: self._write(source(), write_s, (1,) if self._splits else None),
            lambda parts: self._commit_and_resume(parts, commit_s),
            kind=_Wrote, result=PushReport,
            work_s=write_s if attempt.roster.strict else 2 * write_s,
            decide_s=self._waits * (commit_s + deadlines.pause_s + 2 * deadlines.grace_s)
            + commit_s + 2 * deadlines.resume_s + 3 * deadlines.grace_s,
        )  # fmt: skip
        self._drop([agent.url for agent in report.agents if not agent.ok])
        session.sent = attempt.version
        if session.in_flight:  # it may still land: nothing of this epoch is used again (WS-8)
            attempt.held.end_session()
        attempt.tell_released(attempt.let_go, aside=True)
        if attempt.held.ranks.rank == 0:
            report = replace(report, spans=attempt.recorder.timeline(self._marks))
        return report

    def _drop(self, urls: list[str]) -> None:
        self._attempt.roster.forget(urls)
        for url in urls:
            if (member := self._session.members.get(url)) is not None:
                self._attempt.let_go[url] = member.session
            self._session.drop(url)

    def _pause_and_begin(self, parts: list[Digests]) -> list[str]:
        attempt, roster = self._attempt, self._attempt.roster
        before = roster.urls
        kind = ShadowTransaction if self._waits else Transaction
        attempt.transaction = transaction = kind(
            roster,
            self._session,
            {
                url: [RankDigests(rank=r, digests=part[url]) for r, part in enumerate(parts)]
                for url in before
            },
            push_id=attempt.push_id,
            version=attempt.version,
            deadlines=self._deadlines,
            pause_mode=attempt.settings.pause_mode,
            reset_caches=attempt.settings.reset_caches,
            recorder=attempt.recorder,
            joined=attempt.settings.joined,
        )
        if transaction.joined and not self._waits:
            self._pause_and_begin_at_once(transaction)
        else:
            if not self._waits:
                attempt.enter("pause")
                transaction.pause()
            attempt.held.used(attempt.version)
            attempt.enter("begin")
            transaction.begin()
        attempt.enter("write")
        attempt.recorder.anchor = time.perf_counter()
        return [url for url in before if url not in roster.urls]

    def _pause_and_begin_at_once(self, transaction: Transaction) -> None:
        attempt = self._attempt
        attempt.enter("pause")
        try:
            begin_s = transaction.pause_and_begin()
        except WeightSyncError as error:
            if error.context.get("step") == "begin":
                attempt.enter("begin")
            raise
        finally:
            if transaction.began:
                attempt.held.used(attempt.version)
        attempt.enter("begin", ago_s=begin_s)

    def _check_and_pause(self, parts: list[_Wrote], commit_s: float) -> list[str]:
        """Of a shadow that holds a part: it is written; the rest goes to live memory next."""
        attempt, roster, transaction = self._attempt, self._attempt.roster, self._shadowed()
        before = roster.urls
        roster.drop("write", failures([part.failed for part in parts]))
        attempt.enter("prepare")
        transaction.prepare(timeout_s=commit_s)
        attempt.enter("pause")
        transaction.pause()
        attempt.enter("begin")
        transaction.begin_live()
        attempt.enter("write")
        return [url for url in before if url not in roster.urls]

    def _shadowed(self) -> ShadowTransaction:
        transaction = self._attempt.transaction
        if not isinstance(transaction, ShadowTransaction):
            raise NoSessionError("no push was begun", hint="push again")
        return transaction

    def _write(
        self, source: WeightSource | None, timeout_s: float, steps: Sequence[int] | None
    ) -> _Wrote:
        """Write to everybody; what failed, if the policy bears that."""
        attempt, roster = self._attempt, self._attempt.roster
        if attempt.transaction is not None:
            failed = attempt.transaction.check_held()
        else:  # not rank 0, and the word to write may have lain here while this rank stood still
            failed = check_held(
                roster,
                attempt.push_id,
                self._deadlines,
                heard_at=self._filled_at,
                fresh_s=_FOLLOWER_FRESH_S,
            )
        with attempt.recorder.during("write"):
            failed |= self._session.write(
                attempt.version,
                source,
                timeout_s=timeout_s,
                agents=[url for url in roster.urls if url not in failed],
                strict=roster.strict,
                steps=steps,
            )
        attempt.recorder.writes(self._session.written())
        marks = attempt.recorder.told() if attempt.held.ranks.rank else []
        return _Wrote({url: error.to_problem() for url, error in failed.items()}, marks)

    def _commit_and_resume(self, parts: list[_Wrote], commit_s: float) -> PushReport:
        attempt, session, transaction = self._attempt, self._session, self._attempt.transaction
        if transaction is None:
            raise NoSessionError("no push was begun", hint="push again")
        self._marks = [part.marks for part in parts]
        attempt.roster.drop("write", failures([part.failed for part in parts]))
        nbytes = session.job.nbytes
        attempt.enter("resume", ago_s=self._commit(transaction, commit_s))
        transaction.resume()
        attempt.enter("")
        paused_s = time.perf_counter() - attempt.paused_at
        return PushReport(
            version=attempt.version,
            push_id=attempt.push_id,
            nbytes=nbytes,
            rounds=session.job.rounds,
            paused_s=paused_s,
            spans=(),
            agents=transaction.outcomes(),
            total_s=time.perf_counter() - attempt.started,
            **{f"{phase}_s": seconds for phase, seconds in attempt.seconds.items()},
        )

    def _commit(self, transaction: Transaction, commit_s: float) -> float:
        """Of a shadow, what comes before it, too; seconds that the resume in the same call took."""
        attempt = self._attempt
        if isinstance(transaction, ShadowTransaction) and not self._splits:
            attempt.enter("prepare")
            transaction.prepare(timeout_s=commit_s)
            attempt.enter("pause")
            if transaction.joined:
                return self._pause_and_commit(transaction, commit_s)
            transaction.pause()
        attempt.enter("commit")
        return transaction.commit(timeout_s=commit_s)[1]

    def _pause_and_commit(self, transaction: Transaction, commit_s: float) -> float:
        attempt = self._attempt
        try:
            since_paused_s, resumed_s = transaction.commit(timeout_s=commit_s, pause=True)
        except WeightSyncError as error:
            if error.context.get("step") != "pause":
                attempt.enter("commit")
            raise
        attempt.enter("commit", ago_s=since_paused_s)
        return resumed_s
