"""What the trainer can make: the checkpoint tensors, by name, dtype and shape."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from weightsync.dtypes import itemsize
from weightsync.errors import ManifestError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One checkpoint tensor, as the engine's loader expects it.

    ``alias_of`` names another tensor of the manifest that holds the same memory (tied weights):
    an alias that the engine's loader skips is no error.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    alias_of: str = ""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its checkpoint dtype."""
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True)
class Manifest:
    """Every checkpoint tensor that a trainer can make.

    Raises:
        ManifestError: No tensors, a name twice, an empty name, an unknown dtype, a negative dim.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ManifestError("the manifest is empty", hint="hand over a model with parameters")
        twice = [n for n, k in Counter(t.name for t in self.tensors).items() if k > 1]
        if twice:
            raise ManifestError(
                f"names that appear twice in the manifest: {', '.join(sorted(twice)[:8])}",
                hint="every checkpoint tensor has one name",
                names=sorted(twice),
            )
        for tensor in self.tensors:
            itemsize(tensor.dtype)
            if not tensor.name or any(n < 0 for n in tensor.shape):
                raise ManifestError(
                    f"not a tensor: {tensor!r}", hint="names are not empty, dims >= 0"
                )

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> Manifest:
        """A manifest of these tensors, in this order."""
        return cls(tuple(tensors))

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """The tensors by name."""
        return {t.name: t for t in self.tensors}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors in their checkpoint dtypes."""
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, dtypes and shapes; equal manifests have equal digests."""
        h = hashlib.sha256()
        for t in sorted(self.tensors, key=lambda t: t.name):
            h.update(f"{t.name}\0{t.dtype}\0{t.shape}\n".encode())
        return h.hexdigest()

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
