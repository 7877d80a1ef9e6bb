"""Blocks that borders of shards cut: what ranks tell each other of them, and what that gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from weightsync.errors import ManifestError
from weightsync.geometry import Box
from weightsync.quantize import BLOCK, touched_blocks


@dataclass(frozen=True)
class Border:
    """What one rank has of a matrix, and the amax of the blocks that are not all in it.

    ``amax`` is float32, row by row, where :func:`cut_blocks` says.
    """

    name: str
    shape: tuple[int, int]
    box: Box
    amax: bytes


@dataclass(frozen=True)
class Findings:
    """What a rank tells before a push: its borders, and patterns that it has no matrix for."""

    borders: list[Border]
    unmatched: dict[str, list[str]]


def merge(findings: Sequence[Findings]) -> dict[str, bytes]:
    """On rank 0: of every matrix with cut blocks, the amax of each, float32 in the grid of blocks.

    Blocks that no border cuts are 0 there: who has such a block knows it.

    Raises:
        ManifestError: A pattern matches nothing on any rank, ranks disagree about a shape, or
            parts of a cut block are missing.
    """
    lost = set.intersection(*(set(f.unmatched) for f in findings))
    if lost:
        pattern = min(lost)
        near = sorted({name for f in findings for name in f.unmatched[pattern]})
        raise ManifestError(
            f"the quantization's pattern {pattern!r} matches no matrix of the trainer",
            hint=f"near: {', '.join(near[:4])}" if near else "leave it out",
            pattern=pattern,
            near=near,
        )
    by_name: dict[str, list[Border]] = {}
    for found in findings:
        for border in found.borders:
            by_name.setdefault(border.name, []).append(border)
    merged: dict[str, bytes] = {}
    for name, borders in by_name.items():
        shape = borders[0].shape
        if any(b.shape != shape for b in borders):
            raise ManifestError(
                f"{name!r} has different shapes on the ranks: {sorted({b.shape for b in borders})}",
                hint="declare shards as DTensor or LocalShard",
                tensor=name,
            )
        missing = _missing(shape, frozenset(b.box for b in borders))
        if missing is not None:
            raise ManifestError(
                f"no rank told of all of {name!r}{list(missing.lo)}..{list(missing.hi)}, a part of "
                "a block that a shard's border cuts",
                hint="shard a tensor so that the shards of a block make it up, on whatever ranks",
                tensor=name,
            )
        amax = np.zeros(_grid_shape(shape), dtype=np.float32)
        for b in borders:
            cut = cut_blocks(shape, b.box)
            at = amax[touched_blocks(b.box.shape, b.box.lo)]
            # a NaN stays one
            at[cut] = np.maximum(at[cut], np.frombuffer(b.amax, dtype=np.float32))
        merged[name] = amax.tobytes()
    return merged


@lru_cache(maxsize=4096)
def cut_blocks(shape: tuple[int, ...], box: Box) -> npt.NDArray[np.bool_]:
    """Which of the blocks that a box touches are not all in it; those at the tensor's end can be.

    Returns:
        Of the shape that :func:`weightsync.quantize.block_amax` gives for the box.
    """
    whole = []
    for n, lo, hi, blocks in zip(
        shape, box.lo, box.hi, touched_blocks(box.shape, box.lo), strict=True
    ):
        first = np.arange(blocks.start, blocks.stop) * BLOCK
        whole.append((first >= lo) & (np.minimum(first + BLOCK, n) <= hi))
    cut: npt.NDArray[np.bool_] = ~(whole[0][:, None] & whole[1][None, :])
    return cut


@lru_cache(maxsize=4096)
def _missing(shape: tuple[int, int], boxes: frozenset[Box]) -> Box | None:
    """A part of a block cut by one of the boxes that none of them has."""
    ordered = sorted(boxes, key=lambda b: b.lo)
    disjoint: list[Box] = []
    for box in ordered:
        rest = [box]
        for other in disjoint:
            rest = [part for piece in rest for part in piece.minus(other)]
        disjoint += rest
    counts = np.zeros(_grid_shape(shape), dtype=np.int64)
    cut = np.zeros(_grid_shape(shape), dtype=bool)
    for box in ordered:
        cut[touched_blocks(box.shape, box.lo)] |= cut_blocks(shape, box)
    for box in disjoint:
        rows, cols = (
            np.minimum((np.arange(blocks.start, blocks.stop) + 1) * BLOCK, hi)
            - np.maximum(np.arange(blocks.start, blocks.stop) * BLOCK, lo)
            for lo, hi, blocks in zip(
                box.lo, box.hi, touched_blocks(box.shape, box.lo), strict=True
            )
        )
        counts[touched_blocks(box.shape, box.lo)] += rows[:, None] * cols[None, :]
    for at in np.argwhere(cut).tolist():
        lo = tuple(k * BLOCK for k in at)
        block = Box(lo, tuple(min(a + BLOCK, n) for a, n in zip(lo, shape, strict=True)))
        if counts[tuple(at)] < block.numel:
            return block
    return None


def _grid_shape(shape: Sequence[int]) -> tuple[int, int]:
    rows, cols = (-(-n // BLOCK) for n in shape)
    return rows, cols


def grid_of(raw: bytes, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """One float32 a block of a matrix."""
    return np.frombuffer(raw, dtype=np.float32).reshape(_grid_shape(shape))
