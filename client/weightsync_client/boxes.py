"""Cutting, joining and reshaping what a rank holds of a tensor: its boxes move, no value does.

Every function takes what is held of whole tensors and answers what is then held of the whole
result, each piece as a view.  ``Held.dtype`` is that of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from weightsync.geometry import Box
from weightsync_client.held import Held
from weightsync_client.sharding import Interval

#: pieces that one tensor may come to on one rank; each is a copy of its own in every fill
MAX_PIECES = 4096


class MisfitError(ValueError):
    """A tensor has not the form that an operation needs; the message is half a sentence."""


def narrow(held: Held, dim: int, start: int, stop: int) -> Held:
    """Indices ``start`` to ``stop`` of a dim."""
    pieces = []
    for box, values in held.pieces:
        lo, hi = max(box.lo[dim], start), min(box.hi[dim], stop)
        if lo < hi:
            part = values.narrow(dim, lo - box.lo[dim], hi - lo)
            pieces.append((_with(box, dim, [(lo - start, hi - start)]), part))
    return Held(_put(held.shape, dim, [stop - start]), held.dtype, tuple(pieces))


def split(held: Held, dim: int, sizes: Sequence[int]) -> list[Held]:
    """Consecutive parts of a dim, which they add up to."""
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [narrow(held, dim, a, a + n) for a, n in zip(starts, sizes, strict=True)]


def unstack(held: Held, dim: int) -> list[Held]:
    """Every index of a dim by itself, without that dim."""
    pieces: list[list[tuple[Box, torch.Tensor]]] = [[] for _ in range(held.shape[dim])]
    for box, values in held.pieces:
        rest = _with(box, dim, [])
        for index, part in enumerate(values.unbind(dim), box.lo[dim]):
            pieces[index].append((rest, part))
    shape = _put(held.shape, dim, [])
    return [Held(shape, held.dtype, tuple(of_index)) for of_index in pieces]


def unsqueeze(held: Held, dim: int) -> Held:
    """A new dim of size 1 before ``dim``."""
    shape = (*held.shape[:dim], 1, *held.shape[dim:])
    pieces = tuple(
        (
            Box((*box.lo[:dim], 0, *box.lo[dim:]), (*box.hi[:dim], 1, *box.hi[dim:])),
            values.unsqueeze(dim),
        )
        for box, values in held.pieces
    )
    return Held(shape, held.dtype, pieces)


def concat(parts: Sequence[Held], dim: int) -> Held:
    """One behind another along a dim.

    Raises:
        MisfitError: They differ in another dim, or in dtype.
    """
    sizes = [held.shape[dim] for held in parts]
    return place_at(parts, dim, [sum(sizes[:k]) for k in range(len(sizes))], sum(sizes))


def place_at(parts: Sequence[Held], dim: int, starts: Sequence[int], size: int) -> Held:
    """Parts of a dim of ``size``, each from its start on; the gaps are other ranks'.

    Raises:
        MisfitError: They differ in another dim, or in dtype.
    """
    first = parts[0]
    pieces = []
    for held, start in zip(parts, starts, strict=True):
        if _put(first.shape, dim, []) != _put(held.shape, dim, []) or first.dtype != held.dtype:
            raise MisfitError(f"{_form(first)} and {_form(held)} do not go together in dim {dim}")
        pieces += [
            (_with(box, dim, [(start + box.lo[dim], start + box.hi[dim])]), values)
            for box, values in held.pieces
        ]
    return Held(_put(first.shape, dim, [size]), first.dtype, tuple(pieces))


def permute(held: Held, dims: Sequence[int]) -> Held:
    """Dim ``k`` of the result is dim ``dims[k]``."""
    pieces = tuple(
        (Box(tuple(box.lo[d] for d in dims), tuple(box.hi[d] for d in dims)), values.permute(*dims))
        for box, values in held.pieces
    )
    return Held(tuple(held.shape[d] for d in dims), held.dtype, pieces)


def unflatten(held: Held, dim: int, sizes: Sequence[int]) -> Held:
    """One dim as several, row by row.  A shard that ends within a row has several pieces."""
    for k in range(len(sizes) - 1):
        rest = math.prod(sizes[k + 1 :])
        pieces = []
        for box, values in held.pieces:
            for rows, cols in _rows(box.lo[dim + k], box.hi[dim + k], rest):
                inner = _with(box, dim + k, [rows, cols])
                start = rows[0] * rest + cols[0] - box.lo[dim + k]
                two = (rows[1] - rows[0], cols[1] - cols[0])
                part = values.narrow(dim + k, start, math.prod(two)).unflatten(dim + k, two)
                pieces.append((inner, part))
        shape = _put(held.shape, dim + k, [sizes[k], rest])
        held = replace(held, shape=shape, pieces=tuple(pieces))
    return held


def flatten(held: Held, dim: int, count: int) -> Held:
    """Several dims as one.  What is no view, or no box, has a piece for each row.

    Raises:
        MisfitError: More than :data:`MAX_PIECES`.
    """
    for k in range(dim + count - 2, dim - 1, -1):
        pieces: list[tuple[Box, torch.Tensor]] = []
        width = held.shape[k + 1]
        for box, values in held.pieces:
            (r0, r1), (c0, c1) = (box.lo[k], box.hi[k]), (box.lo[k + 1], box.hi[k + 1])
            strides = values.stride()
            if r1 - r0 == 1 or (
                c1 - c0 == width and (width == 1 or strides[k] == width * strides[k + 1])
            ):
                rows: list[Interval] = [(r0, r1)]
            else:
                rows = [(r, r + 1) for r in range(r0, r1)]
            if len(pieces) + len(rows) > MAX_PIECES:
                raise MisfitError(
                    f"a rank's shard of {list(held.shape)} would be more than {MAX_PIECES} boxes "
                    f"when dims {k} and {k + 1} become one"
                )
            for a, b in rows:
                inner = _with(_with(box, k + 1, []), k, [(a * width + c0, (b - 1) * width + c1)])
                pieces.append((inner, values.narrow(k, a - r0, b - a).flatten(k, k + 1)))
        shape = _put(_put(held.shape, k + 1, []), k, [held.shape[k] * width])
        held = replace(held, shape=shape, pieces=tuple(pieces))
    return held


def _rows(lo: int, hi: int, width: int) -> Iterator[tuple[Interval, Interval]]:
    """Boxes (rows, columns) of the elements ``lo`` to ``hi`` of rows laid end to end."""
    while lo < hi:
        row, col = divmod(lo, width)
        if col or hi - lo < width:
            stop = min(width, col + hi - lo)
            yield (row, row + 1), (col, stop)
            lo += stop - col
        else:
            yield (row, hi // width), (0, width)
            lo = hi // width * width


def _with(box: Box, dim: int, intervals: Sequence[Interval]) -> Box:
    """The box with these intervals in the place of one dim's."""
    return Box(
        _put(box.lo, dim, [a for a, _ in intervals]), _put(box.hi, dim, [b for _, b in intervals])
    )


def _put(numbers: tuple[int, ...], dim: int, new: Sequence[int]) -> tuple[int, ...]:
    return (*numbers[:dim], *new, *numbers[dim + 1 :])


def _form(held: Held) -> str:
    return f"{str(held.dtype).removeprefix('torch.')} {list(held.shape)}"
