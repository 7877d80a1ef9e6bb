"""The agent's calls to its engine: HTTP to ``/weightsync/*``, answers from the workers themselves.

An engine with data parallelism hands back only its first engine's results, so what a worker has to
say comes by its own ``POST`` to the agent, and the HTTP answer only tells that all have returned.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from weightsync.codec import pack, unpack
from weightsync.errors import (
    DeadlineError,
    EngineDetachedError,
    EngineError,
    StateError,
    from_problem,
)
from weightsync.protocol import PROTOCOL_VERSION, PauseMode, WorkerCommand
from weightsync_server.agent.aside import aside
from weightsync_server.agent.engine_http import Connections
from weightsync_server.agent.replies import PendingCall, Replies, in_order
from weightsync_server.secret import HEADER

T = TypeVar("T")

log = logging.getLogger(__name__)

Op = Literal[
    "describe",
    "attach",
    "layout",
    "connect",
    "begin",
    "prepare",
    "commit",
    "abort",
    "rollback",
    "reload",
    "close",
    "checksums",
    "verify",
]

#: what changes live weights without an epoch whose end could void it
_IN_PAUSE: frozenset[Op] = frozenset({"rollback", "reload"})
_BULKY: frozenset[Op] = frozenset({"layout", "connect"})
#: what the answer on the way back may take longer than the engine was given
_MARGIN_S = 2.0
#: how long answers may follow the engine's word that every worker has returned
_STRAGGLER_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """One worker's answer; ``at``: when it was there (monotonic seconds)."""

    place: str
    instance: str
    body: T
    at: float


