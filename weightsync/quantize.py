"""fp8 block quantisation: e4m3 values with one float32 scale for every block of 128×128.

The formula (WS-12), of a tensor ``w`` that is rounded to bfloat16 first, for every block::

    scale  = max(amax(|w|) / 448, 1e-12)
    weight = e4m3(clamp(w / scale, -448, 448))        w is about weight * scale

with float32 arithmetic, both divisions correctly rounded (IEEE 754, to nearest even), and a cast
that rounds to nearest even.  ``scale`` is the checkpoint's ``weight_scale_inv``.

It is the formula of prime-rl's weight transfer (``quantize_to_fp8_blockwise``, and its grouped
kernel): the floor is on the scale, and the quotient is a division.  slime's and miles' converters
to fp8 divide, too, with a floor on amax, which differs in all-zero blocks alone.  Multiplying by
``1 / scale`` (vLLM's and DeepGEMM's ``per_block_cast_to_fp8``) or by ``448 / amax`` (transformers)
gives other bytes in a few values of a million, and a floor of 1e-4 makes small weights zero.
Torch turns ``tensor / 448.0`` into a multiplication on GPUs and not on CPUs; here the divisor is
a tensor, so that all devices agree.

A block with a NaN or an infinity gets a scale that is not finite, and bytes that mean nothing: who
calls this refuses such weights.

On GPUs this runs in Triton (``quantize_triton``), elsewhere, and where Triton is missing, in plain
torch operations, which are the reference; the bytes are the same.

Shards: a rank may hold a box of a tensor whose border lies within a block.  Nothing is gathered:
every rank calls :func:`block_amax`, the ranks that share a block exchange the maximum of its amax,
and :func:`quantize_with_scales` makes the bytes, which equal those of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 -- as everywhere

from weightsync.errors import InputError

#: rows and columns that share a scale
BLOCK = 128
#: the largest value of float8_e4m3fn
E4M3_MAX = 448.0
#: the least scale: an all-zero block has this one, and no NaN
SCALE_FLOOR = 1e-12

_FP8 = torch.float8_e4m3fn
_F32 = torch.float32
_SOURCES = (torch.bfloat16, torch.float32, torch.float16)
#: bytes of float32 that plain torch operations make at a time
_STRIP_NBYTES = 16 << 20

#: one [N, K] or [E, N, K] tensor, or E tensors [N, K] that are taken as if they were stacked
Weights = torch.Tensor | Sequence[torch.Tensor]


class Quantized(NamedTuple):
    """A quantised tensor.

    ``weight`` is float8_e4m3fn of the source's shape; ``scale_inv`` is float32 of shape
    ``[..., ceil(N / 128), ceil(K / 128)]``.  The value is ``weight * scale_inv``.
    """

    weight: torch.Tensor
    scale_inv: torch.Tensor


def touched_blocks(shape: Sequence[int], box_offset: Sequence[int] = (0, 0)) -> tuple[slice, slice]:
    """Which rows and columns of the whole tensor's grid of blocks a box has elements in.

    Args:
        shape: Of the box; its last two dims count.
        box_offset: Where the box begins in the whole tensor (``Box.lo``); likewise.

    Returns:
        The part of ``scale_inv`` that :func:`block_amax` and :func:`quantize_with_scales` speak of.
    """
    first_row, first_col = (lo // BLOCK for lo in box_offset[-2:])
    rows, cols = _grid(shape[-2:], _lead(box_offset))
    return slice(first_row, first_row + rows), slice(first_col, first_col + cols)


def quantize(weights: Weights, *, out: Quantized | None = None) -> Quantized:
    """Quantise a whole tensor, or a group of them in one launch.

    Args:
        weights: bfloat16, float16 or float32, any strides; what is not bfloat16 is rounded to it.
            A sequence gives ``[E, N, K]``.
        out: Memory to write to, any strides.

    Returns:
        ``out``, or new tensors.  On a GPU the kernel is queued on the current stream, and
        ``weights`` may be written again by work queued behind it.

    Raises:
        InputError: Wrong dtype, dims or shapes, or a group of different shapes or devices.
    """
    batch = _batch(weights)
    weight = batch.output("out.weight", out.weight if out else None, batch.shape[1:], _FP8)
    grid = _grid(batch.shape[1:], (0, 0))
    scale_inv = batch.output("out.scale_inv", out.scale_inv if out else None, grid, torch.float32)
    kernels = _kernels(batch.device)
    if kernels is not None:
        kernels.quantize(batch.tensors, weight, scale_inv)
    else:
        scale_inv.copy_(scales_from_amax(_amax(batch, (0, 0))))
        _encode(batch, (0, 0), scale_inv, weight)
    return out or Quantized(batch.squeeze(weight), batch.squeeze(scale_inv))


class Prepared(Protocol):
    """What was prepared to be quantised again and again."""

    def run(self) -> None:
        """Queue it on the current stream."""


def prepare_each(
    weights: Sequence[torch.Tensor], out: Sequence[Quantized]
) -> list[Prepared] | None:
    """Prepare to :func:`quantize` each ``[N, K]`` tensor into memory of its own.

    What is prepared reads and writes what is at the tensors' addresses, and keeps none of them.

    Returns:
        One launch for all that have dtype, shape and strides in common; None: there are no kernels
        for this device.

    Raises:
        InputError: As :func:`quantize`.
    """
    each = [
        (
            batch.tensors[0],
            batch.output("out.weight", made.weight, batch.shape[1:], _FP8)[0],
            batch.output("out.scale_inv", made.scale_inv, _grid(batch.shape[1:], (0, 0)), _F32)[0],
        )
        for batch, made in zip(map(_batch, weights), out, strict=True)
    ]
    if not each:
        return []
    kernels = _kernels(each[0][0].device)
    if kernels is None:
        return None
    found: list[Prepared] = kernels.launches(*zip(*each, strict=True))
    return found


def block_amax(local: Weights, box_offset: Sequence[int] = (0, 0)) -> torch.Tensor:
    """The largest absolute value, after rounding to bfloat16, of each block that a box touches.

    Args:
        local: The box: what this rank holds of a tensor, or of each tensor of a group.
        box_offset: Where it begins in the whole tensor; the last two dims count.

    Returns:
        float32, shaped as :func:`touched_blocks` says (``[E, ...]`` for a group).  A block's
        border may lie outside of the box: its value is then a part, and the maximum over the
        ranks that touch the block the whole.

    Raises:
        InputError: As :func:`quantize`.
    """
    batch = _batch(local)
    lead = _lead(box_offset)
    kernels = _kernels(batch.device)
    if kernels is None:
        return batch.squeeze(_amax(batch, lead))
    amax = batch.output("amax", None, _grid(batch.shape[1:], lead), torch.float32)
    kernels.block_amax(batch.tensors, lead, amax)
    return batch.squeeze(amax)


def scales_from_amax(amax: torch.Tensor) -> torch.Tensor:
    """``max(amax / 448, 1e-12)`` of a float32 tensor, the division correctly rounded."""
    # torch multiplies by the reciprocal of a Python number on GPUs: that is an ulp off
    divisor = torch.full((), E4M3_MAX, dtype=torch.float32, device=amax.device)
    return torch.div(amax, divisor).clamp_(min=SCALE_FLOOR)


def quantize_with_scales(
    local: Weights,
    box_offset: Sequence[int],
    scales: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The fp8 values of a box, with the scales of the blocks that it touches.

    Args:
        local: As for :func:`block_amax`.
        box_offset: Likewise.
        scales: :func:`scales_from_amax` of the blocks' amax over all ranks, of the shape that
            :func:`block_amax` gave.
        out: float8_e4m3fn memory to write to, of the box's shape, any strides.

    Raises:
        InputError: As :func:`quantize`.
    """
    batch = _batch(local)
    lead = _lead(box_offset)
    weight = batch.output("out", out, batch.shape[1:], _FP8)
    scales = batch.output("scales", scales, _grid(batch.shape[1:], lead), torch.float32)
    kernels = _kernels(batch.device)
    if kernels is not None:
        kernels.quantize_with_scales(batch.tensors, lead, scales, weight)
    else:
        _encode(batch, lead, scales, weight)
    return batch.squeeze(weight) if out is None else out


