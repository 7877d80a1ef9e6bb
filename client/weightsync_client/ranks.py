"""The ranks of a training job in step: a push is a fixed sequence of meetings (WS-5).

In a meeting every rank does its part and tells rank 0 what came of it; rank 0 decides, and tells
all ranks.  Whatever fails on one rank is raised on all of them, and no rank leaves a meeting that
another one enters.  Only bytes travel, encoded by msgpack and checked when they are decoded
(WS-10), over gloo groups of our own: the trainer's collectives and devices are not touched.
"""

from __future__ import annotations

import abc
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from weightsync.errors import RankFailedError, WeightSyncError, from_problem

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

#: a follower waits this much longer than rank 0 may need
_SLACK_S = 30.0


@dataclass(frozen=True, slots=True)
class _Frame:
    """What one rank tells another in a meeting.

    ``step`` and ``phase`` name the meeting.  ``lost``: a rank is gone, and with it the group.
    """

    step: int
    phase: str
    body: bytes = b""
    problem: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    lost: bool = False


def no_undo(error: BaseException) -> None:
    """Nothing was done yet."""


class Ranks(abc.ABC):
    """All ranks that push together.

    Attributes:
        rank: This process's number among them.
        world_size: How many they are.
    """

    rank: int
    world_size: int

    @abc.abstractmethod
    def meet(
        self,
        phase: str,
        work: Callable[[], T],
        decide: Callable[[list[T]], R],
        *,
        kind: Any,
        result: Any,
        work_s: float = 0.0,
        decide_s: float = 0.0,
        undo: Callable[[BaseException], None] = no_undo,
    ) -> R:
        """Every rank works, rank 0 decides, every rank gets the decision.

        All ranks call this in the same order with the same ``phase``.

        Args:
            phase: What is going on, for messages.
            work: This rank's part.
            decide: Called on rank 0 alone with every rank's part, by rank, if none failed.
            kind: Type of the parts, as :func:`msgspec.convert` takes it.
            result: Type of the decision.
            work_s: Seconds that ``work`` may take; on top come those that ranks may be apart.
            decide_s: Seconds that ``decide`` and ``undo`` may take.
            undo: Called on rank 0 with the error, before the other ranks are told of it.

        Raises:
            WeightSyncError: Of the lowest rank that failed, as the same class on all ranks; its
                message names the rank.  A KeyboardInterrupt is raised where it happened.
            RankFailedError: What failed is no WeightSyncError, or a rank is gone or late.  After
                one is gone or late every later meeting fails at once.
        """

    @abc.abstractmethod
    def exchange(
        self,
        gives: Mapping[int, torch.Tensor],
        takes: Mapping[int, torch.Tensor],
        *,
        timeout_s: float,
    ) -> None:
        """Give bytes to other ranks and take theirs, in the work of a meeting of all ranks.

        Every rank calls this, right after a meeting in which none failed: they come together.

        Args:
            gives: For each rank that gets something its bytes: flat, uint8, in host memory.
            takes: For each rank that gives something where its bytes go; both ends know how many.
            timeout_s: For all of it.

        Raises:
            RankFailedError: A rank is gone or late.  Every later meeting fails at once.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Leave.  Safe to call twice."""


class SoloRanks(Ranks):
    """A world of one."""

    rank = 0
    world_size = 1

    def meet(
        self,
        phase: str,
        work: Callable[[], T],
        decide: Callable[[list[T]], R],
        *,
        kind: Any,
        result: Any,
        work_s: float = 0.0,
        decide_s: float = 0.0,
        undo: Callable[[BaseException], None] = no_undo,
    ) -> R:
        """Work, then decide; errors are raised as they are."""
        try:
            return decide([work()])
        except BaseException as error:
            undo(error)
            raise

    def exchange(
        self,
        gives: Mapping[int, torch.Tensor],
        takes: Mapping[int, torch.Tensor],
        *,
        timeout_s: float,
    ) -> None:
        """Nothing: there is nobody else."""

    def close(self) -> None:
        """Nothing."""


