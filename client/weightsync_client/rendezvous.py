"""A new epoch: all ranks declare, each plans its part, the agents learn who writes what."""

from __future__ import annotations

import base64
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from weightsync.codec import pack, unpack
from weightsync.errors import ManifestError, RegistrationError
from weightsync.geometry import Box
from weightsync.layout import WorkerLayout
from weightsync.manifest import Manifest, TensorSpec
from weightsync.plan import Job, TransportPlan
from weightsync.protocol import (
    PROTOCOL_VERSION,
    ConnectRequest,
    InitTransferRequest,
    InitTransferResponse,
    RankOffer,
    StepResponse,
)
from weightsync.transport.base import Transport
from weightsync_client.control import Agent, Fleet
from weightsync_client.converted import ConvertedSource
from weightsync_client.declaration import Declaration, Introduction, introduce, join
from weightsync_client.gather import Gather
from weightsync_client.lending import LEND_NOTHING, Lending, Loan
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.quantized import QuantizedSource
from weightsync_client.ranks import Ranks, no_undo
from weightsync_client.session import JobSize, Offer, Session, Worker
from weightsync_client.settings import Deadlines
from weightsync_client.source import Conversion, Weights, WeightSource, as_source

logger = logging.getLogger(__name__)


class Pushed:
    """What ``push`` was handed, on one rank: looked at once a push.

    Args:
        model: See :meth:`weightsync_client.publisher.Publisher.push`.
        conversion: What makes checkpoint tensors of it.
        quantization: What of those is published as fp8.
    """

    def __init__(
        self,
        model: Weights,
        conversion: Conversion = "auto",
        quantization: QuantizationSpec | None = None,
    ) -> None:
        self._model = model
        self._conversion = conversion
        self._quantization = quantization

    @cached_property
    def given(self) -> WeightSource:
        """Where the checkpoint's values are.  Errors are :func:`as_source`'s."""
        return as_source(self._model, self._conversion)

    @cached_property
    def quantized(self) -> QuantizedSource | None:
        """Where the published values come from, if some are quantised."""
        if self._quantization is None:
            return None
        return QuantizedSource(self.given, self._quantization)

    @property
    def source(self) -> WeightSource:
        """Where the published values come from."""
        return self.given if self.quantized is None else self.quantized

    @cached_property
    def declaration(self) -> Declaration:
        """What this rank has."""
        return Declaration.of(self.source)


@dataclass(frozen=True)
class Answer:
    """What one agent answered to ``/init_transfer``; ``workers`` are (place, metadata, layout)."""

    epoch: int
    workers: list[tuple[str, bytes, str]]


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


