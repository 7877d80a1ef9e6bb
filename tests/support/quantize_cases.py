"""Weights that block quantisation must get right to the bit, and a formula of its own to tell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from weightsync.quantize import Quantized

#: every kind of block: name -> values of a shape
KINDS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "random": lambda shape: torch.randn(shape) * 0.02,
    "tiny": lambda shape: torch.randn(shape) * 1e-7,
    "around_the_floor": lambda shape: torch.randn(shape) * 448e-12,
    "subnormal": lambda shape: torch.randn(shape) * 1e-39,
    "huge": lambda shape: (torch.rand(shape) * 2 - 1) * torch.finfo(torch.bfloat16).max,
    "zero": torch.zeros,
    "minus_zero": lambda shape: -torch.zeros(shape),
    "wide": lambda shape: torch.randn(shape) * 2.0 ** torch.randint(-30, 30, shape).float(),
}

SHAPES = [(128, 128), (256, 384), (1, 300), (129, 1), (200, 144), (77, 513), (2, 130, 272)]


def random_weights(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Weights of a kind; the same each time."""
    torch.manual_seed(hash((len(kind), *shape)) % 1000)
    return KINDS[kind](shape).to(dtype)


def all_pairs() -> torch.Tensor:
    """Every mantissa of a value with every mantissa of an amax: one block of 128×128 an amax.

    The columns are the 128 mantissas of bfloat16 (8 significant bits), the rows 2**0 to 2**-20,
    with both signs; the first value of a block is its amax.
    """
    mantissa = 1 + torch.arange(128) / 128
    blocks = []
    for amax in mantissa:
        exponent = -1 - torch.arange(128) % 21
        block = mantissa[None, :] * 2.0 ** exponent[:, None]
        block[63:] *= -1
        block[0, 0] = amax
        blocks.append(block)
    return torch.cat(blocks).to(torch.bfloat16)


def mismatch(got: Quantized, want: Quantized) -> str:
    """What differs, in words; empty where nothing does.  Compares bits, so that -0 is not 0."""
    lines = []
    for name, a, b in zip(("weight", "scale_inv"), got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
            continue
        kind = torch.uint8 if a.dtype.itemsize == 1 else torch.int32
        bits_a, bits_b = (t.detach().cpu().contiguous().view(kind) for t in (a, b))
        bad = (bits_a != bits_b).nonzero()
        for where in bad[:5].tolist():
            at = tuple(where)
            lines.append(
                f"{name}{where}: {a.cpu().float()[at].item()!r} ({bits_a[at].item():#x}), "
                f"not {b.cpu().float()[at].item()!r} ({bits_b[at].item():#x})"
            )
        if len(bad):
            lines.append(f"{name}: {len(bad)} of {bits_a.numel()} differ")
    return "\n".join(lines)


def _e4m3_values() -> np.ndarray:
    """The 127 values that are not negative, by their bits, from the format's definition."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def formula(weights: torch.Tensor) -> Quantized:
    """The formula in numpy, block by block, with a table in the place of a cast."""
    rounded = weights.to(torch.bfloat16).float().numpy()
    table = _e4m3_values()
    middles = (table[1:] + table[:-1]) / 2  # exact in float64
    fp8 = np.zeros(rounded.shape, dtype=np.uint8)
    *lead, rows, cols = rounded.shape
    scales = np.zeros((*lead, -(-rows // 128), -(-cols // 128)), dtype=np.float32)
    for at in np.ndindex(*scales.shape):
        *e, i, j = at
        where = (*e, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        block = rounded[where]
        scale = np.maximum(np.abs(block).max() / np.float32(448), np.float32(1e-12))
        quotient = np.abs(block / scale).astype(np.float64)
        # the first code whose upper middle is not below; on a middle the even one of the two
        code = np.searchsorted(middles, quotient)
        tie = (code < len(middles)) & (middles[np.minimum(code, 125)] == quotient)
        code = np.where(tie & (code % 2 == 1), code + 1, code)
        fp8[where] = code | (np.signbit(block) << 7)
        scales[at] = scale
    return Quantized(torch.from_numpy(fp8).view(torch.float8_e4m3fn), torch.from_numpy(scales))


def boxes(
    rows: list[int], cols: list[int]
) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """The boxes between cuts of the rows and of the columns: offset, and where."""
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(cols):
            yield (top, left), (slice(top, bottom), slice(left, right))
