"""The first round of a rendezvous: what the agents' workers want, and how they are reached."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from weightsync.codec import pack, unpack
from weightsync.layout import WorkerLayout
from weightsync.manifest import Manifest
from weightsync.protocol import (
    PROTOCOL_VERSION,
    InitTransferRequest,
    InitTransferResponse,
    PushMode,
)
from weightsync_client.control import Agent
from weightsync_client.peers import Member, Worker
from weightsync_client.policy import Roster


@dataclass(frozen=True)
class Answer:
    """What one agent answered to ``/init_transfer``; ``workers`` are (place, metadata, layout).

    ``likes`` names for each a worker of the plan; empty: the plan is yet to be made.
    """

    url: str
    session: str
    epoch: int
    workers: list[tuple[str, bytes, str]]
    likes: list[int] = field(default_factory=list)

    def layouts(self) -> list[WorkerLayout]:
        """Of its workers."""
        return [unpack(layout, WorkerLayout) for *_, layout in self.workers]

    def member(self, layouts: Sequence[WorkerLayout], likes: Sequence[int]) -> Member:
        """The agent as a session has it."""
        workers = [
            Worker(self.url, place, metadata, layout, like)
            for (place, metadata, _), layout, like in zip(self.workers, layouts, likes, strict=True)
        ]
        return Member(self.session, self.epoch, tuple(workers))


def ask_layouts(
    roster: Roster,
    manifest: Manifest,
    world_size: int,
    *,
    mode: PushMode = "direct",
    timeout_s: float,
    urls: Collection[str] | None = None,
) -> list[Answer]:
    """``POST /init_transfer``, which ends whatever rendezvous is open there, under a new session.

    Args:
        roster: Whom to ask; those that fail are dropped.
        manifest: Of all ranks.
        world_size: How many they are.
        mode: Whether the bytes land in live memory or beside it.
        timeout_s: For all answers.
        urls: Ask these alone.

    Returns:
        The agents' answers in the roster's order.
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
            mode=mode,
        )
        answer = agent.post("/init_transfer", request, InitTransferResponse, timeout_s=timeout_s)
        workers = [(w.place, base64.b64decode(w.metadata), w.layout) for w in answer.workers]
        return Answer(agent.url, session_id, answer.epoch, workers)

    asked = [a for a in roster.present if urls is None or a.url in urls]
    return list(roster.each("rendezvous", call, asked).values())