class EngineClient:
    """Calls to one engine.

    Args:
        number: What the agent numbers it by.
        base_url: The engine's API server.
        secret: The shared secret.
        replies: Where the workers' answers come in.
        max_unpacked_nbytes: Bytes that one answer may have once inflated.
    """

    def __init__(
        self,
        number: int,
        base_url: str,
        secret: str,
        replies: Replies,
        *,
        max_unpacked_nbytes: int,
    ) -> None:
        self.number = number
        self.base_url = base_url
        #: where the workers send their answers; known once the agent listens
        self.reply_url = ""
        #: places of the workers that answered last, to name those that keep silent
        self.places: tuple[str, ...] = ()
        #: how many workers answer each command, as the engine says
        self.workers = 1
        self._replies = replies
        #: the pause or resume that comes next at the engine; None: unknown, so it is asked
        self._turn: str | None = None
        self._lost: set[asyncio.Future[None]] = set()
        self._max_unpacked_nbytes = max_unpacked_nbytes
        self._http = Connections(base_url, {HEADER: secret})
        #: commands that all workers have answered, on their way back through the engine
        self._returning: set[asyncio.Future[Any]] = set()

    async def info(self, timeout_s: float) -> dict[str, Any]:
        """``GET /weightsync/info``."""
        info = await self._send("GET", "info", None, timeout_s)
        if info.get("protocol_version") != PROTOCOL_VERSION:
            raise EngineError(
                f"the engine at {self.base_url} speaks protocol {info.get('protocol_version')}, "
                f"the agent {PROTOCOL_VERSION}",
                hint="install the same version of weightsync beside agent and engine",
            )
        self.workers = int(info["workers"])
        return info

    async def is_paused(self, timeout_s: float) -> bool:
        """Whether generation is stopped."""
        answer = await self._send("GET", "is_paused", None, timeout_s)
        self._turn = answer.get("turn")
        return bool(answer["is_paused"])

    async def pause(self, mode: PauseMode, timeout_s: float, *, reset_caches: bool = False) -> None:
        """Stop generation; the engine is drained when this returns (WS-1).

        ``reset_caches``: what was computed with the old weights is dropped then, too.
        """
        ask = {"mode": mode, "timeout_s": timeout_s, "reset_caches": reset_caches}
        await self._take_turn("pause", ask, timeout_s)

    async def resume(self, timeout_s: float) -> None:
        """Start generation."""
        await self._take_turn("resume", {}, timeout_s)

    async def _take_turn(self, name: str, ask: dict[str, Any], timeout_s: float) -> None:
        """Pause or resume, if nobody else has meanwhile.

        Heard late, after an answer was given up, a resume must not end the pause of a later push
        (WS-1), nor a pause stop an engine that nobody would start again.
        """
        for asked in (self._turn is None, True):
            if asked:
                await self.is_paused(timeout_s)
            turn, self._turn = self._turn, None
            try:
                answer = await self._send("POST", name, ask | {"turn": turn}, timeout_s)
            except StateError as error:
                if asked or isinstance(error, EngineDetachedError):
                    raise
                continue  # somebody else has asked: as if it had not been known whose turn it is
            self._turn = answer.get("turn")
            return

    async def reset_prefix_cache(self, timeout_s: float) -> None:
        """Drop what was computed with the old weights."""
        await self._send("POST", "reset_prefix_cache", None, timeout_s)

    async def tell(
        self,
        op: Op,
        *,
        timeout_s: float,
        body: object = None,
        bodies: Mapping[str, object] | None = None,
    ) -> list[Answer[None]]:
        """Like :meth:`ask`, for what is answered with no more than "done"."""
        pending = await self._call(op, timeout_s, body, bodies)
        return [
            Answer(r.place, r.instance, None, pending.at[r.place]) for r in in_order(op, pending)
        ]

    async def ask(
        self,
        op: Op,
        kind: type[T],
        *,
        timeout_s: float,
        body: object = None,
        bodies: Mapping[str, object] | None = None,
    ) -> list[Answer[T]]:
        """Ask every worker for ``op``; their answers, sorted by place.

        Args:
            op: What to ask for.
            kind: What each answers.
            timeout_s: Seconds for all of it.
            body: What all are sent; None: nothing.
            bodies: What each is sent, by place, where that differs.

        Raises:
            DeadlineError: Not all answered in ``timeout_s``; names those that did not.
            WeightSyncError: A worker's own error, with its place.
            EngineError: The engine failed, or answered in part.
        """
        pending = await self._call(op, timeout_s, body, bodies)
        nbytes = sum(len(r.body) for r in pending.by_place.values())
        return await aside(nbytes, self._unpacked, op, kind, pending)

    def own(self, bodies: Mapping[str, object] | None) -> dict[str, object]:
        """Those of ``bodies`` that are for workers of this engine."""
        mine = f"engine{self.number}/"
        return {place: b for place, b in (bodies or {}).items() if place.startswith(mine)}

    def lose(self) -> None:
        """End all waits for its server: an engine is gone, and one that dies may never answer."""
        for lost in self._lost:
            if not lost.done():
                lost.set_result(None)

    async def aclose(self) -> None:
        """End the connections."""
        for rpc in self._returning:
            rpc.cancel()
        await asyncio.gather(*self._returning, return_exceptions=True)
        self._http.close()

    async def _call(
        self, op: Op, timeout_s: float, body: object, bodies: Mapping[str, object] | None
    ) -> PendingCall:
        if op in _IN_PAUSE and self._turn is None:
            raise StateError(f"{op}: it is not known if the engine stands still", hint="ask again")
        call_id = uuid.uuid4().hex
        pending = self._replies.open(call_id, self.workers)
        try:
            async with asyncio.timeout(timeout_s):
                command = await aside(
                    _bulk_nbytes(op, [body, *(bodies or {}).values()]),
                    self._command, call_id, op, timeout_s, body, bodies,
                )  # fmt: skip
                await self._rpc(op, command, timeout_s, pending)
        except (TimeoutError, DeadlineError, EngineError) as error:
            if any(r.problem for r in pending.by_place.values()):
                pass  # a worker's own words tell more
            elif isinstance(error, EngineError):
                raise
            else:
                raise DeadlineError(
                    f"{op}: {self._silent(pending)} did not answer in {timeout_s:g} s",
                    hint="look at the engine's log; raise the timeout if it only is slow",
                    phase=op,
                    timeout_s=timeout_s,
                    answered=sorted(pending.by_place),
                ) from error
        finally:
            self._replies.close(call_id)
        if len(pending.by_place) == self.workers:
            self.places = tuple(sorted(pending.by_place))
        return pending

    async def _rpc(self, op: Op, command: bytes, timeout_s: float, pending: PendingCall) -> None:
        """Send the command; return when every worker has answered, the last thing that it does.

        What comes next waits its turn in the engine; for the command's own way back nobody does.
        """
        rpc = asyncio.ensure_future(self._send("POST", "rpc", command, timeout_s))
        waits: set[asyncio.Future[Any]] = {rpc, pending.complete}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if pending.complete.done():
                pending.complete.result()
                self._returning.add(rpc)
                rpc.add_done_callback(self._returned)
                return
            await rpc
            async with asyncio.timeout(_STRAGGLER_S):
                await asyncio.shield(pending.complete)
        except TimeoutError as error:
            raise EngineError(
                f"{op}: the engine says that all workers have returned, but "
                f"{self._silent(pending)} did not answer",
                hint=f"can the engine's workers reach the agent at {self.reply_url}?",
                phase=op,
                answered=sorted(pending.by_place),
            ) from error
        finally:
            if rpc not in self._returning:
                rpc.cancel()
                await asyncio.gather(rpc, return_exceptions=True)

    def _returned(self, rpc: asyncio.Future[Any]) -> None:
        self._returning.discard(rpc)
        if not rpc.cancelled() and (error := rpc.exception()) is not None:
            log.warning("the engine failed in a command that all workers have answered: %s", error)

    def _silent(self, pending: PendingCall) -> str:
        missing = [p for p in self.places if p not in pending.by_place]
        if missing:
            return f"worker {', '.join(missing)}"
        return f"{pending.workers - len(pending.by_place)} of {pending.workers} workers"

    def _command(
        self,
        call_id: str,
        op: Op,
        timeout_s: float,
        body: object,
        bodies: Mapping[str, object] | None,
    ) -> bytes:
        deflate = op in _BULKY  # digests cannot be made shorter, and engines stand still meanwhile
        return (
            WorkerCommand(
                call_id=call_id,
                op=op,
                reply_url=self.reply_url,
                # the worker's own deadline says more (which rank, which tensor): let it come first
                timeout_s=max(0.8 * timeout_s, timeout_s - _MARGIN_S),
                engine=self.number,
                body="" if body is None else pack(body, deflate=deflate),
                bodies={p: pack(b, deflate=deflate) for p, b in (bodies or {}).items()},
                turn=self._turn if op in _IN_PAUSE else None,
            )
            .model_dump_json()
            .encode()
        )

    def _unpacked(self, op: Op, kind: type[T], pending: PendingCall) -> list[Answer[T]]:
        limit = self._max_unpacked_nbytes
        return [
            Answer(r.place, r.instance, unpack(r.body, kind, max_nbytes=limit), pending.at[r.place])
            for r in in_order(op, pending)
        ]

    async def _send(
        self, method: str, name: str, body: bytes | dict[str, Any] | None, timeout_s: float
    ) -> dict[str, Any]:
        content = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        path = f"/weightsync/{name}"
        request = asyncio.ensure_future(self._http.request(method, path, content))
        lost = asyncio.get_running_loop().create_future()
        self._lost.add(lost)
        try:
            await asyncio.wait(
                {request, lost},
                timeout=timeout_s + _MARGIN_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._lost.discard(lost)
            ended = request.done()
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        if lost.done() and not ended:
            raise EngineDetachedError(
                f"an engine went away while {name} ran", hint="GET /status tells when it is back"
            )
        if not ended:
            raise DeadlineError(
                f"the engine at {self.base_url} did not answer {name} in {timeout_s:g} s",
                hint="look at the engine's log",
                phase=name,
                timeout_s=timeout_s,
            )
        try:
            status, raw = request.result()
            answer = json.loads(raw)
        except OSError as error:
            raise EngineDetachedError(
                f"the engine at {self.base_url} does not answer {name}: "
                f"{type(error).__name__}: {error}",
                hint="start it; the agent joins it by itself",
            ) from error
        except ValueError:
            answer = None
        if 200 <= status < 300 and isinstance(answer, dict):
            return answer
        if isinstance(answer, dict) and "code" in answer:
            raise from_problem(answer)
        raise EngineError(
            f"{self.base_url}{path} answers HTTP {status} and nothing of weightsync's",
            hint="start the engine with --middleware weightsync_server.middleware."
            "WeightsyncMiddleware, and check --engine-url",
        )


def _bulk_nbytes(op: Op, bodies: Iterable[object]) -> int:
    """About what packing them takes; of the commands of a pause only digests can be many."""
    if op in _BULKY:
        return sys.maxsize
    ranks = [rank for body in bodies for rank in getattr(body, "ranks", ())]
    return sum(map(len, (digest for rank in ranks for digest in rank.digests)))
