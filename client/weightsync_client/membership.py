"""Which agents there are: a list, a file, a DNS name, or what a function says."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from weightsync.errors import DeadlineError, InputError
from weightsync_client.control import checked_urls

#: the agents of one push, anew for each
Members = Callable[[], tuple[str, ...]]
#: what a publisher is told of its agents
Agents = str | Path | Sequence[str] | Callable[[], Iterable[str]]

_FILE, _DNS = "file:", "dns:"
_lookup = socket.getaddrinfo


def members_of(agents: Agents, *, timeout_s: float) -> Members:
    """What resolves ``agents`` at each push.

    Args:
        agents: See :class:`weightsync_client.publisher.Publisher`.
        timeout_s: For an answer of the DNS.

    Raises:
        InputError: An address is wrong.  Files, names and functions are looked at in the push.
    """
    if isinstance(agents, str) and agents.startswith(_FILE):
        agents = Path(agents.removeprefix(_FILE))
    if isinstance(agents, Path):
        path = agents
        return lambda: _checked(_lines(path), f"the file {path}")
    if isinstance(agents, str) and agents.startswith(_DNS):
        scheme, host, port = _dns(agents)
        return lambda: _checked(_addresses(scheme, host, port, timeout_s), agents)
    if callable(agents):
        ask = agents
        return lambda: _checked(_called(ask), f"the function {ask!r}")
    fixed = checked_urls(agents)
    return lambda: fixed


def server_name_of(agents: Agents) -> str | None:
    """What the certificates of agents that a DNS name stands for are made out to: that name.

    Raises:
        InputError: It is no such name.
    """
    return _dns(agents)[1] if isinstance(agents, str) and agents.startswith(_DNS) else None


def _dns(agents: str) -> tuple[str, str, int]:
    """Scheme, host and port of ``dns:[https://]HOST:PORT``."""
    name = agents.removeprefix(_DNS)
    scheme, there, rest = name.partition("://")
    host, _, port = (rest if there else name).rpartition(":")
    known = not there or scheme in {"http", "https"}
    if not known or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise InputError(
            f"not a DNS name with a port: {agents!r}", hint="dns:HOST:PORT, dns:https://HOST:PORT"
        )
    return scheme if there else "http", host, int(port)


def _checked(urls: Iterable[str], where: str) -> tuple[str, ...]:
    found = list(dict.fromkeys(urls))
    try:
        return checked_urls(found)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from error


def _lines(path: Path) -> list[str]:
    """One address a line; what follows a ``#`` is a comment."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the agents' file {path}: {error}", hint="one http://HOST:PORT a line"
        ) from error
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _called(ask: Callable[[], Iterable[str]]) -> list[str]:
    try:
        return list(ask())
    except Exception as error:
        raise InputError(
            f"the function that names the agents failed: {type(error).__name__}: {error}",
            hint="it returns http://HOST:PORT of each agent",
        ) from error


def _addresses(scheme: str, host: str, port: int, timeout_s: float) -> list[str]:
    """Every A and AAAA record, in a stable order."""
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = _lookup(host, port, type=socket.SOCK_STREAM)
            answers.put(sorted({str(address[4][0]) for address in found}))
        except OSError as error:
            answers.put(error)

    # The resolver knows no deadline: it is left behind at ours (WS-6).
    threading.Thread(target=ask, name="weightsync-dns", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise DeadlineError(
            f"the DNS told nothing of {host} in {timeout_s:g} s", hint="see resolv.conf"
        ) from None
    if isinstance(answer, OSError):
        raise InputError(
            f"the DNS knows no {host}: {answer}",
            hint="is the service there, headless, and has it ready endpoints?",
        ) from answer
    return [
        f"{scheme}://[{ip}]:{port}" if ":" in ip else f"{scheme}://{ip}:{port}" for ip in answer
    ]
