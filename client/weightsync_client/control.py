"""The control client: HTTP to every agent at once, over connections that stay open.

Only here are httpx's exceptions seen; what leaves is of :mod:`weightsync.errors` and names the
agent.
"""

from __future__ import annotations

import concurrent.futures as cf
import secrets
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
import pydantic

from weightsync.closing import Closing
from weightsync.errors import (
    AgentUnreachableError,
    DeadlineError,
    InputError,
    ProtocolMismatchError,
    TooManyAttemptsError,
    WeightSyncError,
    from_problem,
)
from weightsync.protocol import SESSION_SECRET_HEADER, Message, faults
from weightsync_client.bearer import Bearer, Token
from weightsync_client.settings import Deadlines
from weightsync_client.threads import DaemonPool, wait_for_all
from weightsync_client.tls import tls_hint
from weightsync_client.wire import Connections

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
M = TypeVar("M", bound=Message)

#: bytes of one answer: layouts of the largest models are far below
MAX_ANSWER_NBYTES = 1 << 30
#: the kernel refuses more threads long before a fleet needs them; further agents queue
MAX_THREADS = 64

# The server may close an idle connection while a request is on its way.  Every POST is idempotent
# by its push_id or session, so one repeat is safe.
_CONNECTION_LOST = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)


class Look(NamedTuple):
    """What an answer tells besides its body: its date, and when the agent's certificate ends."""

    date: str
    certificate_ends: float | None


