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
    RollbackAsked,
    RolledBack,
    SessionOpened,
)

IN_TURN = frozenset({Effect.PAUSE, Effect.RESUME, Effect.ROLLBACK})


def carry_out(
    engine: Engine, command: Command, reached: int | None
) -> tuple[Engine, Outcome | None]:
    """What the engine does, and the answer; None: some worker refused, or there is none."""
    event, effect = command.event, command.effect
    # what was sent before the last pause or resume was heard is refused
    if effect in IN_TURN and command.turn != engine.turn:
        return engine, None
    if effect in (Effect.PAUSE, Effect.RESUME):
        if reached == 0:
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
    kept = {worker.kept and worker.kept[0] for worker in workers}
    before = kept.pop() if len(kept) == 1 else None
    outcome: Outcome | None = None
    match event:
        case _ if refused:
            pass
        case _ if effect is Effect.ATTACH:
            epoch = max(worker.epoch for worker in workers)
            newest = max(worker.given_up for worker in workers)
            outcome = Attached(
                versions, dirty, engine.paused, epoch,
                same=False, rollback_to=before, rolled_back_from=newest,
            )  # fmt: skip
        case _ if effect is Effect.ABORT:
            outcome = Aborted(versions, dirty, before)
        case InitAsked(session) if effect is Effect.OPEN:
            outcome = SessionOpened(session, command.epoch, before)
        case ConnectAsked(_, epoch) if effect is Effect.CONNECT:
            outcome = Connected(epoch)
        case CommitAsked() if effect is Effect.COMMIT:
            outcome = Committed(event.version, rollback_to=before)
        case RollbackAsked() if effect is Effect.ROLLBACK:
            assert command.to is not None
            outcome = RolledBack(command.to, max(worker.given_up for worker in workers))
        case _ if effect in (Effect.BEGIN, Effect.PREPARE):
            outcome = _BEGUN
    return engine, outcome


#: a begin that went well tells the state machine nothing; it ignores this
_BEGUN = Resumed()


def _arrived(worker: Worker, epoch: int, push: str, version: int) -> bool:
    begun = worker.epoch == epoch and worker.push == (push, version)
    there = worker.beside if worker.shadowed else worker.memory
    told = all((version, rank) in worker.told for rank in range(len(worker.memory)))
    return begun and told and there == (push,) * len(worker.memory)


def closed(worker: Worker) -> Worker:
    """Its epoch is over; the shadow outlives it, and what is known of versions."""
    return Worker(
        worker.memory, worker.version, worker.dirty, beside=worker.beside,
        kept=worker.kept, halves=worker.halves, newest=worker.newest, given_up=worker.given_up,
    )  # fmt: skip


def breaks_off(worker: Worker, command: Command) -> Worker | None:
    """A commit ends in the middle of its exchange; None: it does not come so far."""
    whole = work(worker, command, 0)
    if whole is None or whole.kept is None or worker.beside is None:
        return None
    return worker._replace(
        memory=("?",) * len(worker.memory),
        dirty=True,
        kept=whole.kept,
        halves=(worker.memory, worker.beside),
    )


def _put_back(worker: Worker, to: int | None) -> Worker | None:
    """A rollback; again: nothing."""
    if worker.version == to and to < worker.given_up and not worker.dirty:
        return worker
    if worker.kept is None or worker.kept[0] != to or worker.beside is None:
        return None
    memory, beside = worker.halves or (worker.beside, worker.memory)
    given_up = max(worker.given_up, worker.version, worker.newest)
    return worker._replace(
        memory=memory, beside=beside, version=to, dirty=False, kept=None, halves=None,
        given_up=given_up,
    )  # fmt: skip


def work(worker: Worker, command: Command, opened: int) -> Worker | None:
    """One worker's part, as :class:`weightsync_server.receiver.receiver.Receiver` does it."""
    match command.effect, command.event:
        case Effect.OPEN, InitAsked(session):
            aside = shadowed(session)
            beside = worker.memory if aside and worker.beside is None else worker.beside
            return closed(worker)._replace(
                epoch=command.epoch, registration=opened, beside=beside, shadowed=aside
            )
        case Effect.CONNECT, ConnectAsked(session, epoch):
            return worker._replace(peer=session) if worker.epoch == epoch else None
        case Effect.BEGIN, BeginAsked(_, epoch, push, version):
            newest = max(worker.version, worker.given_up)
            newer = version > newest or (version == newest and worker.dirty)
            if not newer or worker.epoch != epoch or not worker.peer:
                return None
            if worker.push == (push, version):
                return worker
            if version <= worker.begun:
                return None
            # bytes that land beside what serves make nothing dirty
            return worker._replace(
                push=(push, version),
                begun=version,
                newest=max(worker.newest, version),
                dirty=worker.dirty or not worker.shadowed,
                beside=worker.beside if worker.shadowed else None,
                kept=None,
                halves=None,
            )
        case Effect.PREPARE, PrepareAsked(_, epoch, push, version):
            there = _arrived(worker, epoch, push, version)
            return worker._replace(prepared=True) if there else None
        case Effect.COMMIT, CommitAsked(_, epoch, push, version):
            pushing = worker.epoch == epoch and worker.push == (push, version)
            if not pushing or not (worker.prepared or _arrived(worker, epoch, push, version)):
                return None
            if worker.shadowed and worker.beside is not None:  # exchanged with what served
                kept = None if worker.dirty else (worker.version, worker.memory)
                worker = worker._replace(memory=worker.beside, beside=worker.memory, kept=kept)
            whole = worker._replace(version=version, dirty=False, push=None, told=frozenset())
            return whole._replace(prepared=False)
        case Effect.ABORT, _:
            return closed(worker) if worker.push is not None else worker
        case Effect.CLOSE, _:
            return closed(worker)
        case Effect.ROLLBACK, _:
            return _put_back(worker, command.to)
    return worker
