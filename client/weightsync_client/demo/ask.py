"""What the demo asks engines: completions of token ids with exact log probabilities."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from weightsync.errors import EngineError

#: generated tokens that are compared
PROBE_TOKENS = 8
#: prompt and answer together; the engines are started with it
CONTEXT_TOKENS = 128
#: the first answer of a large or split engine takes a minute on a small machine
_REQUEST_S = 300.0
_PROMPT_LENGTHS = (4, 7, 12, 3)
_TRAFFIC_THREADS = 2
_TRAFFIC_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine generated for one prompt, greedily."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def make_prompts(vocab_size: int) -> list[list[int]]:
    """A few prompts of token ids, the same for the same vocabulary."""
    ids = (5 + 97 * i + 13 * i * i for i in range(sum(_PROMPT_LENGTHS)))
    return [[next(ids) % vocab_size for _ in range(length)] for length in _PROMPT_LENGTHS]


def complete(
    http: httpx.Client, prompt: Sequence[int], *, max_tokens: int, timeout_s: float
) -> Answer:
    """One completion.

    Args:
        http: A client whose base address is the engine's.
        prompt: Token ids.
        max_tokens: Exactly so many are made.
        timeout_s: For the whole answer; an engine that is paused lets it wait.

    Raises:
        EngineError: No answer, an error, or log probabilities that are no numbers.
    """
    body = {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    try:
        response = http.post("/v1/completions", json=body, timeout=timeout_s)
    except httpx.HTTPError as error:
        raise EngineError(f"the engine did not answer a completion: {error!r}") from error
    if response.status_code != 200:
        raise EngineError(
            f"the engine answered a completion with HTTP {response.status_code}: "
            f"{response.text[:300]}"
        )
    choice: dict[str, Any] = response.json()["choices"][0]
    tokens = tuple(choice["token_ids"])
    logprobs = tuple(choice["logprobs"]["token_logprobs"])
    if len(tokens) != max_tokens or not all(
        isinstance(x, float) and math.isfinite(x) for x in logprobs
    ):
        raise EngineError(f"the engine answered tokens {tokens} with log probabilities {logprobs}")
    return Answer(tokens, logprobs)


class Traffic:
    """Completions that every engine is asked for all the time: a context manager.

    Attributes:
        answered: Completions so far.
        longest_s: The longest that one took.
    """

    def __init__(
        self, urls: Sequence[str], prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> None:
        self.answered = 0
        self.longest_s = 0.0
        self._error: EngineError | None = None
        self._urls = urls
        self._prompts = prompts
        self._max_tokens = min(_TRAFFIC_TOKENS, max_tokens)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # Daemons: if the engine died in a pause, their requests end with its process.
        self._threads = [
            threading.Thread(target=self._ask, args=(i,), name=f"traffic-{i}", daemon=True)
            for i in range(max(_TRAFFIC_THREADS, len(urls)))
        ]

    def stop(self, timeout_s: float) -> None:
        """Let running completions end, and ask for no more.

        Raises:
            EngineError: A completion failed, or does not end.
        """
        self._stopping.set()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if self._error is not None:
            raise self._error
        if any(thread.is_alive() for thread in self._threads):
            raise EngineError(f"a completion did not end within {timeout_s:g} s")

    def _ask(self, index: int) -> None:
        try:
            url = self._urls[index % len(self._urls)]
            with httpx.Client(base_url=url, trust_env=False) as http:
                while not self._stopping.is_set():
                    prompt = self._prompts[index % len(self._prompts)]
                    start = time.monotonic()
                    complete(http, prompt, max_tokens=self._max_tokens, timeout_s=_REQUEST_S)
                    with self._lock:
                        self.answered += 1
                        self.longest_s = max(self.longest_s, time.monotonic() - start)
                    index += len(self._threads)
        except EngineError as error:
            if not self._stopping.is_set():
                self._error = error

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stopping.set()