class Agent:
    """One agent's calls.  ``url`` is what it is known by."""

    def __init__(
        self,
        url: str,
        http: Connections | httpx.Client,
        deadlines: Deadlines,
        server_name: str | None = None,
    ) -> None:
        self.url = url
        self._http = http
        self._extensions = {} if server_name is None else {"sni_hostname": server_name}
        self._deadlines = deadlines

    def get(self, path: str, *, timeout_s: float) -> dict[str, Any]:
        """The JSON object at ``path``.

        Raises:
            WeightSyncError: See :meth:`post`.
        """
        answer = self._request("GET", path, None, timeout_s)
        if not isinstance(answer, dict):
            raise self._not_an_agent(f"GET {path} answered {type(answer).__name__}, not an object")
        return answer

    def post(self, path: str, message: Message, kind: type[M], *, timeout_s: float) -> M:
        """Send ``message``; return the answer as ``kind``.

        Raises:
            WeightSyncError: Whatever the agent's problem details say, as the class of their code.
            AgentUnreachableError: No connection, or it broke twice, or no agent answers there.
            DeadlineError: No whole answer ``timeout_s`` (and the grace) after the call.
            ProtocolMismatchError: The answer is not a ``kind``.
        """
        body = message.model_dump_json(exclude_none=True).encode()
        answer = self._request("POST", path, body, timeout_s)
        try:
            return kind.model_validate(answer)
        except pydantic.ValidationError as error:
            raise ProtocolMismatchError(
                f"agent {self.url} answered POST {path} with what is no {kind.__name__}: "
                f"{faults(error)}",
                hint="trainer and agent must have the same version of weightsync",
                agent=self.url,
            ) from error

    def look(self, path: str, *, timeout_s: float) -> Look:
        """What the answer to ``GET path`` tells besides its body.

        Raises:
            AgentUnreachableError: There is none.
        """
        try:
            with self._http.stream(
                "GET",
                self.url + path,
                timeout=httpx.Timeout(timeout_s),
                extensions=self._extensions,
            ) as response:
                stream = response.extensions.get("network_stream")
                tls = None if stream is None else stream.get_extra_info("ssl_object")
                ends = None if tls is None else tls.getpeercert().get("notAfter")
                return Look(
                    response.headers.get("date", ""),
                    None if ends is None else ssl.cert_time_to_seconds(ends),
                )
        except httpx.HTTPError as error:
            raise AgentUnreachableError(f"agent {self.url}: {error}", agent=self.url) from error

    def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s + self._deadlines.grace_s
        while True:
            try:
                return self._request_once(method, path, body, timeout_s, deadline)
            except TooManyAttemptsError as error:
                # somebody else at our address sends wrong tokens; it is over in seconds
                wait_s = float(error.context.get("retry_after_s", 1.0))
                if time.monotonic() + wait_s >= deadline:
                    raise
                time.sleep(wait_s)

    def _request_once(
        self, method: str, path: str, body: bytes | None, timeout_s: float, deadline: float
    ) -> Any:
        call = f"{method} {path}"
        for attempt in (1, 2):
            try:
                status, raw = self._exchange(method, path, body, deadline)
                break
            except _CONNECTION_LOST as error:
                if attempt == 2:
                    raise AgentUnreachableError(
                        f"agent {self.url} closed the connection in {call}: {error}",
                        hint=tls_hint(error)
                        or "look at the agent's log; was it restarted?  With --tls-cert it wants "
                        "https://, with --tls-client-ca a --cert-file that has not ended",
                        agent=self.url,
                    ) from error
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise AgentUnreachableError(
                    f"agent {self.url} does not answer {call}: {error}",
                    hint=tls_hint(error)
                    or "start weightsync-agent there, and check host, port and firewall",
                    agent=self.url,
                ) from error
            except httpx.TimeoutException as error:
                raise DeadlineError(
                    f"agent {self.url} did not answer {call} in {timeout_s:g} s",
                    hint="look at the agent's /status and log; raise Deadlines if it only is slow",
                    agent=self.url,
                    timeout_s=timeout_s,
                ) from error
        return self._decode(call, status, raw)

    def _exchange(
        self, method: str, path: str, body: bytes | None, deadline: float
    ) -> tuple[int, bytes]:
        left = max(deadline - time.monotonic(), 0.001)
        timeout = httpx.Timeout(left, connect=min(left, self._deadlines.connect_s))
        headers = {"Content-Type": "application/json"} if body is not None else {}
        chunks: list[bytes] = []
        nbytes = 0
        with self._http.stream(
            method,
            self.url + path,
            content=body,
            headers=headers,
            timeout=timeout,
            extensions=self._extensions,
        ) as response:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                nbytes += len(chunk)
                # the socket's timeout starts anew with every chunk; this one does not (WS-6)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer trickles")
                if nbytes > MAX_ANSWER_NBYTES:
                    raise self._not_an_agent(
                        f"{method} {path} answered over {MAX_ANSWER_NBYTES} bytes"
                    )
            return response.status_code, b"".join(chunks)

    def _decode(self, call: str, status: int, raw: bytes) -> Any:
        try:
            answer = msgspec.json.decode(raw)
        except ValueError:
            raise self._not_an_agent(f"{call} answered HTTP {status}: {_text(raw)}") from None
        if 200 <= status < 300:
            return answer
        if not isinstance(answer, dict) or "code" not in answer:
            raise self._not_an_agent(f"{call} answered HTTP {status}: {_text(raw)}")
        error = from_problem(answer)
        error.message = f"agent {self.url}: {error.message}"
        error.args = (error.message,)
        error.context.setdefault("agent", self.url)
        raise error

    def _not_an_agent(self, what: str) -> AgentUnreachableError:
        return AgentUnreachableError(
            f"{self.url}: {what}",
            hint="is it a weightsync-agent that listens there?",
            agent=self.url,
        )


