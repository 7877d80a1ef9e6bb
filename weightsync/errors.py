"""Every error that weightsync raises, as one tree.

WeightSyncError                     the root; never raised itself
├── InputError                      what the caller handed over is wrong; nothing moved
│   ├── ManifestError               names, shapes or dtypes do not fit the engine
│   ├── NonFiniteError              a weight is NaN or infinite
│   ├── ProtocolMismatchError       trainer and agent speak different protocol versions
│   └── BodyTooLargeError           a request body is over its limit
├── AuthError                       token or shared secret is missing or wrong
│   ├── ForbiddenError              the session is another trainer's
│   └── TooManyAttemptsError        wrong tokens came from that address: wait
├── StateError                      legal call, wrong moment; nothing changed
│   ├── EngineDetachedError         the agent has no engine
│   ├── EnginePausedError           the engine was paused by hand
│   ├── EngineSyncingError          the engine waits for its first whole push
│   ├── EngineTornError             the engine holds weights that are not whole
│   ├── FencePendingError           a writer of an ended push might still write
│   ├── JournalError                the agent cannot write its journal
│   ├── PushInProgressError         another push holds the engine
│   ├── NoSessionError              push without a rendezvous
│   ├── StaleEpochError             the session's epoch is over: make a new rendezvous
│   ├── StaleVersionError           the version is not newer than the engine's
│   ├── NoCheckpointError           the engine has no checkpoint on disk to load again
│   └── NoPreviousError             no version before this one is kept
├── LayoutError                     the engine's layout cannot be used
│   ├── TraceError                  the loader does what a layout cannot express
│   ├── RefusedError                a kernel tensor could not be proven
│   ├── IdentityError               a kernel tensor moved since it was registered
│   └── HeadroomError               the shadow does not fit into memory
├── PlanError                       the coverage proof failed
├── TransportError                  moving the bytes failed
│   ├── RegistrationError           memory could not be registered
│   ├── PeerLostError               the other end is gone
│   └── TransferFailedError         the transport gave the transfer up
├── VerifyError                     the bytes arrived, and they are not the right ones
├── DeadlineError                   a wait ran out of time
├── EngineError                     the engine answered with an error or not at all
├── AgentUnreachableError           the agent does not answer HTTP
└── RankFailedError                 another rank of the training job failed or is gone

Each class has a stable ``code`` (docs/protocol.md lists them) and the HTTP ``status`` that the
agent answers with.  ``hint`` says what to do next.  ``context`` holds what a program may want.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class WeightSyncError(Exception):
    """Root of the tree.

    Args:
        message: What happened: names peer, version, tensor, expected and got, as far as they apply.
        hint: What the reader should do next.
        context: JSON-able facts for programs.
    """

    code: ClassVar[str] = "weightsync_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "", **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context: dict[str, Any] = context

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_problem(self) -> dict[str, Any]:
        """The error as an RFC 9457 problem details object."""
        return {
            "type": f"urn:weightsync:error:{self.code}",
            "title": type(self).__name__,
            "status": self.status,
            "detail": self.message,
            "code": self.code,
            "hint": self.hint,
            "context": self.context,
        }


class InputError(WeightSyncError):
    """What the caller handed over is wrong; nothing moved."""

    code = "invalid_input"
    status = 422


class ManifestError(InputError):
    """Names, shapes or dtypes of the manifest do not fit the engine."""

    code = "manifest_mismatch"


class NonFiniteError(InputError):
    """A weight is NaN or infinite."""

    code = "non_finite_weights"


class ProtocolMismatchError(InputError):
    """Trainer and agent speak different protocol versions."""

    code = "protocol_mismatch"


class BodyTooLargeError(InputError):
    """A request body, compressed or not, is over its limit."""

    code = "body_too_large"
    status = 413


class AuthError(WeightSyncError):
    """The token or the shared secret is missing or wrong."""

    code = "unauthorized"
    status = 401


class ForbiddenError(AuthError):
    """The session is another trainer's."""

    code = "forbidden"
    status = 403


class TooManyAttemptsError(AuthError):
    """Too many wrong tokens came from that address.

    ``context["retry_after_s"]`` is how long it has to wait, in seconds.
    """

    code = "too_many_attempts"
    status = 429


class StateError(WeightSyncError):
    """A legal call at the wrong moment; nothing changed."""

    code = "illegal_state"
    status = 409


