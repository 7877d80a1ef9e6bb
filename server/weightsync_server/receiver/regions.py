"""Strided regions of flat tensors, and views of views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: regions that one view may fall into; past this it counts as computed
_MAX_PIECES = 4096


@dataclass(frozen=True, slots=True)
class Strided:
    """A strided region, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, t: torch.Tensor) -> Strided:
        """The region that a tensor is of its storage."""
        return cls(int(t.storage_offset()), tuple(t.shape), tuple(t.stride()))

    def expand(self, shape: Sequence[int]) -> Strided:
        """The region as torch broadcasts it to ``shape``."""
        lead = len(shape) - len(self.shape)
        strides = [0] * lead
        for size, want, stride in zip(self.shape, shape[lead:], self.strides, strict=True):
            strides.append(0 if size == 1 and want != 1 else stride)
        return Strided(self.offset, tuple(shape), tuple(strides))

    def merged(self) -> Strided:
        """The same elements in the same order with as few dims as possible."""
        dims: list[tuple[int, int]] = []
        for size, stride in zip(self.shape, self.strides, strict=True):
            if size == 1:
                continue
            if dims and dims[-1][1] == size * stride:
                dims[-1] = (dims[-1][0] * size, stride)
            else:
                dims.append((size, stride))
        return Strided(self.offset, tuple(n for n, _ in dims), tuple(s for _, s in dims))

    def along(self, pieces: Sequence[Piece]) -> list[Strided]:
        """The part of this region that belongs to each of ``pieces`` of a view of its shape."""
        return [
            Strided(
                self.offset + sum(i * s for i, s in zip(p.start, self.strides, strict=True)),
                p.region.shape,
                tuple(step * self.strides[dim] for dim, step in p.steps),
            )
            for p in pieces
        ]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a view, and the one strided region behind it.

    Attributes:
        start: Index of the box's first element in the view.
        steps: For each dim of ``region``, the view's dim that it runs along, and by how many.
        region: In elements of the storage behind.
    """

    start: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    region: Strided


@dataclass(frozen=True, slots=True)
class TracedCopy:
    """``tensor[src] -> param[dst]``; both regions have the same shape."""

    tensor: str
    src: Strided
    param: str
    dst: Strided


#: one dim of a view that is being split: size, stride, the view's dim, its step there
_Dim = tuple[int, int, int, int]


def whole(view: Strided) -> Piece:
    """A view of the storage itself: one piece."""
    dims = range(len(view.shape))
    return Piece((0,) * len(view.shape), tuple((d, 1) for d in dims), view)


def pieces(base: Strided, view: Strided) -> list[Piece] | None:
    """Regions behind a view of a copy.

    Args:
        base: What the copy was made of; the copy is contiguous, with ``base.shape``.
        view: A view of the copy's storage.

    Returns:
        Pieces that hold every element of the view once; None: it crosses base's dims in a way
        that few strided regions cannot express.
    """
    dims = [(n, s, d, 1) for d, (n, s) in enumerate(zip(view.shape, view.strides, strict=True))]
    found: list[Piece] = []
    if 0 in view.shape:
        return [Piece((0,) * len(dims), tuple((d, 1) for d in range(len(dims))), view)]
    done = _split(base.merged(), view.offset, (0,) * len(dims), dims, found)
    return found if done else None


def _halves(dim: _Dim, period: int) -> tuple[_Dim, _Dim]:
    """One dim as two: ``period`` steps, and how often they are taken."""
    n, stride, view_dim, factor = dim
    return (
        (period, stride, view_dim, factor),
        (n // period, stride * period, view_dim, factor * period),
    )


def _split(
    base: Strided, offset: int, start: tuple[int, ...], dims: list[_Dim], found: list[Piece]
) -> bool:
    """Add the pieces of ``dims`` from ``offset`` on to ``found``; False: it cannot be done."""
    steps = [math.prod(base.shape[d + 1 :]) for d in range(len(base.shape))]
    index, rest = [], offset
    for step in steps:
        index.append(rest // step)
        rest %= step
    if rest or any(i >= size for i, size in zip(index, base.shape, strict=True)):
        return False
    room = [size - i for size, i in zip(base.shape, index, strict=True)]
    strides = [0] * len(dims)
    # the widest steps first: what does not fit then is the dim that runs over an end
    for k in sorted(range(len(dims)), key=lambda k: -dims[k][1]):
        n, stride, dim, factor = dims[k]
        if n == 1 or stride == 0:
            continue
        d = next((d for d, step in enumerate(steps) if stride >= step), None)
        if d is None:
            return False
        if stride % steps[d]:
            # it starts somewhere else in each row: after so many steps at the same place again
            period = steps[d] // math.gcd(stride, steps[d])
            if n > period and n % period == 0:
                inner, outer = _halves(dims[k], period)
                return _split(base, offset, start, [*dims[:k], outer, inner, *dims[k + 1 :]], found)
            return n <= _MAX_PIECES - len(found) and all(
                _split(
                    base,
                    offset + i * stride,
                    (*start[:dim], start[dim] + i * factor, *start[dim + 1 :]),
                    [*dims[:k], (1, stride, dim, factor), *dims[k + 1 :]],
                    found,
                )
                for i in range(n)
            )
        times = stride // steps[d]
        if (n - 1) * times < room[d]:
            room[d] -= (n - 1) * times
            strides[k] = base.strides[d] * times
            continue
        fit = (room[d] - 1) // times + 1
        period = base.shape[d] // times
        if len(found) >= _MAX_PIECES or (fit == 1 and times >= base.shape[d]):
            return False
        if fit == period and base.shape[d] % times == 0 and n % period == 0:
            inner, outer = _halves(dims[k], period)
            return _split(base, offset, start, [*dims[:k], outer, inner, *dims[k + 1 :]], found)
        if fit == period and base.shape[d] % times == 0:
            fit = n // period * period
        first = [*dims[:k], (fit, stride, dim, factor), *dims[k + 1 :]]
        then = [*dims[:k], (n - fit, stride, dim, factor), *dims[k + 1 :]]
        later = (*start[:dim], start[dim] + fit * factor, *start[dim + 1 :])
        return _split(base, offset, start, first, found) and _split(
            base, offset + fit * stride, later, then, found
        )
    region = Strided(
        base.offset + sum(i * s for i, s in zip(index, base.strides, strict=True)),
        tuple(n for n, _, _, _ in dims),
        tuple(strides),
    )
    found.append(Piece(start, tuple((dim, factor) for _, _, dim, factor in dims), region))
    return True
