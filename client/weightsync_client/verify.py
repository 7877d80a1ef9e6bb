"""Do engines serve exactly these weights?  Compared by digests, with no write to live memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weightsync.protocol import Difference, RankDigests, VerifyRequest, VerifyResponse
from weightsync.transport.base import Transport
from weightsync_client.control import Agent, Fleet
from weightsync_client.gloo import make_ranks
from weightsync_client.peers import Worker
from weightsync_client.policy import Roster
from weightsync_client.pushed import Pushed
from weightsync_client.rendezvous import open_session
from weightsync_client.settings import Deadlines
from weightsync_client.source import Weights


@dataclass(frozen=True, slots=True)
class KernelDifference:
    """A kernel tensor that a push of these weights would change.

    ``checkpoint_tensors`` are all that land in it: one of them, at least, is other.
    """

    place: str
    kernel_tensor: str
    checkpoint_tensors: tuple[str, ...]
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one agent's engines hold, compared with the weights.

    ``version`` is the agent's; ``kernel_tensors`` were compared, over all its workers.
    """

    url: str
    version: int
    kernel_tensors: int
    differs: tuple[KernelDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether a push of the weights would change nothing."""
        return not self.differs

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every field, and ``equal``."""
        return {**asdict(self), "equal": self.equal}


def verify(
    fleet: Fleet,
    weights: Weights,
    *,
    make_transport: Callable[[], Transport],
    deadlines: Deadlines,
    ignore: Sequence[str] = (),
    max_slot_nbytes: int | None = None,
) -> list[Verdict]:
    """Compare what every engine of the fleet serves with ``weights``; they serve meanwhile.

    It takes a rendezvous as a push does, which ends the one that is open: a trainer's next push
    makes a new one.  Staged tensors are sent to the engines' buffers, all others stay here.

    Args:
        fleet: All agents.
        weights: As :meth:`weightsync_client.publisher.Publisher.push` takes them.
        make_transport: Makes one with a name of its own.
        deadlines: Of the rendezvous, of what is written, and of the comparison (``commit_s``).
        ignore: Patterns of tensors that an engine may have no use for.
        max_slot_nbytes: Bound of the memory that the weights are packed in.

    Raises:
        ManifestError: These are no weights for that engine.
        PushInProgressError: A push holds an engine.
        WeightSyncError: Whatever else a rendezvous or an agent may fail with.
    """
    ranks = make_ranks(None, apart_s=deadlines.ranks_s)
    pushed = Pushed(weights)
    session = open_session(
        Roster(fleet),
        ranks,
        pushed,
        make_transport=make_transport,
        deadlines=deadlines,
        ignore=ignore,
        max_slot_nbytes=max_slot_nbytes,
        staged_only=True,
    )
    try:
        digests = session.fill(pushed.source, check_finite=False)
        timeout_s = deadlines.for_bytes(deadlines.write_s, session.nbytes)
        if any(r.mode == "staged" for w in session.workers for r in w.layout.regions):
            session.write(0, pushed.source, timeout_s=timeout_s)
        commit_s = deadlines.for_bytes(deadlines.commit_s, session.nbytes)

        def ask(agent: Agent) -> Verdict:
            member = session.members[agent.url]
            request = VerifyRequest(
                session=member.session,
                epoch=member.epoch,
                ranks=[RankDigests(rank=0, digests=digests[agent.url])],
                timeout_s=commit_s,
            )
            answer = agent.post("/verify", request, VerifyResponse, timeout_s=commit_s)
            differs = tuple(_named(d, member.workers) for d in answer.differs)
            return Verdict(agent.url, answer.version, answer.kernel_tensors, differs)

        return fleet.each(ask)
    finally:
        session.close()


def _named(found: Difference, workers: Sequence[Worker]) -> KernelDifference:
    names: dict[str, None] = {}
    for worker in workers:
        if worker.place == found.place:
            regions = worker.layout.regions
            for record in worker.layout.records:
                if regions[record.region].name == found.tensor:
                    names[record.tensor] = None
    return KernelDifference(found.place, found.tensor, tuple(names), found.what)
