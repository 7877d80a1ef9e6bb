"""A source whose matrices are published as fp8 blocks, sharded or not.

A block that a shard's border cuts needs the largest value of all its parts.  Before a push the
ranks tell rank 0 the amax of their parts of such blocks, and get those of the whole blocks back;
nothing else travels.  From then on each rank makes its own bytes, and they are those that the
whole tensor would have given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from weightsync.errors import InputError, ManifestError
from weightsync.geometry import Box
from weightsync.manifest import TensorSpec
from weightsync.quantize import (
    BLOCK,
    block_amax,
    quantize,
    quantize_with_scales,
    scales_from_amax,
    touched_blocks,
)
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.source import WeightSource

#: bytes of fp8 that one launch makes on a GPU, and that are kept for each form of box
BATCH_NBYTES = 64 << 20

#: a box: its tensor's name and its place among that tensor's boxes
Key = tuple[str, int]


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


class _Form(NamedTuple):
    """What boxes of one launch have in common; ``cut``: some blocks are not all in the box."""

    shape: tuple[int, ...]
    lead: tuple[int, int]
    cut: bool


class QuantizedSource:
    """Another source's tensors, those that a spec selects as fp8 values and scales.

    ``local`` quantises when it is asked, on a GPU what looks alike in one launch.  Memory beside
    the slots: the last such batch of every form of box (64 MiB each; one box on a CPU), and the
    scales, 4 bytes for 16384 values.  A block's scale is declared by who has its first value.

    Args:
        source: Its values must not change until the push is over.
        spec: Selects.

    Raises:
        ManifestError: The source has a tensor of the name that a scale would get.
    """

    def __init__(self, source: WeightSource, spec: QuantizationSpec) -> None:
        self._source = source
        self._spec = spec
        self._given = tuple(source.manifest())
        chosen = spec.select(self._given)
        self._chosen = {t.name: t for t in self._given if t.name in chosen}
        self._keys: dict[_Form, list[Key]] = {}
        self._places: dict[Key, tuple[_Form, int]] = {}
        self._boxes: dict[Key, Box] = {}
        self._parts: dict[str, list[tuple[Key, tuple[slice, slice]]]] = {}
        self._merged: Mapping[str, bytes] = {}
        self._amax: dict[Key, npt.NDArray[np.float32]] = {}
        self._scales: dict[Key, torch.Tensor] = {}
        self._batches: dict[_Form, dict[Key, torch.Tensor]] = {}
        self._tensors: list[TensorSpec] = []
        self._holdings = dict(source.holdings())
        if taken := sorted(
            {f"{name}_scale_inv" for name in chosen} & {t.name for t in self._given}
        ):
            raise ManifestError(
                f"{taken[0]!r} is there already, and its weight would be quantised",
                hint="exclude that weight, or push without the scales",
                tensor=taken[0],
            )
        for t in self._given:
            self._declare(t)

    def _declare(self, tensor: TensorSpec) -> None:
        name, alias = tensor.name, tensor.alias_of
        if name not in self._chosen:
            self._tensors.append(
                TensorSpec(name, tensor.dtype, tensor.shape, "" if alias in self._chosen else alias)
            )
            return
        alias = alias if alias in self._chosen else ""
        grid = tuple(-(-n // BLOCK) for n in tensor.shape)
        scales = f"{name}_scale_inv"
        self._tensors += [
            TensorSpec(name, "float8_e4m3fn", tensor.shape, alias),
            TensorSpec(scales, "float32", grid, f"{alias}_scale_inv" if alias else ""),
        ]
        parts = self._parts[scales] = []
        owned = []
        for index, box in enumerate(self._holdings.get(name, ())):
            key = name, index
            form = _Form(box.shape, _lead(box), bool(cut_blocks(tensor.shape, box).any()))
            of_form = self._keys.setdefault(form, [])
            self._boxes[key], self._places[key] = box, (form, len(of_form))
            of_form.append(key)
            mine = _owned(box)
            if mine.numel:
                first = tuple(s.start for s in touched_blocks(box.shape, box.lo))
                rows, cols = (
                    slice(a - start, b - start)
                    for a, b, start in zip(mine.lo, mine.hi, first, strict=True)
                )
                parts.append((key, (rows, cols)))
                owned.append(mine)
        self._holdings[scales] = tuple(owned)

    def manifest(self) -> Sequence[TensorSpec]:
        """The other source's tensors; behind each that is quantised, its scales."""
        return self._tensors

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """Boxes of values as the other source has them, and of scales."""
        return self._holdings

    @property
    def cut_nbytes(self) -> int:
        """Values that :meth:`findings` reads, as bytes of bfloat16."""
        cut = (box for key, box in self._boxes.items() if self._places[key][0].cut)
        return 2 * sum(box.numel for box in cut)

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The values of one box.  What was not asked for lately is quantised anew.

        Raises:
            InputError: The other source's values have not the shape that it declared.
        """
        if name in self._chosen:
            return self._fp8((name, box_index))
        if name not in self._parts:
            return self._source.local(name, box_index)
        key, part = self._parts[name][box_index]
        self._know_cut_scales()
        if key not in self._scales:
            self._fp8(key)
        return self._scales[key][part]

    # ------------------------------------------------------------ what the ranks exchange

    @torch.no_grad()
    def findings(self) -> Findings:
        """What this rank tells the others; forgets what an earlier try has made."""
        self._amax, self._scales, self._batches = {}, {}, {}
        queued = [
            (batch, block_amax(values, form.lead))
            for form, keys in self._keys.items()
            if form.cut
            for batch, values in self._alike(keys)
        ]
        borders = []
        for batch, amax in queued:  # all were launched before the first is waited for
            for key, found in zip(batch, amax.cpu().numpy(), strict=True):
                shape, box = self._chosen[key[0]].shape, self._boxes[key]
                self._amax[key] = found
                cut = found[cut_blocks(shape, box)]
                borders.append(Border(key[0], (shape[0], shape[1]), box, cut.tobytes()))
        return Findings(borders, self._spec.unmatched(self._given))

    def learn(self, merged: Mapping[str, bytes]) -> None:
        """Take in what :func:`merge` has made of all ranks' findings."""
        self._merged = merged

    def _know_cut_scales(self) -> None:
        """Make the scales of all boxes with cut blocks, once a push."""
        if not self._amax:
            return
        by_device: dict[torch.device, list[Key]] = {}
        for key, amax in self._amax.items():
            shape, box = self._chosen[key[0]].shape, self._boxes[key]
            cut = cut_blocks(shape, box)
            whole = _grid(self._merged[key[0]], shape)
            amax[cut] = whole[touched_blocks(box.shape, box.lo)][cut]
            by_device.setdefault(self._source.local(*key).device, []).append(key)
        for device, keys in by_device.items():
            flat = np.concatenate([self._amax[key].ravel() for key in keys])
            scales = scales_from_amax(torch.from_numpy(flat).to(device))
            sizes = [self._amax[key].size for key in keys]
            for key, made in zip(keys, scales.split(sizes), strict=True):
                self._scales[key] = made.view(self._amax[key].shape)
        self._amax = {}

    # ------------------------------------------------------------ quantising

    @torch.no_grad()
    def _fp8(self, key: Key) -> torch.Tensor:
        form, place = self._places[key]
        batch = self._batches.get(form, {})
        if key in batch:
            return batch[key]
        self._know_cut_scales()
        self._batches.pop(form, None)  # its memory is free for the next
        keys, values = next(self._alike(self._keys[form], place))
        if form.cut:
            scales = torch.stack([self._scales[k] for k in keys])
            weight = quantize_with_scales(values, form.lead, scales)
        else:
            weight, made = quantize(values)
            self._scales.update(zip(keys, made, strict=True))
        self._batches[form] = dict(zip(keys, weight, strict=True))
        return self._batches[form][key]

    def _alike(
        self, keys: Sequence[Key], start: int = 0
    ) -> Iterator[tuple[list[Key], list[torch.Tensor]]]:
        """Boxes from ``start`` on, in batches that one launch can take."""
        batch: list[Key] = []
        values: list[torch.Tensor] = []
        nbytes = 0
        for key in islice(keys, start, None):
            t = self._values(key)
            if batch and (
                nbytes + t.numel() > BATCH_NBYTES
                or (t.device, t.dtype, t.stride())
                != (values[0].device, values[0].dtype, values[0].stride())
            ):
                yield batch, values
                batch, values, nbytes = [], [], 0
            batch.append(key)
            values.append(t)
            nbytes += t.numel()
            if t.device.type == "cpu":  # nothing is launched there: what is not wanted costs time
                yield batch, values
                batch, values, nbytes = [], [], 0
        if batch:
            yield batch, values

    def _values(self, key: Key) -> torch.Tensor:
        values, shape = self._source.local(*key).detach(), self._boxes[key].shape
        if tuple(values.shape) != shape:
            raise InputError(
                f"{key[0]!r} has shape {tuple(values.shape)}, declared was {shape}",
                hint="weights must not change shape in a push",
                tensor=key[0],
            )
        return values


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


def _grid(raw: bytes, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    return np.frombuffer(raw, dtype=np.float32).reshape(_grid_shape(shape))


def _lead(box: Box) -> tuple[int, int]:
    return box.lo[0] % BLOCK, box.lo[1] % BLOCK


def _owned(box: Box) -> Box:
    """The blocks whose first value is in a box: shards of a tensor share its blocks out."""
    return Box(tuple(-(-n // BLOCK) for n in box.lo), tuple(-(-n // BLOCK) for n in box.hi))
