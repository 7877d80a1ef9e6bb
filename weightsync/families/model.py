"""A model as declared: its checkpoint tensors, and the kernel tensors that an engine makes of them.

Nothing here knows of ranks or workers; grids cut what is declared here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from weightsync.manifest import Manifest, TensorSpec

#: rows and columns of one fp8 block, which has one scale
BLOCK = 128

#: where a tensor sits in a pipeline: a layer's number, before the layers, or behind them
Stage = int | Literal["first", "last"]


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor, as a part of a kernel tensor.

    Attributes:
        name: The checkpoint tensor.
        shape: Its shape.
        split: The dim that tensor parallelism cuts; ``None``: every worker has it whole.
        heads: Of attention: it can be cut between heads only.  0: anywhere.
        shared: Where there are more workers than heads, several have the same head (keys, values).
        scale_of: Of a ``weight_scale_inv``: the shape of the weight whose blocks it scales.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    heads: int = 0
    shared: bool = False
    scale_of: tuple[int, ...] = ()

    def scales(self) -> Source:
        """The scales of this weight's blocks."""
        shape = tuple(-(-n // BLOCK) for n in self.shape)
        return Source(
            f"{self.name}_scale_inv", shape, self.split, self.heads, self.shared, self.shape
        )


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel tensor of the engine: ``sources`` one below another along dim 0.

    Attributes:
        name: The engine's name of it.
        dtype: Element type.
        stage: Where it sits in a pipeline.
        sources: What it is made of; with ``experts``, those of all experts, one after another.
        experts: 0, or how many experts it stacks along a dim in front.
        vocab: Dim 0 is the vocabulary, padded by the engine.
        source_dtype: Element type of the sources, where it is another.
        sequence: Whole on every worker where the engine runs the experts sequence-parallel.
    """

    name: str
    dtype: str
    stage: Stage
    sources: tuple[Source, ...]
    experts: int = 0
    vocab: bool = False
    source_dtype: str = ""
    sequence: bool = False


@dataclass(frozen=True)
class Model:
    """All kernel tensors of a model, in the engine's order.

    Attributes:
        family: The config's ``model_type``.
        layers: Decoder layers.
        tied: The output projection is the embedding, so the last pipeline stage has that too.
        ends_everywhere: The engine has what is before and behind the layers in every stage.
        kernels: The kernel tensors.
    """

    family: str
    layers: int
    tied: bool
    ends_everywhere: bool
    kernels: tuple[Kernel, ...]

    def checkpoint(self) -> Iterator[tuple[Kernel, int, Source]]:
        """Every checkpoint tensor once, with its kernel tensor and its place among the sources."""
        for kernel in self.kernels:
            for place, source in enumerate(kernel.sources):
                yield kernel, place, source

    @cached_property
    def manifest(self) -> Manifest:
        """The checkpoint tensors, in the dtypes in which they go over the wire."""
        return Manifest.of(
            TensorSpec(source.name, kernel.source_dtype or kernel.dtype, source.shape)
            for kernel, _, source in self.checkpoint()
        )