def open_session(
    fleet: Fleet,
    ranks: Ranks,
    pushed: Pushed,
    *,
    make_transport: Callable[[], Transport],
    deadlines: Deadlines,
    ignore: Sequence[str],
    max_slot_nbytes: int | None,
    coalesce_nbytes: int = 0,
    lending: Lending = LEND_NOTHING,
    staged_only: bool = False,
    undo: Callable[[BaseException], None] = no_undo,
) -> Session:
    """Make a rendezvous of all ranks with every agent; the engines go on serving.

    Args:
        fleet: All agents; rank 0 alone speaks to them.
        ranks: All of them call this.
        pushed: Tells what this rank has and where it lies.
        make_transport: Makes one with a name of its own.
        deadlines: Of the two rounds.
        ignore: Patterns of tensors that an engine may have no use for.
        max_slot_nbytes: Bound of this rank's slot memory.
        coalesce_nbytes: Tensors up to this that are cut over ranks are gathered; rank 0's counts.
        lending: What this rank may write from where it is.
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

    def plan() -> list[Offer]:
        session = _plan(
            ranks.rank, terms, pushed, make_transport, ignore, max_slot_nbytes, lending, staged_only
        )
        opened.append(session)
        return [session.offer(agent) for agent in range(len(terms.agents))]

    def connect(offers: list[list[Offer]]) -> None:
        def call(agent: Agent) -> None:
            here = [
                RankOffer(rank=rank, metadata=o.metadata, writes=o.writes)
                for rank, o in enumerate(offered[agent.index] for offered in offers)
            ]
            request = ConnectRequest(
                session=terms.session,
                epoch=terms.agents[agent.index].epoch,
                ranks=[o for o in here if any(o.writes)] or here[:1],
                timeout_s=timeout_s,
            )
            agent.post("/connect", request, StepResponse, timeout_s=timeout_s)

        fleet.each(call)

    def total(sizes: list[JobSize]) -> JobSize:
        return JobSize(sum(s.nbytes for s in sizes), max(s.rounds for s in sizes))

    terms = ranks.meet(
        "declare",
        lambda: introduce(pushed.declaration, pushed.given, alone=ranks.world_size == 1),
        lambda introduced: _init(fleet, introduced, coalesce_nbytes, timeout_s),
        kind=Introduction,
        result=_Terms,
        work_s=timeout_s,
        decide_s=timeout_s + deadlines.grace_s,
        undo=undo,
    )
    try:
        ranks.meet(
            "connect", plan, connect, kind=list[Offer], result=None,
            work_s=timeout_s, decide_s=timeout_s + deadlines.grace_s, undo=undo,
        )  # fmt: skip
        (session,) = opened
        session.job = ranks.meet(
            "prepare", session.prepare, total, kind=JobSize, result=JobSize, work_s=timeout_s,
            undo=undo,
        )  # fmt: skip
    except BaseException:
        for session in opened:
            session.close()
        raise
    return session


def _init(
    fleet: Fleet, introduced: Sequence[Introduction], coalesce_nbytes: int, timeout_s: float
) -> _Terms:
    """The first round, on rank 0: the whole manifest to every agent."""
    manifest = join(introduced)
    session_id, answers = ask_layouts(fleet, manifest, len(introduced), timeout_s=timeout_s)
    boxes = []
    for one in introduced:
        held = one.declaration.holdings
        boxes.append([tuple(held.get(t.name, ())) for t in manifest])
    return _Terms(session_id, manifest.tensors, boxes, answers, coalesce_nbytes)


def ask_layouts(
    fleet: Fleet, manifest: Manifest, world_size: int, *, timeout_s: float
) -> tuple[str, list[Answer]]:
    """``POST /init_transfer`` to every agent, which ends whatever rendezvous is open there.

    Returns:
        The new session, and the agents' answers in the fleet's order.
    """
    session_id = f"s-{uuid.uuid4().hex}"
    packed = pack(manifest.tensors)

    def call(agent: Agent) -> Answer:
        request = InitTransferRequest(
            protocol_version=PROTOCOL_VERSION,
            session=session_id,
            manifest=packed,
            world_size=world_size,
            timeout_s=timeout_s,
        )
        answer = agent.post("/init_transfer", request, InitTransferResponse, timeout_s=timeout_s)
        workers = [(w.place, base64.b64decode(w.metadata), w.layout) for w in answer.workers]
        return Answer(answer.epoch, workers)

    return session_id, fleet.each(call)


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
    found = [
        (agent, place, metadata, unpack(layout, WorkerLayout))
        for agent, answer in enumerate(terms.agents)
        for place, metadata, layout in answer.workers
    ]
    try:
        job = Job.of(
            manifest,
            [layout for *_, layout in found],
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
    device = _device(pushed.given)

    def make(plan: TransportPlan, loan: Loan) -> Session:
        gather = Gather(plan.shares, rank=rank, manifest=manifest, device=device)
        return Session(
            terms.session,
            epochs=[answer.epoch for answer in terms.agents],
            declaration=pushed.declaration,
            manifest=manifest,
            workers=[Worker(*one) for one in found],
            plan=plan,
            gather=gather if job.gathered else None,
            device=device,
            loan=loan,
            make_transport=make_transport,
            staged_only=staged_only,
        )

    least_nbytes = lending.least_on(device)
    source = pushed.source if least_nbytes else None
    loan = Loan(source, manifest, device, without=lending.without)
    plan = job.plan(
        rank, max_slot_nbytes=max_slot_nbytes, lendable=loan.lendable, lend_nbytes=least_nbytes
    )
    try:
        return make(plan, loan)
    except RegistrationError as error:
        if not plan.lent:
            raise
        logger.warning("the weights are copied before they are written: %s", error)
    return make(job.plan(rank, max_slot_nbytes=max_slot_nbytes), Loan(None, manifest, device))


def _tell_rule(error: ManifestError, source: WeightSource) -> None:
    """Say which rule of a conversion made a name that no engine wants."""
    names = error.context.get("names")
    if names and isinstance(source, ConvertedSource):
        error.hint += f"; {names[0]!r} is made by {source.maker(names[0])}"
    elif names:
        error.hint += "; a trainer's other names and layouts want Publisher(conversion=...)"


def _device(source: WeightSource) -> torch.device:
    """Where most of this rank's bytes are: its slots are filled there."""
    nbytes: Counter[torch.device] = Counter()
    for name, boxes in source.holdings().items():
        for index in range(len(boxes)):
            local = source.local(name, index)
            nbytes[local.device] += local.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else torch.device("cpu")