class EngineDetachedError(StateError):
    """The agent has no engine."""

    code = "engine_detached"
    status = 503


class EnginePausedError(StateError):
    """The engine was paused by hand."""

    code = "engine_paused"


class EngineSyncingError(StateError):
    """The engine serves what it was started with, and is to wait for its first whole push."""

    code = "engine_syncing"
    status = 503


class EngineTornError(StateError):
    """The engine holds weights that are not whole."""

    code = "engine_torn"


class FencePendingError(StateError):
    """A process that took part in a push that ended badly lives, and might still write."""

    code = "fence_pending"


class JournalError(StateError):
    """The agent cannot write its journal, so it takes no push."""

    code = "journal_failed"
    status = 503


class PushInProgressError(StateError):
    """Another push holds the engine."""

    code = "push_in_progress"


class NoSessionError(StateError):
    """A push without a rendezvous."""

    code = "no_session"


class StaleEpochError(StateError):
    """The session's epoch is over; a new rendezvous is needed."""

    code = "stale_epoch"


class StaleVersionError(StateError):
    """The version is not newer than the engine's."""

    code = "stale_version"


class NoCheckpointError(StateError):
    """The engine has no checkpoint on disk that could be loaded again."""

    code = "no_checkpoint"


class NoPreviousError(StateError):
    """A rollback, and no version before this one is kept."""

    code = "no_previous_version"


class LayoutError(WeightSyncError):
    """The engine's layout cannot be used."""

    code = "layout_error"
    status = 422


class TraceError(LayoutError):
    """The engine's loader does something that a layout cannot express."""

    code = "trace_error"


class RefusedError(LayoutError):
    """A kernel tensor could be proven neither direct nor staged.

    ``context["refusals"]`` is a list of ``{"tensor": ..., "reason": ...}``.
    """

    code = "tensors_refused"


class IdentityError(LayoutError):
    """A kernel tensor moved or changed shape since it was registered."""

    code = "identity_changed"
    status = 409


class HeadroomError(LayoutError):
    """The shadow of the weights does not fit into the memory that is left.

    ``context`` has ``needed_nbytes`` and ``free_nbytes``.
    """

    code = "no_headroom"
    status = 507


class PlanError(WeightSyncError):
    """The coverage proof failed: a byte would be written twice or not at all."""

    code = "coverage_failed"
    status = 422


class TransportError(WeightSyncError):
    """Moving the bytes failed."""

    code = "transport_error"
    status = 502


class RegistrationError(TransportError):
    """Memory could not be registered."""

    code = "registration_failed"


class PeerLostError(TransportError):
    """The other end of a transfer is gone."""

    code = "peer_lost"


class TransferFailedError(TransportError):
    """The transport gave the transfer up."""

    code = "transfer_failed"


class VerifyError(WeightSyncError):
    """The bytes arrived, and they are not the right ones."""

    code = "verify_failed"
    status = 409


class DeadlineError(WeightSyncError):
    """A wait ran out of time."""

    code = "deadline_exceeded"
    status = 504


class EngineError(WeightSyncError):
    """The engine answered with an error, or not at all."""

    code = "engine_error"
    status = 502


class AgentUnreachableError(WeightSyncError):
    """The agent does not answer HTTP."""

    code = "agent_unreachable"
    status = 503


class RankFailedError(WeightSyncError):
    """Another rank of the training job failed or is gone."""

    code = "rank_failed"


def all_errors(root: type[WeightSyncError] = WeightSyncError) -> Iterator[type[WeightSyncError]]:
    """Yield ``root`` and every class below it."""
    yield root
    for child in root.__subclasses__():
        yield from all_errors(child)


def from_problem(problem: Mapping[str, Any]) -> WeightSyncError:
    """The error that :meth:`WeightSyncError.to_problem` was made from.

    An unknown ``code`` (a newer agent) becomes a plain :class:`WeightSyncError` with the same text.
    """
    by_code: dict[str, type[WeightSyncError]] = {}
    for error in all_errors():
        by_code.setdefault(error.code, error)  # a class without a code of its own has its parent's
    cls = by_code.get(str(problem.get("code")), WeightSyncError)
    context = problem.get("context")
    return cls(
        str(problem.get("detail", "unknown error")),
        hint=str(problem.get("hint", "")),
        **(dict(context) if isinstance(context, Mapping) else {}),
    )
