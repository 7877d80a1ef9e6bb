"""The HTTP face of the embedded torch engine, and the engine client that our middleware drives.

It answers the part of the OpenAI API that shows what the weights are: greedy completions of token
ids with exact log probabilities.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from weightsync.errors import DeadlineError, EngineError, InputError, WeightSyncError
from weightsync.protocol import PauseMode
from weightsync_server.engines.torch_decoder import Completion, Decoder

T = TypeVar("T")
_DISCONNECT_POLL_S = 0.25
_CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for.  ``model_len`` counts prompt and made tokens together."""

    vocab_size: int
    model_len: int
    request_timeout_s: float


class CompletionRequest(BaseModel):
    """``POST /v1/completions``.  What else the OpenAI API has is ignored."""

    model_config = ConfigDict(frozen=True)

    prompt: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Token ids: this engine has no tokenizer."""
    max_tokens: Annotated[int, Field(ge=1)] = 16
    """Exactly so many tokens are made: no token ends the text."""
    temperature: Literal[0] = 0
    """Greedy decoding alone."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    """Any number: answer the log probability of each token made, and of no other."""
    return_token_ids: bool = False
    """Whether the choice lists its token ids."""


class EngineClient:
    """What weightsync's middleware drives, under the names that vLLM's engine client has.

    Args:
        decoder: Makes the tokens and runs the commands.
        commands: The worker's methods by name.
        model_path: The model's folder.
        engine_version: The engine's version, for people.
    """

    engine_name = "torch"
    #: how many workers answer a command
    world_size = 1

    def __init__(
        self,
        decoder: Decoder,
        commands: Mapping[str, Callable[..., Any]],
        *,
        model_path: str,
        engine_version: str,
    ) -> None:
        self.model_path = model_path
        self.engine_version = engine_version
        self._decoder = decoder
        self._commands = commands

    async def pause_generation(
        self, *, mode: PauseMode = "abort", clear_cache: bool = True
    ) -> None:
        """Return when no token is being made; see :meth:`Decoder.pause`.

        A caller that is cancelled or runs out of time leaves the engine paused: whether it may
        serve again is not known here (WS-4).  ``clear_cache`` has nothing to clear.
        """
        await asyncio.wrap_future(self._decoder.pause(mode))

    async def resume_generation(self) -> None:
        """Return when the engine goes on."""
        await asyncio.wrap_future(self._decoder.resume())

    async def is_paused(self) -> bool:
        """Whether requests have to wait for a resume."""
        return self._decoder.load().paused

    async def reset_prefix_cache(self) -> bool:
        """True: there is no cache that could be stale."""
        return True

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,  # noqa: ASYNC109 - the name that vLLM gives it
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Run a method of the one worker between two tokens, and return a list of its one result.

        Raises:
            EngineError: The worker has no such method.
            DeadlineError: ``timeout`` seconds passed.  A method that has begun goes on.
        """
        command = self._commands.get(method)
        if command is None:
            raise EngineError(
                f"the worker has no method {method!r}", hint=f"it has {', '.join(self._commands)}"
            )
        done = asyncio.wrap_future(self._decoder.call(lambda: command(*args, **(kwargs or {}))))
        try:
            return [await asyncio.wait_for(done, timeout)]
        except TimeoutError:
            raise DeadlineError(
                f"{method} did not end within {timeout} s", hint="see the engine's log"
            ) from None


def create_app(decoder: Decoder, client: EngineClient, limits: Limits) -> FastAPI:
    """The engine's routes, without weightsync's middleware.

    Args:
        decoder: Makes the tokens.
        client: Becomes ``app.state.engine_client``.
        limits: What a request may ask for.
    """
    app = FastAPI(title="weightsync torch engine", version=client.engine_version)
    model = client.model_path
    app.state.engine_client = client

    @app.exception_handler(WeightSyncError)
    async def problem(_: Request, error: WeightSyncError) -> JSONResponse:
        return JSONResponse(
            error.to_problem(), status_code=error.status, media_type="application/problem+json"
        )

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **decoder.load()._asdict()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": model, "object": "model", "max_model_len": limits.model_len}
        return {"object": "list", "data": [card]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response | dict[str, Any]:
        _check(body, limits)
        done = decoder.submit(body.prompt, body.max_tokens)
        completion = await _wait(done, request, limits.request_timeout_s)
        if completion is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        usage = {"prompt_tokens": len(body.prompt), "completion_tokens": len(completion.tokens)}
        choice = _choice(body, completion)
        return {"object": "text_completion", "model": model, "choices": [choice], "usage": usage}

    return app


def _check(body: CompletionRequest, limits: Limits) -> None:
    if (largest := max(body.prompt)) >= limits.vocab_size:
        raise InputError(
            f"prompt: token id {largest} of a vocabulary of {limits.vocab_size}",
            hint="send token ids of this model",
        )
    if (total := len(body.prompt) + body.max_tokens) > limits.model_len:
        raise InputError(
            f"prompt and max_tokens: {total} tokens, and the model takes {limits.model_len}",
            hint="ask for fewer tokens",
        )


async def _wait(done: Future[Completion], request: Request, timeout_s: float) -> Completion | None:
    """The completion; None when the client went away, whose request is then dropped.

    Raises:
        DeadlineError: It took longer than ``timeout_s``; the request is dropped.
        EngineError: The model failed.
    """
    future = asyncio.wrap_future(done)
    try:
        async with asyncio.timeout(timeout_s):
            while not (await asyncio.wait({future}, timeout=_DISCONNECT_POLL_S))[0]:
                if await request.is_disconnected():
                    return None
    except TimeoutError:
        raise DeadlineError(
            f"no completion within {timeout_s:g} s", hint="is the engine paused? See /health"
        ) from None
    finally:
        future.cancel()  # its end is in nobody's interest any more
    return future.result()


def _choice(body: CompletionRequest, completion: Completion) -> dict[str, Any]:
    tokens = completion.tokens
    choice: dict[str, Any] = {
        "index": 0,
        "text": "",
        "finish_reason": completion.finish_reason,
        "logprobs": None,
        "weight_version": tokens[-1].weight_version if tokens else None,
    }
    if body.return_token_ids:
        choice["token_ids"] = [token.token_id for token in tokens]
    if body.logprobs is not None:
        # JSON has no NaN, and broken weights make nothing else
        values = [token.logprob if math.isfinite(token.logprob) else None for token in tokens]
        choice["logprobs"] = {
            "tokens": [f"token_id:{token.token_id}" for token in tokens],
            "token_logprobs": values,
        }
    return choice
