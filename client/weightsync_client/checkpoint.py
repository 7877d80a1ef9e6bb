"""A checkpoint folder as what a push takes its weights from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from weightsync.checkpoint import Checkpoint
from weightsync.geometry import Box
from weightsync.manifest import TensorSpec


class CheckpointSource:
    """A folder of safetensors, in one file or many, as a WeightSource.

    The files are mapped: a push reads each page once, into its slots, and nothing else holds the
    model.  They must not change while it runs.

    Args:
        folder: Of a Hugging Face checkpoint.

    Raises:
        InputError: There are no readable safetensors, or of a dtype that does not travel.
    """

    def __init__(self, folder: Path) -> None:
        self._files = Checkpoint(folder)
        self._manifest = self._files.manifest().tensors
        self._holdings = {t.name: (Box.whole(t.shape),) for t in self._manifest}

    def manifest(self) -> Sequence[TensorSpec]:
        """Every tensor of the files."""
        return self._manifest

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """All of each."""
        return self._holdings

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """A view of the mapped file."""
        return self._files.tensor(name)
