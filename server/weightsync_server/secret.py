"""The secret that agent, engine server and workers share, so that no one else can command a worker.

``WEIGHTSYNC_ENGINE_SECRET`` holds it, or the file that ``WEIGHTSYNC_ENGINE_SECRET_FILE`` names.
With neither, whichever process starts first makes a file that only this user can read; that is
enough for an agent and an engine of the same user on one host.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from weightsync.errors import AuthError

HEADER = "X-Weightsync-Secret"
ENV = "WEIGHTSYNC_ENGINE_SECRET"
ENV_FILE = "WEIGHTSYNC_ENGINE_SECRET_FILE"
_FILE_NAME = "weightsync-engine.secret"
_MIN_CHARS = 16


def secret_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The file that holds the secret where the environment does not."""
    if named := environ.get(ENV_FILE):
        return Path(named)
    runtime = environ.get("XDG_RUNTIME_DIR")
    return (Path(runtime) if runtime else Path.home() / ".weightsync") / _FILE_NAME


def load_secret(environ: Mapping[str, str] = os.environ) -> str:
    """The shared secret; made, if this process is the first to ask and no file was named.

    Raises:
        AuthError: Too short, unreadable, or a file that others may read.
    """
    if value := environ.get(ENV):
        return _checked(value, ENV)
    path = secret_path(environ)
    try:
        if ENV_FILE not in environ and not path.exists():
            _create(path)
        mode = path.stat().st_mode
        value = path.read_text().strip()
    except OSError as error:
        raise AuthError(
            f"cannot read the engine secret {path}: {error}",
            hint=f"make the file, or set {ENV} for agent and engine alike",
        ) from error
    if stat.S_IMODE(mode) & 0o077 and ENV_FILE not in environ:
        raise AuthError(
            f"others may read the engine secret {path} (mode {stat.S_IMODE(mode):o})",
            hint=f"chmod 600 {path}",
        )
    return _checked(value, str(path))


def same_secret(given: str | None, secret: str) -> bool:
    """Whether ``given`` is the secret; the time it takes does not depend on where they differ."""
    return given is not None and hmac.compare_digest(given.encode(), secret.encode())


def prove(command: str, secret: str) -> str:
    """HMAC-SHA256 of a command: what it travels with where its door asks callers for nothing."""
    return hmac.new(secret.encode(), command.encode(), hashlib.sha256).hexdigest()


def _checked(value: str, source: str) -> str:
    if len(value) < _MIN_CHARS or not value.isascii() or not value.isprintable():
        raise AuthError(
            f"the engine secret in {source} must be {_MIN_CHARS} or more printable characters",
            hint="for example: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return value


def _create(path: Path) -> None:
    """Make the file, whole and private at once: a link never replaces, so the first one wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".weightsync-")
    draft = Path(name)  # mkstemp makes it with O_EXCL and mode 0600
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink(missing_ok=True)
