"""All engines of an agent as one: asked at once, and what one fails with all have failed with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from weightsync.errors import DeadlineError, EngineDetachedError, WeightSyncError
from weightsync.protocol import PauseMode
from weightsync_server.agent.engine_client import Answer, EngineClient, Op
from weightsync_server.agent.replies import Replies

T = TypeVar("T")


class Engines:
    """The engines behind one agent, in the order of their numbers.

    Every call goes to all of them at once and returns when all have answered or failed.  If
    several fail, the error that says most about them is raised, and names the others in its notes.

    Args:
        clients: One for each engine.
        replies: Where all of them wait for workers.
    """

    def __init__(self, clients: Sequence[EngineClient], replies: Replies) -> None:
        self.clients = tuple(clients)
        self._replies = replies

    async def info(self, timeout_s: float) -> list[dict[str, Any]]:
        """Each engine's ``GET /weightsync/info``."""
        return await self._all(lambda client: client.info(timeout_s))

    async def agree_on_pause(self, timeout_s: float) -> bool:
        """Whether generation is stopped; if only some engines are paused, the others are too."""
        paused = await self._all(lambda client: client.is_paused(timeout_s))
        if any(paused) and not all(paused):
            await self.pause("keep", timeout_s)
        return any(paused)

    async def pause(self, mode: PauseMode, timeout_s: float, *, reset_caches: bool = False) -> None:
        """As :meth:`EngineClient.pause`: all engines are drained when this returns (WS-1)."""
        await self._all(lambda client: client.pause(mode, timeout_s, reset_caches=reset_caches))

    async def resume(self, timeout_s: float) -> None:
        """Start generation."""
        await self._all(lambda client: client.resume(timeout_s))

    async def reset_prefix_cache(self, timeout_s: float) -> None:
        """Drop what was computed with the old weights."""
        await self._all(lambda client: client.reset_prefix_cache(timeout_s))

    async def tell(
        self,
        op: Op,
        *,
        timeout_s: float,
        body: object = None,
        bodies: Mapping[str, object] | None = None,
    ) -> list[Answer[None]]:
        """As :meth:`EngineClient.tell`: engine by engine, each engine's sorted by place."""
        return await self._workers(
            lambda client: client.tell(
                op, timeout_s=timeout_s, body=body, bodies=client.own(bodies)
            )
        )

    async def ask(
        self,
        op: Op,
        kind: type[T],
        *,
        timeout_s: float,
        body: object = None,
        bodies: Mapping[str, object] | None = None,
    ) -> list[Answer[T]]:
        """As :meth:`EngineClient.ask`: engine by engine, each engine's sorted by place."""
        return await self._workers(
            lambda client: client.ask(
                op, kind, timeout_s=timeout_s, body=body, bodies=client.own(bodies)
            )
        )

    def close_soon(self, why: str) -> None:
        """End all waits: an engine is gone."""
        for client in self.clients:
            client.lose()
        self._replies.fail_all(
            EngineDetachedError(
                f"an engine went away: {why}", hint="GET /status tells when it is back"
            )
        )

    async def aclose(self) -> None:
        """End the connections."""
        for client in self.clients:
            await client.aclose()

    async def _workers(
        self, call: Callable[[EngineClient], Awaitable[list[Answer[T]]]]
    ) -> list[Answer[T]]:
        return [answer for answers in await self._all(call) for answer in answers]

    async def _all(self, call: Callable[[EngineClient], Awaitable[T]]) -> list[T]:
        calls = (call(client) for client in self.clients)
        results = await asyncio.gather(*calls, return_exceptions=True)
        done = [result for result in results if not isinstance(result, BaseException)]
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise _merged(errors)
        return done


def _merged(errors: Sequence[BaseException]) -> BaseException:
    """The error to raise for several engines; refusals of all of them together."""
    error = min(errors, key=_rank)
    refusals = [
        refusal
        for other in errors
        if isinstance(other, WeightSyncError)
        for refusal in other.context.get("refusals", [])
    ]
    if isinstance(error, WeightSyncError) and refusals:
        error.context["refusals"] = refusals
    for other in errors:
        if other is not error:
            error.add_note(f"also: {type(other).__name__}: {other}")
    return error


def _rank(error: BaseException) -> int:
    """Lowest first: what is no error of ours, an engine that is gone, one that keeps silent."""
    if not isinstance(error, WeightSyncError):
        return 0
    kinds = (EngineDetachedError, DeadlineError)
    return next((1 + k for k, kind in enumerate(kinds) if isinstance(error, kind)), 3)
