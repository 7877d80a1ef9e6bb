"""What NIXL's exceptions and statuses become here.  Does not import NIXL."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from weightsync.errors import PeerLostError, TransferFailedError, TransportError
from weightsync.transport.refusals import LOST_HINT

logger = logging.getLogger(__name__)

_SEE_LOG = "see what NIXL and UCX logged on stderr above"
_NOT_FOUND = (
    "each write must lie in one registered interval at both ends: register, exchange metadata, "
    "then prepare"
)

#: every exception class of NIXL's binding: what it becomes, and what to do about it
ERRORS: Mapping[str, tuple[type[TransportError], str]] = {
    "nixlBackendError": (TransferFailedError, _SEE_LOG),
    "nixlCancelledError": (TransferFailedError, "abort the push and push again"),
    "nixlInvalidParamError": (
        TransportError,
        "check addresses and lengths, and both NIXL versions",
    ),
    "nixlMismatchError": (TransportError, "both ends need the same NIXL version"),
    "nixlNoTelemetryError": (TransportError, "switch telemetry on before asking for it"),
    "nixlNotAllowedError": (TransportError, _SEE_LOG),
    "nixlNotFoundError": (TransportError, _NOT_FOUND),
    "nixlNotPostedError": (TransferFailedError, "post the write before waiting for it"),
    "nixlNotSupportedError": (TransportError, "UCX lacks this: check its build and UCX_TLS"),
    "nixlRemoteDisconnectError": (PeerLostError, LOST_HINT),
    "nixlRepostActiveError": (TransferFailedError, "wait for the write before posting it again"),
    "nixlUnknownError": (TransferFailedError, _SEE_LOG),
}


@contextmanager
def translated(doing: str, peer: str = "") -> Iterator[None]:
    """Turn whatever NIXL raises inside into a :class:`TransportError` that names ``peer``."""
    try:
        yield
    except TransportError:
        raise
    except Exception as error:
        kind, hint = ERRORS.get(type(error).__name__, (TransportError, _SEE_LOG))
        towards = f" (peer {peer!r})" if peer else ""
        context = {"peer": peer} if peer else {}
        raise kind(
            f"{doing}{towards} failed: {type(error).__name__}: {error}", hint=hint, **context
        ) from error


@contextmanager
def logged(doing: str) -> Iterator[None]:
    """Log whatever NIXL raises inside: clean-up goes on, and never hides the first error."""
    try:
        yield
    except Exception as error:
        logger.warning("%s failed: %s: %s", doing, type(error).__name__, error)


def is_done(status: str, peer: str) -> bool:
    """Whether a transfer with NIXL status name ``status`` has completed.

    Raises:
        TransferFailedError: It is neither complete nor in progress.
    """
    if status not in {"NIXL_SUCCESS", "NIXL_IN_PROG"}:
        raise TransferFailedError(
            f"write to {peer!r} has status {status}: expected NIXL_SUCCESS or NIXL_IN_PROG",
            hint=_SEE_LOG,
            peer=peer,
        )
    return status == "NIXL_SUCCESS"