@dataclass(frozen=True, slots=True)
class _Batch:
    """``tensors`` are the matrices: one [E, N, K] tensor, or E of [N, K] with equal strides."""

    tensors: torch.Tensor | tuple[torch.Tensor, ...]
    shape: tuple[int, int, int]
    device: torch.device
    grouped: bool

    def output(
        self, what: str, given: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """``given`` as [E, *shape], once it is what is needed; new memory if there is none."""
        if given is None:
            return torch.empty(self.shape[0], *shape, dtype=dtype, device=self.device)
        want = (self.shape[0], *shape) if self.grouped else tuple(shape)
        if given.shape != want or given.dtype != dtype or given.device != self.device:
            raise InputError(
                f"{what} must be {dtype} of shape {want} on {self.device}, "
                f"got {given.dtype} of shape {tuple(given.shape)} on {given.device}",
                hint="touched_blocks() tells the shape of a box's scales",
            )
        return given if self.grouped else given.unsqueeze(0)

    def squeeze(self, made: torch.Tensor) -> torch.Tensor:
        """Without the group's dim, if the caller's tensor had none."""
        return made if self.grouped else made[0]


def _batch(weights: Weights) -> _Batch:
    tensors: torch.Tensor | tuple[torch.Tensor, ...]
    if isinstance(weights, torch.Tensor):
        first, grouped = weights, weights.dim() == 3
        tensors = weights.detach() if grouped else weights.detach().unsqueeze(0)
        shape = tuple(tensors.shape)
    else:
        if not weights:
            raise InputError("a group of tensors to quantise is empty", hint="leave it out")
        first, grouped = weights[0], True
        shape = (len(weights), *first.shape)
        for t in weights:
            if (t.shape, t.dtype, t.device) != (first.shape, first.dtype, first.device):
                raise InputError(
                    f"a group is quantised in one launch: expected {first.dtype} of shape "
                    f"{tuple(first.shape)} on {first.device}, got {t.dtype} of shape "
                    f"{tuple(t.shape)} on {t.device}",
                    hint="quantise tensors of different shapes in groups of their own",
                )
        tensors = tuple(t.detach() for t in weights)
        if any(t.stride() != first.stride() for t in tensors):
            tensors = tuple(t.contiguous() for t in tensors)
    if len(shape) != 3 or first.dtype not in _SOURCES:
        raise InputError(
            f"cannot quantise {first.dtype} of shape {tuple(first.shape)} in 128×128 blocks",
            hint="weights are [N, K] or [E, N, K] in bfloat16, float16 or float32",
        )
    return _Batch(tensors, shape, first.device, grouped)


def _lead(box_offset: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the first block that lie before the box."""
    row, col = box_offset[-2:]
    return row % BLOCK, col % BLOCK


def _grid(shape: Sequence[int], lead: tuple[int, int]) -> tuple[int, int]:
    rows, cols = (
        -(-(skip + extent) // BLOCK) if extent else 0
        for extent, skip in zip(shape, lead, strict=True)
    )
    return rows, cols


def _kernels(device: torch.device) -> ModuleType | None:
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from weightsync import quantize_triton

    return quantize_triton


def _strips(x: torch.Tensor, lead: tuple[int, int]) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """A matrix in strips of whole rows of blocks: rows, rows of blocks, and [R, 128, C, 128].

    The blocks are float32 of the values rounded to bfloat16, zero outside of the box.
    """
    rows, cols = x.shape
    grid_rows, grid_cols = _grid((rows, cols), lead)
    step = max(_STRIP_NBYTES // max(grid_cols * BLOCK * BLOCK * 4, 1), 1)
    for first in range(0, grid_rows if cols else 0, step):
        blocks = slice(first, min(first + step, grid_rows))
        lo, hi = (b * BLOCK - lead[0] for b in (blocks.start, blocks.stop))
        part = slice(max(lo, 0), min(hi, rows))
        wide = x[part].to(torch.bfloat16).to(torch.float32)  # WS-12
        right = grid_cols * BLOCK - lead[1] - cols
        padded = F.pad(wide, (lead[1], right, part.start - lo, hi - part.stop))
        yield part, blocks, padded.view(-1, BLOCK, grid_cols, BLOCK)


def _amax(batch: _Batch, lead: tuple[int, int]) -> torch.Tensor:
    grid = _grid(batch.shape[1:], lead)
    amax = torch.zeros(batch.shape[0], *grid, dtype=torch.float32, device=batch.device)
    for x, found in zip(batch.tensors, amax, strict=True):
        for _, blocks, values in _strips(x, lead):
            found[blocks] = values.abs_().amax(dim=(1, 3))
    return amax


def _encode(
    batch: _Batch, lead: tuple[int, int], scales: torch.Tensor, weight: torch.Tensor
) -> None:
    cols = batch.shape[2]
    for x, scale, fp8 in zip(batch.tensors, scales, weight, strict=True):
        for part, blocks, values in _strips(x, lead):
            values.div_(scale[blocks, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
            flat = values.view(-1, values.shape[2] * BLOCK)
            top = part.start - (blocks.start * BLOCK - lead[0])
            box = flat[top : top + part.stop - part.start, lead[1] : lead[1] + cols]
            fp8[part] = box.to(_FP8)
