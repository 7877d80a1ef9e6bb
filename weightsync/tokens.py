"""Bearer tokens as a file holds them, for both sides."""

from __future__ import annotations

from pathlib import Path

from weightsync.errors import InputError

_MAX_NBYTES = 4096


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens of a file, a line each.

    The first is the one that callers send.  A second one is accepted beside it while callers are
    given the new one: that is how a token is replaced.

    Raises:
        InputError: The file cannot be read, or does not hold one or two tokens.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_NBYTES + 1).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the token file {path}: {error}",
            hint="make it, readable for this user; `openssl rand -hex 32` makes a good token",
        ) from error
    tokens = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not 1 <= len(tokens) <= 2 or len(text) > _MAX_NBYTES:
        raise InputError(
            f"the token file {path} holds {len(tokens)} lines",
            hint="one line: the token; a second one: the token that it replaces",
        )
    for token in tokens:
        check_token(token, str(path))
    return tokens


def check_token(token: str, source: str) -> None:
    """Refuse what cannot be sent in a header.

    Raises:
        InputError: The token is empty, or holds spaces or what is not printable ASCII.
    """
    if not token.isascii() or not token.isprintable() or " " in token or not token:
        raise InputError(
            f"the token of {source} holds spaces or what is not ASCII", hint="use letters, digits"
        )
