"""What the receiver needs from an engine.  One adapter lives in every worker process.

The receiver knows torch modules and memory; an adapter knows how its engine builds, loads and
post-processes a model.  ``vllm.py`` and ``torch_engine.py`` implement it.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from weightsync.layout import WorkerPlace


class EngineAdapter(abc.ABC):
    """One engine's ways, in one worker.  Called from the worker's own thread only."""

    #: engine name and version, for people and for the compatibility warning
    name: str
    version: str
    #: logical place of this worker (never a device number); its ``engine`` is the agent's to say
    place: WorkerPlace
    #: where the live weights are
    device: torch.device

    @property
    @abc.abstractmethod
    def live(self) -> nn.Module:
        """The model that serves."""

    @abc.abstractmethod
    def new_twin(self) -> nn.Module:
        """The same model in *load format*: on the meta device, never loaded, never post-processed.

        Parameter and buffer names equal the live model's.  Must not disturb the live model.
        """

    @abc.abstractmethod
    def load(self, twin: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Run the engine's own loader on a twin (of ``new_twin``) with checkpoint tensors.

        Errors of the loader pass through: the caller knows which tensor it was.
        """

    @abc.abstractmethod
    def finish(self, module: nn.Module) -> None:
        """Run the engine's own post-processing of one loaded module, in place.

        ``module`` is a copy of a twin's module, its parameters materialised in load format.
        """

    @abc.abstractmethod
    def refresh(self) -> None:
        """Recompute, in place, what the live model derives from more than one module's weights."""

    @abc.abstractmethod
    def read_back(
        self, module: nn.Module, param: str, columns: torch.Tensor, width: int
    ) -> torch.Tensor | None:
        """Columns of the weight that an opaque kernel holds, read back through what it computes.

        Called for a parameter ``[N, K]`` that post-processing emptied, or keeps a packed copy of.
        A product with unit vectors returns weights exactly.

        Args:
            module: Live module, or a finished copy.
            param: Its parameter's name.
            columns: int64[C] indices below K.
            width: K, the parameter's columns in load format.

        Returns:
            [N, C] in the parameter's dtype; None: this module computes nothing of the kind.
        """

    @abc.abstractmethod
    def checkpoint(self) -> Path | None:
        """Folder of safetensors that the live weights came from; None where there is none."""

    def optional(self, twin: nn.Module) -> frozenset[str]:
        """Parameters of a twin that checkpoints may lack: whatever they hold, nothing reads it."""
        del twin
        return frozenset()

    def synchronize(self) -> None:
        """Wait until the device has finished all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def replaceable(self) -> bool:
        """Whether a live parameter may be replaced by another object (no captured graphs)."""
        return self.device.type == "cpu"
