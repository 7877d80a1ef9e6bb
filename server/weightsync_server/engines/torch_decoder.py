"""The embedded torch engine's one thread: it decodes tokens and runs the worker's commands.

Commands and tokens take turns, so a command never meets a model that computes (WS-1), and a pause
takes hold between two tokens.  No cache of keys and values is kept: every token is computed from
the token ids alone, so nothing of old weights outlives an update.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from weightsync.errors import DeadlineError, EngineError, StateError
from weightsync.protocol import PauseMode

T = TypeVar("T")
FinishReason = Literal["length", "abort"]
_log = logging.getLogger(__name__)


class Token(NamedTuple):
    """A token id, the natural log of its probability, and the weights' version that made it."""

    token_id: int
    logprob: float
    weight_version: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of a request: ``abort`` leaves fewer tokens than were asked for."""

    tokens: tuple[Token, ...]
    finish_reason: FinishReason


class Load(NamedTuple):
    """What the decoder is about: requests that have begun, that have not, and tokens ever made."""

    paused: bool
    running: int
    waiting: int
    tokens_made: int


@dataclass(slots=True, eq=False)
class _Request:
    prompt: tuple[int, ...]
    max_tokens: int
    made: list[Token] = field(default_factory=list)
    done: Future[Completion] = field(default_factory=Future)

    def finish(self, reason: FinishReason) -> None:
        _resolve(self.done, Completion(tuple(self.made), reason))


class Decoder:
    """Takes requests and commands from any thread, and works on them on its own.

    Requests that have begun get a token each in turn.  A future that it hands out may be cancelled
    at any time; the request is then dropped before its next token.

    ``submit``, ``call``, ``pause`` and ``resume`` raise EngineError once it is closed.

    Args:
        next_token: Maps prompt and tokens so far to the next token.  Runs on the decoder's thread.
    """

    def __init__(self, next_token: Callable[[Sequence[int]], Token]) -> None:
        self._next_token = next_token
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # All below is touched by the decoder's thread alone; others see it through load().
        self._admits = True
        self._steps = True
        self._closed = False
        self._running: deque[_Request] = deque()
        self._waiting: deque[_Request] = deque()
        self._drained: list[Future[None]] = []
        self._tokens_made = 0
        # A daemon: a command that hangs in a driver must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ from any thread

    def submit(self, prompt: Sequence[int], max_tokens: int) -> Future[Completion]:
        """Ask for ``max_tokens`` tokens after ``prompt``.  A paused engine keeps it waiting.

        Raises (in the future):
            EngineError: The model failed.
        """
        request = _Request(tuple(prompt), max_tokens)
        self._put(lambda: self._waiting.append(request))
        return request.done

    def call(self, command: Callable[[], T]) -> Future[T]:
        """Run ``command`` between two tokens.  Cancelled before it began, it never runs."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = command()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._put(job)
        return future

    def pause(self, mode: PauseMode) -> Future[None]:
        """Stop generation.  When the future is done no token is being made.

        ``keep`` freezes what has begun until ``resume``, ``wait`` lets it end, ``abort`` ends it at
        once, and what had not begun with it.  Whichever it is, later requests wait for ``resume``,
        also if the caller stops waiting for the future.

        Raises (in the future):
            StateError: ``resume`` or another pause came before ``wait`` had ended.
        """
        future: Future[None] = Future()
        self._put(lambda: self._pause(mode, future))
        return future

    def resume(self) -> Future[None]:
        """Go on with what was frozen and begin what waits.  Harmless when nothing is paused."""
        return self.call(self._resume)

    def load(self) -> Load:
        """A glance at the decoder; it may be a token old."""
        return Load(not self._admits, len(self._running), len(self._waiting), self._tokens_made)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Abort every request and end the thread.  Safe to call twice.

        Raises:
            DeadlineError: A command or a token takes longer than ``timeout_s``.
        """
        self._inbox.put(self._close)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeadlineError(
                f"the decoder's thread still runs after {timeout_s:g} s",
                hint="a worker command or a token hangs; the process can only be ended",
            )

    def _put(self, job: Callable[[], None]) -> None:
        if self._closed:
            raise EngineError("the engine is shutting down", hint="start it again")
        self._inbox.put(job)

    # ------------------------------------------------------------ on the decoder's thread

    def _run(self) -> None:
        while not self._closed:
            self._do_jobs()
            if self._admits:
                self._running.extend(self._waiting)
                self._waiting.clear()
            if self._steps and self._running:
                self._step()
            if not self._running:
                for drained in self._drained:
                    _resolve(drained, None)
                self._drained.clear()

    def _do_jobs(self) -> None:
        """Do what the inbox holds; with no token to make, sleep until it holds something."""
        idle = not (self._steps and self._running) and not (self._admits and self._waiting)
        while True:
            try:
                job = self._inbox.get(block=idle)
            except queue.Empty:
                return
            job()
            idle = False

    def _step(self) -> None:
        """One token for the request whose turn it is."""
        request = self._running[0]
        if not request.done.cancelled():
            try:
                token = self._next_token([*request.prompt, *(t.token_id for t in request.made)])
            except Exception as error:
                _log.exception("the model failed after %d tokens", len(request.made))
                _fail(request.done, EngineError(f"the model failed: {error}"))
            else:
                self._tokens_made += 1
                request.made.append(token)
                if len(request.made) < request.max_tokens:
                    self._running.rotate(-1)
                    return
                request.finish("length")
        self._running.popleft()

    def _pause(self, mode: PauseMode, future: Future[None]) -> None:
        self._give_up_draining("another pause")
        self._admits = False
        # Frozen requests must move on to be able to end.
        self._steps = mode != "keep"
        if mode == "abort":
            self._abort_all()
        if mode == "wait":
            self._drained.append(future)
        else:
            _resolve(future, None)

    def _resume(self) -> None:
        self._give_up_draining("resume")
        self._admits = self._steps = True

    def _give_up_draining(self, by: str) -> None:
        for future in self._drained:
            _fail(
                future,
                StateError(f"{by} came before the running requests had ended", hint="pause again"),
            )
        self._drained.clear()

    def _abort_all(self) -> None:
        for request in (*self._running, *self._waiting):
            request.finish("abort")
        self._running.clear()
        self._waiting.clear()

    def _close(self) -> None:
        self._abort_all()
        self._give_up_draining("close")
        self._closed = True


def _resolve(future: Future[T], result: T) -> None:
    # Its owner may be cancelling it at this very moment.
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)


def _fail(future: Future[Any], error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