class Fleet(Closing):
    """Some agents, called all at once.  A context manager; ``close`` ends the connections.

    Args:
        urls: ``http(s)://host:port`` of each agent; None: :meth:`use` names them.
        token: Bearer token, or its file; None: none is sent.
        verify: True, or the TLS context to check the agents' certificates with.
        server_name: What the certificates are made out to; None: the hosts of ``urls``.

    Raises:
        InputError: No agents, one twice, or what is no such address.
    """

    def __init__(
        self,
        urls: Sequence[str] | None,
        *,
        token: Token | None,
        deadlines: Deadlines,
        verify: ssl.SSLContext | bool = True,
        server_name: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.agents: tuple[Agent, ...] = ()
        self._deadlines = deadlines
        self._server_name = server_name
        checked = () if urls is None else checked_urls(urls)
        # What it opens at its agents is its own: see weightsync.protocol.SESSION_SECRET_HEADER.
        headers = {SESSION_SECRET_HEADER: secrets.token_urlsafe(32)}
        bearer = Bearer(token) if token else None
        self._http: Connections | httpx.Client
        if transport is None:
            self._http = Connections(headers, bearer, verify)
        else:
            self._http = httpx.Client(headers=headers, auth=bearer, transport=transport)
        self._threads = DaemonPool(MAX_THREADS, "weightsync")
        self.use(checked)

    def use(self, urls: Sequence[str]) -> None:
        """From now on these are the agents; ``urls`` come from :func:`checked_urls`."""
        known = {agent.url: agent for agent in self.agents}
        self.agents = tuple(
            known.get(u) or Agent(u, self._http, self._deadlines, self._server_name) for u in urls
        )

    def each(self, call: Callable[[Agent], T], agents: Sequence[Agent] | None = None) -> list[T]:
        """``call`` of every agent, all at once; the answers in the order of the agents.

        Every call is finished when this returns or raises; only a KeyboardInterrupt leaves some
        running, each for at most its own deadline.

        Raises:
            WeightSyncError: The first agent's error; those of others are notes on it.
        """
        agents = self.agents if agents is None else agents
        if len(agents) == 1:  # in this thread, so that Ctrl-C ends the wait at once
            return [call(agents[0])]
        running = [self.aside(call, agent) for agent in agents]
        wait_for_all(running)
        errors = [e for f in running if (e := f.exception()) is not None]
        if errors:
            raise first_of(errors)
        return [f.result() for f in running]

    def attempt(
        self, call: Callable[[Agent], T], agents: Sequence[Agent] | None = None
    ) -> dict[str, T | WeightSyncError]:
        """Like :meth:`each`, by URL, and an agent's error is its answer."""

        def guarded(agent: Agent) -> T | WeightSyncError:
            try:
                return call(agent)
            except WeightSyncError as error:
                return error

        agents = self.agents if agents is None else agents
        answers = self.each(guarded, agents)
        return {agent.url: answer for agent, answer in zip(agents, answers, strict=True)}

    def aside(self, call: Callable[[Agent], T], agent: Agent) -> cf.Future[T]:
        """``call`` of one agent while this thread goes on."""
        return self._threads.submit(call, agent)

    def close(self) -> None:
        """End all connections.  Safe to call twice."""
        self._threads.close()
        self._http.close()


def first_of(errors: Sequence[E]) -> E:
    """The first error; the others are notes on it."""
    for other in errors[1:]:
        errors[0].add_note(f"also: {type(other).__name__}: {other}")
    return errors[0]


def checked_urls(urls: Sequence[str]) -> tuple[str, ...]:
    """One or more different addresses of agents, as they are known by.

    Raises:
        InputError: No agents, one twice, or what is no such address.
    """
    checked = tuple(_checked_url(u) for u in ([urls] if isinstance(urls, str) else urls))
    if not checked or len(set(checked)) != len(checked):
        raise InputError(
            f"agents must be one or more different addresses, got {list(urls)}",
            hint="name each once, as http://127.0.0.1:9100",
        )
    return checked


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise InputError(
            f"not an agent's address: {url!r}", hint="write it as http://HOST:PORT", agent=url
        )
    return url.rstrip("/")


def _text(raw: bytes) -> str:
    """The beginning of what is no answer of an agent's, in one line."""
    return " ".join(raw[:200].decode("utf-8", "replace").split())
