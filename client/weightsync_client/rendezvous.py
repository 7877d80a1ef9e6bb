"""A new epoch: all ranks declare, each plans its part, the agents learn who writes what."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsync.errors import ManifestError, RegistrationError
from weightsync.geometry import Box
from weightsync.manifest import Manifest, TensorSpec
from weightsync.plan import Job, TransportPlan
from weightsync.protocol import (
    ConnectRequest,
    PushMode,
    RankOffer,
    StepResponse,
)
from weightsync.transport.base import Transport
from weightsync_client.answers import Answer, ask_layouts
from weightsync_client.control import Agent
from weightsync_client.converted import ConvertedSource
from weightsync_client.declaration import Introduction, introduce, join
from weightsync_client.gather import Gather
from weightsync_client.lending import LEND_NOTHING, Lending, Loan
from weightsync_client.policy import Roster, failures
from weightsync_client.pushed import Pushed
from weightsync_client.ranks import Ranks, no_undo
from weightsync_client.session import Offer, Session
from weightsync_client.settings import Deadlines
from weightsync_client.source import WeightSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Terms:
    """What every rank plans from; ``boxes[rank]`` are in the order of ``tensors``.

    ``coalesce_nbytes`` is rank 0's: plans that differ would not fit together.
    """

    session: str
    tensors: tuple[TensorSpec, ...]
    boxes: list[list[tuple[Box, ...]]]
    agents: list[Answer]
    coalesce_nbytes: int


@dataclass(frozen=True)
class _Prepared:
    """A rank's rounds, and what it could not prepare: problems by the agent's URL."""

    rounds: int
    failed: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Ready:
    """The most rounds of a rank, and the agents that all ranks drop."""

    rounds: int
    dropped: list[str]


def open_session(
    roster: Roster,
    ranks: Ranks,
    pushed: Pushed,
    *,
    make_transport: Callable[[], Transport],
    deadlines: Deadlines,
    ignore: Sequence[str],
    max_slot_nbytes: int | None,
    coalesce_nbytes: int = 0,
    lending: Lending = LEND_NOTHING,
    mode: PushMode = "direct",
    staged_only: bool = False,
    undo: Callable[[BaseException], None] = no_undo,
) -> Session:
    """Make a rendezvous of all ranks with every agent; the engines go on serving.

    Args:
        roster: The agents; rank 0 alone speaks to them.
        ranks: All of them call this.
        pushed: Tells what this rank has and where it lies.
        make_transport: Makes one with a name of its own.
        deadlines: Of the two rounds.
        ignore: Patterns of tensors that an engine may have no use for.
        max_slot_nbytes: Bound of this rank's slot memory.
        coalesce_nbytes: Tensors up to this that are cut over ranks are gathered; rank 0's counts.
        lending: What this rank may write from where it is.
        mode: Whether the bytes land in live memory or beside it.
        staged_only: See :class:`Session`.
        undo: See :meth:`weightsync_client.ranks.Ranks.meet`.

    Raises:
        ManifestError: Ranks disagree about a tensor, no engine takes it, or it does not fit.
        RefusedError: A kernel tensor could not be proven.
        PlanError: A byte would be written twice or not at all, or the bound is too small.
        WeightSyncError: Whatever else an agent answers, or fails on another rank.
    """
    timeout_s = deadlines.rendezvous_s
    opened: list[Session] = []

    def plan() -> Session:
        session = _plan(
            ranks.rank, terms, pushed, make_transport, ignore, max_slot_nbytes, lending, staged_only
        )
        opened.append(session)
        return session

    terms = ranks.meet(
        "declare",
        lambda: introduce(pushed.declaration, pushed.given, alone=ranks.world_size == 1),
        lambda introduced: _init(roster, introduced, coalesce_nbytes, mode, timeout_s),
        kind=Introduction,
        result=_Terms,
        work_s=timeout_s,
        decide_s=timeout_s + deadlines.grace_s,
        undo=undo,
    )
    try:
        return _connect(plan, terms.agents, roster, ranks, deadlines=deadlines, undo=undo)
    except BaseException:
        for session in opened:
            session.close()
        raise


def admit(
    session: Session,
    urls: Sequence[str],
    roster: Roster,
    ranks: Ranks,
    *,
    deadlines: Deadlines,
    mode: PushMode = "direct",
    undo: Callable[[BaseException], None] = no_undo,
) -> bool:
    """Make a rendezvous with these agents alone; the others keep their epochs, all their slots.

    Returns:
        False: a worker wants what no worker of the plan wants, so it takes a rendezvous of all.

    Raises:
        WeightSyncError: Whatever an agent answers, or fails on a rank: none was taken in.
    """
    timeout_s = deadlines.rendezvous_s

    def ask(_: list[None]) -> list[Answer] | None:
        found = []
        for answer in ask_layouts(
            roster, session.manifest, ranks.world_size, mode=mode, timeout_s=timeout_s, urls=urls
        ):
            likes = session.like(answer.layouts())
            if likes is None:
                return None
            found.append(replace(answer, likes=likes))
        return found

    def add() -> Session:
        for answer in answers or ():
            session.add(answer.url, answer.member(answer.layouts(), answer.likes))
        return session

    answers = ranks.meet(
        "join", lambda: None, ask, kind=None, result=list[Answer] | None,
        decide_s=timeout_s + deadlines.grace_s, undo=undo,
    )  # fmt: skip
    if answers is None:
        return False
    try:
        _connect(add, answers, roster, ranks, deadlines=deadlines, undo=undo)
    except BaseException:
        for url in urls:
            session.drop(url)
        raise
    return True


def _connect(
    make: Callable[[], Session],
    answers: Sequence[Answer],
    roster: Roster,
    ranks: Ranks,
    *,
    deadlines: Deadlines,
    undo: Callable[[BaseException], None],
) -> Session:
    """The second round, with the agents that answered to the first; who fails is dropped."""
    timeout_s = deadlines.rendezvous_s
    by_url = {answer.url: answer for answer in answers}
    made: list[Session] = []

    def offer() -> dict[str, Offer]:
        made.append(make())
        return {url: made[0].offer(url) for url in by_url}

    def connect(offers: list[dict[str, Offer]]) -> list[str]:
        def call(agent: Agent) -> None:
            here = [
                RankOffer(rank=rank, metadata=o.metadata, writes=o.writes, writer=o.writer)
                for rank, o in enumerate(offered[agent.url] for offered in offers)
            ]
            request = ConnectRequest(
                session=by_url[agent.url].session,
                epoch=by_url[agent.url].epoch,
                ranks=[o for o in here if any(o.writes)] or here[:1],
                timeout_s=timeout_s,
            )
            agent.post("/connect", request, StepResponse, timeout_s=timeout_s)

        done = roster.each("rendezvous", call, [a for a in roster.present if a.url in by_url])
        return [url for url in by_url if url not in done]

    def prepare() -> _Prepared:
        failed = made[0].prepare([url for url in by_url if url not in lost])
        roster.bear(failed)
        return _Prepared(made[0].rounds, {url: e.to_problem() for url, e in failed.items()})

    def total(prepared: list[_Prepared]) -> _Ready:
        failed = failures([p.failed for p in prepared])
        roster.drop("rendezvous", failed)
        return _Ready(max(p.rounds for p in prepared), list(failed))

    lost = ranks.meet(
        "connect", offer, connect, kind=dict[str, Offer], result=list[str],
        work_s=timeout_s, decide_s=timeout_s + deadlines.grace_s, undo=undo,
    )  # fmt: skip
    ready = ranks.meet(
        "prepare", prepare, total, kind=_Prepared, result=_Ready, work_s=timeout_s, undo=undo
    )
    (session,) = made
    session.most_rounds = ready.rounds
    for url in (*lost, *ready.dropped):
        session.drop(url)
    return session


def _init(
    roster: Roster,
    introduced: Sequence[Introduction],
    coalesce_nbytes: int,
    mode: PushMode,
    timeout_s: float,
) -> _Terms:
    """The first round, on rank 0: the whole manifest to every agent."""
    manifest = join(introduced)
    answers = ask_layouts(roster, manifest, len(introduced), mode=mode, timeout_s=timeout_s)
    boxes = []
    for one in introduced:
        held = one.declaration.holdings
        boxes.append([tuple(held.get(t.name, ())) for t in manifest])
    return _Terms(answers[0].session, manifest.tensors, boxes, answers, coalesce_nbytes)


def _plan(
    rank: int,
    terms: _Terms,
    pushed: Pushed,
    make_transport: Callable[[], Transport],
    ignore: Sequence[str],
    max_slot_nbytes: int | None,
    lending: Lending,
    staged_only: bool,
) -> Session:
    """This rank's part: every rank plans from the same terms, so all parts fit together."""
    manifest = Manifest(terms.tensors)
    of_agents = [answer.layouts() for answer in terms.agents]
    layouts = [layout for of_agent in of_agents for layout in of_agent]
    try:
        job = Job.of(
            manifest,
            layouts,
            [
                {t.name: boxes for t, boxes in zip(manifest, held, strict=True) if boxes}
                for held in terms.boxes
            ],
            allow_skipped=ignore,
            coalesce_nbytes=terms.coalesce_nbytes,
        )
    except ManifestError as error:
        _tell_rule(error, pushed.given)
        raise
    if rank == 0:  # for all: it is the same job everywhere, and an error here is raised everywhere
        job.prove()
    device = pushed.device

    def make(plan: TransportPlan, loan: Loan) -> Session:
        gather = Gather(plan.shares, rank=rank, manifest=manifest, device=device)
        return Session(
            terms.session,
            declaration=pushed.declaration,
            manifest=manifest,
            layouts=layouts,
            plan=plan,
            gather=gather if job.gathered else None,
            device=device,
            loan=loan,
            make_transport=make_transport,
            staged_only=staged_only,
        )

    least_nbytes = lending.least_nbytes
    source = pushed.source if least_nbytes else None
    loan = Loan(source, manifest, device, without=lending.without)
    plan = job.plan(
        rank, max_slot_nbytes=max_slot_nbytes, lendable=loan.lendable, lend_nbytes=least_nbytes
    )
    try:
        session = make(plan, loan)
    except RegistrationError as error:
        if not plan.lent:
            raise
        logger.warning("the weights are copied before they are written: %s", error)
        plan = job.plan(rank, max_slot_nbytes=max_slot_nbytes)
        session = make(plan, Loan(None, manifest, device))
    likes = iter(range(len(layouts)))
    for answer, of_agent in zip(terms.agents, of_agents, strict=True):
        session.add(answer.url, answer.member(of_agent, [next(likes) for _ in of_agent]))
    return session


def _tell_rule(error: ManifestError, source: WeightSource) -> None:
    """Say which rule of a conversion made a name that no engine wants."""
    names = error.context.get("names")
    if names and isinstance(source, ConvertedSource):
        error.hint += f"; {names[0]!r} is made by {source.maker(names[0])}"
    elif names:
        error.hint += "; a trainer's other names and layouts want Publisher(conversion=...)"