class WiredRanks(Ranks):
    """Ranks that reach each other through four calls that carry bytes."""

    def __init__(self, rank: int, world_size: int, *, apart_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._apart_s = apart_s
        self._step = 0
        self._lost = ""

    def _listen(self) -> None:
        """On another rank, before it works: be ready for the answer."""

    @abc.abstractmethod
    def _collect(self, deadline: float) -> list[bytes]:
        """On rank 0: what the others report, by rank from 1.  RankFailedError names who did not."""

    @abc.abstractmethod
    def _answer(self, frame: bytes) -> None:
        """On rank 0: to all others; those that are gone are left out."""

    @abc.abstractmethod
    def _report(self, frame: bytes, deadline: float) -> bytes:
        """On another rank: to rank 0; its answer.  RankFailedError if there is none."""

    def meet(
        self,
        phase: str,
        work: Callable[[], T],
        decide: Callable[[list[T]], R],
        *,
        kind: Any,
        result: Any,
        work_s: float = 0.0,
        decide_s: float = 0.0,
        undo: Callable[[BaseException], None] = no_undo,
    ) -> R:
        """See :meth:`Ranks.meet`."""
        if self._lost:
            error = RankFailedError(
                f"{self._lost} in an earlier push",
                hint="restart the training job, or make a new process group and a new Publisher",
            )
            undo(error)
            raise error
        self._step += 1
        mine: Any = None
        failed: BaseException | None = None
        if self.rank:
            self._listen()
        try:
            mine = work()
            if self.rank:
                mine = _encode(mine)
        except BaseException as error:  # a rank that fails still meets (WS-5)
            failed = error
        due = time.monotonic() + self._apart_s + work_s
        if self.rank == 0:
            return self._lead(phase, mine, failed, decide, kind, due, undo)
        told: R = self._follow(phase, mine, failed, result, due + decide_s + _SLACK_S)
        return told

    def _lead(
        self,
        phase: str,
        mine: Any,
        failed: BaseException | None,
        decide: Callable[[list[T]], R],
        kind: Any,
        due: float,
        undo: Callable[[BaseException], None],
    ) -> R:
        errors: list[WeightSyncError] = []
        original = failed
        if failed is not None:
            errors.append(_of_rank(0, failed))
        parts = [mine]
        try:
            for rank, raw in enumerate(self._collect(due), start=1):
                frame = self._decode(raw, rank, phase)
                if frame.problem is not None:
                    errors.append(_of_rank(rank, from_problem(frame.problem)))
                    if frame.lost:
                        self._lost = str(frame.problem.get("detail", "a rank is gone"))
                else:
                    parts.append(_decode(frame.body, kind))
        except WeightSyncError as error:
            # A rank is gone or out of step: whatever else went wrong, this group is done for.
            self._lost = error.message
            # Who is not here is the cause of what an exchange with it came to.
            errors.insert(0 if isinstance(failed, RankFailedError) else len(errors), error)
        if not errors:
            try:
                decision = decide(parts)
                body = _encode(decision)
            except BaseException as error:  # the others must hear of it (WS-5)
                original = error
                errors.append(_of_rank(0, error))
            else:
                self._answer(self._encode(phase, body=body))
                return decision
        first = errors[0]
        for other in errors[1:]:
            first.add_note(f"also: {type(other).__name__}: {other}")
        raised = original if _is_own(original) and original is not None else first
        try:
            undo(raised)
        finally:
            if raised is not first:
                for note in getattr(raised, "__notes__", ()):
                    first.add_note(note)
            self._answer(self._encode(phase, error=first))
        if raised is original or original is None:
            raise raised
        raise raised from original

    def _follow(
        self, phase: str, mine: bytes, failed: BaseException | None, result: Any, due: float
    ) -> Any:
        error = None if failed is None else _of_rank(self.rank, failed)
        body = b"" if failed is not None else mine
        try:
            raw = self._report(self._encode(phase, body=body, error=error), due)
            frame = self._decode(raw, 0, phase)
        except WeightSyncError as gone:
            self._lost = gone.message
            if _is_own(failed) and failed is not None:
                raise failed from gone
            raise
        if frame.problem is None:
            return _decode(frame.body, result)
        if frame.lost:
            self._lost = str(frame.problem.get("detail", "a rank is gone"))
        told = from_problem(frame.problem)
        for note in frame.notes:
            told.add_note(note)
        if _is_own(failed) and failed is not None:
            raise failed from told
        raise told from failed

    def _encode(
        self, phase: str, *, body: bytes = b"", error: WeightSyncError | None = None
    ) -> bytes:
        frame = _Frame(
            self._step,
            phase,
            body,
            None if error is None else error.to_problem(),
            () if error is None else tuple(getattr(error, "__notes__", ())),
            bool(self._lost),
        )
        return msgspec.msgpack.encode(frame, enc_hook=str)

    def _decode(self, raw: bytes, rank: int, phase: str) -> _Frame:
        frame: _Frame = _decode_as(raw, _Frame)
        if frame.problem is None and (frame.step, frame.phase) != (self._step, phase):
            raise RankFailedError(
                f"rank {rank} is in step {frame.step} ({frame.phase}), rank {self.rank} in step "
                f"{self._step} ({phase})",
                hint="every rank makes the same calls of push, in the same order",
                rank=rank,
            )
        return frame


def _is_own(error: BaseException | None) -> bool:
    """Whether an error ends this process and is not for the others: Ctrl-C, exit."""
    return error is not None and not isinstance(error, Exception)


def _of_rank(rank: int, error: BaseException) -> WeightSyncError:
    """The error as all ranks raise it: with the rank that it came from."""
    if not isinstance(error, WeightSyncError):
        made: WeightSyncError = RankFailedError(
            f"{type(error).__name__}: {error}", hint=f"see the traceback in the log of rank {rank}"
        )
        made.__cause__ = error
        error = made
    if "rank" not in error.context:
        error.context["rank"] = rank
        error.message = f"rank {rank}: {error.message}"
        error.args = (error.message,)
    return error


def _encode(part: Any) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(part), 1)


def _decode(body: bytes, kind: Any) -> Any:
    return _decode_as(zlib.decompress(body), kind)


def _decode_as(raw: bytes, kind: Any) -> Any:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise RankFailedError(
            f"a rank sent what is no {kind}: {error}",
            hint="all ranks must run the same version of weightsync",
        ) from error
