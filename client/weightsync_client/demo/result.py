"""What the demo found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: the demo proved everything
EXIT_OK = 0
#: something failed, or was not equal
EXIT_FAILED = 1
#: bad arguments; nothing was started, or the config cannot be used
EXIT_BAD_ARGUMENTS = 2
#: tensors were refused; the engine still serves its old weights
EXIT_REFUSED = 3

#: what ``pushes`` tells of one push, out of its report
PUSH_FIELDS = (
    "version",
    "nbytes",
    "fill_s",
    "pause_s",
    "write_s",
    "commit_s",
    "resume_s",
    "total_s",
    "paused_s",
)


@dataclass(slots=True)
class DemoResult:
    """The demo's outcome, filled as it goes; what was not reached keeps its first value.

    Attributes:
        engine: Name and version.
        pushes: :data:`PUSH_FIELDS` of each push that committed.
        kernel_tensors: Tensors that the engine computes with, over all its workers.
        direct: Those that are written in place.
        staged: Those that the engine repacks at commit.
        refused: Those that cannot be written.
        bytes_equal_fresh_load: Every final kernel tensor has the SHA-256 that it has in a second
            engine, freshly loaded from the trainer's checkpoint.
        logprobs_equal_fresh_load: So have all generated tokens and their log probabilities.
        refusals: ``{"tensor": ..., "reason": ...}`` of each refused tensor.
        old_weights_served: After a refusal: the engine answers as it did before the push.
        folder: Where logs and checkpoints are; empty if they are gone.
        error: What went wrong, for a person; empty if nothing did.
        exit_code: One of the ``EXIT_`` constants.
    """

    engine: str = ""
    pushes: list[dict[str, Any]] = field(default_factory=list)
    kernel_tensors: int = 0
    direct: int = 0
    staged: int = 0
    refused: int = 0
    bytes_equal_fresh_load: bool = False
    logprobs_equal_fresh_load: bool = False
    refusals: list[dict[str, str]] = field(default_factory=list)
    old_weights_served: bool = False
    folder: str = ""
    error: str = ""
    exit_code: int = EXIT_FAILED

    @property
    def ok(self) -> bool:
        """Whether all was proven."""
        return self.exit_code == EXIT_OK

    def add_push(self, report: Mapping[str, Any]) -> None:
        """Note a push that committed, from its report."""
        self.pushes.append({name: report[name] for name in PUSH_FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "ok": self.ok,
            "engine": self.engine,
            "pushes": self.pushes,
            "kernel_tensors": self.kernel_tensors,
            "direct": self.direct,
            "staged": self.staged,
            "refused": self.refused,
            "bytes_equal_fresh_load": self.bytes_equal_fresh_load,
            "logprobs_equal_fresh_load": self.logprobs_equal_fresh_load,
            "refusals": self.refusals,
        }
