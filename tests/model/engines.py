"""An engine and its workers (as the middleware and ``Receiver``)."""

from __future__ import annotations

from tests.model.records import Command, Engine, Worker, shadowed
from weightsync.state import Effect
from weightsync.state_events import (
    Aborted,
    Attached,
    BeginAsked,
    CommitAsked,
    Committed,
    ConnectAsked,
    Connected,
    InitAsked,
    Outcome,
    Paused,
    PrepareAsked,
    Resumed,
    SessionOpened,
)


def carry_out(
    engine: Engine, command: Command, reached: int | None
) -> tuple[Engine, Outcome | None]:
    """What the engine does, and the answer; None: some worker refused, or there is none."""
    event, effect = command.event, command.effect
    if effect in (Effect.PAUSE, Effect.RESUME):
        # what was sent before the last pause or resume was heard is refused
        if reached == 0 or command.turn != engine.turn:
            return engine, None
        pauses = effect is Effect.PAUSE
        told = Paused(getattr(event, "push_id", None)) if pauses else Resumed()
        return engine._replace(paused=pauses, turn=engine.turn + 1), told
    if effect is Effect.OPEN:
        engine = engine._replace(opened=engine.opened + 1)
    n = len(engine.workers) if reached is None else reached
    done = [work(worker, command, engine.opened) for worker in engine.workers[:n]]
    refused = any(worker is None for worker in done)
    workers = tuple(
        old if new is None else new for old, new in zip(engine.workers, done, strict=False)
    )
    workers += engine.workers[n:]
    engine = engine._replace(workers=workers)
    versions = frozenset(worker.version for worker in workers)
    dirty = any(worker.dirty for worker in workers)
    outcome: Outcome | None = None
    match event:
        case _ if refused:
            pass
        case _ if effect is Effect.ATTACH:
            epoch = max(worker.epoch for worker in workers)
            outcome = Attached(versions, dirty, engine.paused, epoch, same=False)
        case _ if effect is Effect.ABORT:
            outcome = Aborted(versions, dirty)
        case InitAsked(session) if effect is Effect.OPEN:
            outcome = SessionOpened(session, command.epoch)
        case ConnectAsked(_, epoch) if effect is Effect.CONNECT:
            outcome = Connected(epoch)
        case CommitAsked() if effect is Effect.COMMIT:
            outcome = Committed(event.version)
        case _ if effect in (Effect.BEGIN, Effect.PREPARE):
            outcome = _BEGUN
    return engine, outcome


#: a begin that went well tells the state machine nothing; it ignores this
_BEGUN = Resumed()


def _arrived(worker: Worker, epoch: int, push: str, version: int) -> bool:
    begun = worker.epoch == epoch and worker.push == (push, version)
    there = worker.memory if worker.beside is None else worker.beside
    return begun and version in worker.told and there == push


def work(worker: Worker, command: Command, opened: int) -> Worker | None:
    """One worker's part, as :class:`weightsync_server.receiver.receiver.Receiver` does it."""
    closed = Worker(worker.memory, worker.version, worker.dirty)
    match command.effect, command.event:
        case Effect.OPEN, InitAsked(session):
            beside = "" if shadowed(session) else None
            return closed._replace(epoch=command.epoch, registration=opened, beside=beside)
        case Effect.CONNECT, ConnectAsked(session, epoch):
            return worker._replace(peer=session) if worker.epoch == epoch else None
        case Effect.BEGIN, BeginAsked(_, epoch, push, version):
            newer = version > worker.version or (version == worker.version and worker.dirty)
            if not newer or worker.epoch != epoch or not worker.peer:
                return None
            if worker.push == (push, version):
                return worker
            if version <= worker.begun:
                return None
            # bytes that land beside what serves make nothing dirty
            dirty = worker.dirty or worker.beside is None
            return worker._replace(push=(push, version), begun=version, dirty=dirty)
        case Effect.PREPARE, PrepareAsked(_, epoch, push, version):
            there = _arrived(worker, epoch, push, version)
            return worker._replace(prepared=True) if there else None
        case Effect.COMMIT, CommitAsked(_, epoch, push, version):
            if not (worker.prepared or _arrived(worker, epoch, push, version)):
                return None
            if worker.beside is not None:  # exchanged: what served lies beside now
                worker = worker._replace(memory=worker.beside, beside=worker.memory)
            whole = worker._replace(version=version, dirty=False, push=None, told=frozenset())
            return whole._replace(prepared=False)
        case Effect.ABORT, _:
            return closed if worker.push is not None else worker
        case Effect.CLOSE, _:
            return closed
    return worker
