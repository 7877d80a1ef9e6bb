"""Elements and strides of contiguous tensors."""

from __future__ import annotations

import math


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides, step = [1] * len(shape), 1
    for k in range(len(shape) - 1, -1, -1):
        strides[k] = step
        step *= shape[k]
    return tuple(strides)


def numel_of(shape: tuple[int, ...]) -> int:
    """Elements of a tensor."""
    return math.prod(shape)
