"""What every command shares: options, exit statuses, errors without tracebacks, JSON."""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from weightsync.errors import (
    AgentUnreachableError,
    AuthError,
    InputError,
    RefusedError,
    WeightSyncError,
)
from weightsync.tokens import read_tokens
from weightsync_client.bearer import Token
from weightsync_client.control import Fleet
from weightsync_client.settings import Deadlines, TlsFiles, tls_from_env, token_from_env
from weightsync_client.tls import tls_context

#: the exit statuses of all commands; docs/cli.md tells them
EXIT_NO, EXIT_INPUT, EXIT_REFUSED, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

#: the certificates that the command that runs was told
TLS_FILES: ContextVar[TlsFiles | None] = ContextVar("tls_files", default=None)

Urls = Annotated[
    list[str], typer.Argument(metavar="URL...", help="Agents, each as http://HOST:PORT.")
]
Agents = Annotated[
    list[str],
    typer.Option("--agent", metavar="URL", help="An agent, http://HOST:PORT; may be repeated."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with the agents' bearer token.  [default: WEIGHTSYNC_TOKEN]"),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors that an engine may have no use for."),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the push's time line there, for chrome://tracing or ui.perfetto.dev.",
    ),
]
CheckpointDir = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT_DIR", help="Folder of safetensors files.")
]


class LogFormat(StrEnum):
    """How log lines are written."""

    text = "text"
    json = "json"


def print_json(answer: dict[str, Any]) -> None:
    """One object, one line, on stdout."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def exit_status(error: WeightSyncError) -> int:
    """What a command that this error ended exits with."""
    if isinstance(error, (AgentUnreachableError, AuthError)):
        return EXIT_UNREACHABLE
    if isinstance(error, RefusedError):
        return EXIT_REFUSED
    return EXIT_INPUT if isinstance(error, InputError) else EXIT_NO


@contextmanager
def errors_told(command: str, *, as_json: bool) -> Iterator[None]:
    """Expected errors end the command with a line on stderr and a status, never a traceback.

    With ``as_json`` stdout gets ``{"error": PROBLEM}``, the problem details of the protocol.
    """
    try:
        yield
    except WeightSyncError as error:
        tell_error(command, error)
        if as_json:
            print_json({"error": error.to_problem()})
        raise typer.Exit(exit_status(error)) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"weightsync {command}: interrupted\n")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def tell_error(command: str, error: WeightSyncError) -> None:
    """What happened, what to do next, and what else is known, on stderr."""
    lines = [f"weightsync {command}: {error.message}"]
    if error.hint:
        lines.append(f"  what to do: {error.hint}")
    lines += [f"  {note}" for note in getattr(error, "__notes__", ())]
    sys.stderr.write("\n".join(lines) + "\n")


def read_token(path: Path | None) -> Token | None:
    """The bearer token: its file, else what the environment says, else none.

    Raises:
        InputError: The file cannot be read, or holds no token.
    """
    if path is None:
        return token_from_env()
    read_tokens(path)
    return path


def files_of_command() -> TlsFiles:
    """The certificates that count: what was said before the command's name, or the variables."""
    said, env = TLS_FILES.get() or TlsFiles(), tls_from_env()
    if said.cert is not None:
        env = TlsFiles(env.ca)
    return TlsFiles(said.ca or env.ca, said.cert or env.cert, said.key or env.key)


def tls_of_command() -> ssl.SSLContext | Literal[True]:
    """What the options before the command's name said of certificates.

    Raises:
        InputError: See :func:`weightsync_client.tls.tls_context`.
    """
    files = TLS_FILES.get() or TlsFiles()
    cert = files.cert if files.key is None or files.cert is None else (files.cert, files.key)
    return tls_context(files.ca or True, cert)


def new_fleet(urls: Sequence[str], token_file: Path | None, deadlines: Deadlines) -> Fleet:
    """The agents of a command.

    Raises:
        InputError: An address, the token file or a certificate is wrong.
    """
    token = read_token(token_file)
    return Fleet(urls, token=token, deadlines=deadlines, verify=tls_of_command())
