"""The Triton kernels of ``quantize``: one launch for a tensor or a group, one program a block.

The bytes equal those of the torch reference.  GPUs that cast to e4m3 themselves (compute
capability 8.9 and newer) take the *native* way, all else, Triton's interpreter among it, does both
steps in plain operations:

* The quotient.  ``div.rn`` takes a dozen instructions an element; native takes ``r = 1 / scale``
  once a block, ``q = x * r``, and one Newton step with the remainder ``x - q * scale`` (after
  P. Markstein, 1990).  That it yields the correctly rounded quotient is tested for all there is:
  a value and an amax have 8 significant bits each.
* The casts.  The interpreter's own (seen in Triton 3.6 and 3.9) round bfloat16 and the subnormal
  values of e4m3 wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

#: 8 warps hold a block in registers, two programs on a multiprocessor
_OPTIONS = {"num_warps": 4}
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _as_bf16(x: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """float32 of x rounded to bfloat16, to nearest even."""
    if native or x.dtype == tl.bfloat16:
        return x.to(tl.bfloat16).to(tl.float32)
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, bits, rounded).to(tl.float32, bitcast=True)


@triton.jit
def _quotient(x: tl.tensor, scale: tl.tensor, native: tl.constexpr) -> tl.tensor:
    if native:
        reciprocal = tl.div_rn(tl.full([], 1.0, tl.float32), scale)
        near = x * reciprocal
        exact = tl.fma(tl.fma(-near, scale, x), reciprocal, near)
        # -0 - (-0) * scale is +0: the sign comes from x
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        return (exact.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.div_rn(x, tl.broadcast_to(scale, x.shape))


@triton.jit
def _e4m3_bits(x: tl.tensor, native: tl.constexpr) -> tl.tensor:
    """e4m3 as uint8, to nearest even; what is beyond ±448 saturates."""
    if native:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # to the nearest of 3 mantissa bits, ties to even; then the exponent's bias 127 becomes 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2**-6 the step is 2**-9, which is the ulp of 2**14: the addition rounds
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, subnormal, normal) | sign).to(tl.uint8)


@triton.jit
def _block_kernel(
    x_ptr: tl.tensor,  # the matrices; int64[E], their addresses, where `table` names their dtype,
    # and int64[E, 3] where the values and scales of each have addresses, too
    q_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    lead_rows: tl.tensor,
    lead_cols: tl.tensor,
    grid_rows: tl.tensor,
    grid_cols: tl.tensor,
    x_stride_e: tl.tensor,
    x_stride_n: tl.tensor,
    x_stride_k: tl.tensor,
    q_stride_e: tl.tensor,
    q_stride_n: tl.tensor,
    q_stride_k: tl.tensor,
    scale_stride_e: tl.tensor,
    scale_stride_n: tl.tensor,
    scale_stride_k: tl.tensor,
    table: tl.constexpr,
    apart: tl.constexpr,
    x_align: tl.constexpr,
    q_align: tl.constexpr,
    find_amax: tl.constexpr,
    encode: tl.constexpr,
    native: tl.constexpr,
    block: tl.constexpr,
) -> None:
    pid = tl.program_id(0)
    block_col = pid % grid_cols
    block_row = (pid // grid_cols) % grid_rows
    e = (pid // grid_cols // grid_rows).to(tl.int64)
    lane = tl.arange(0, block)
    # in the box; negative where its first block begins before it
    row = block_row * block - lead_rows + lane
    col = block_col * block - lead_cols + lane
    mask = ((row >= 0) & (row < rows))[:, None] & ((col >= 0) & (col < cols))[None, :]
    row = row.to(tl.int64)[:, None]
    col = col.to(tl.int64)[None, :]
    if apart:
        matrix_ptr = tl.load(x_ptr + 3 * e).to(tl.pointer_type(table))
        bits_ptr = tl.load(x_ptr + 3 * e + 1).to(tl.pointer_type(tl.uint8))
        block_ptr = tl.load(x_ptr + 3 * e + 2).to(tl.pointer_type(tl.float32))
    else:
        if table is None:
            matrix_ptr = x_ptr + e * x_stride_e
        else:
            matrix_ptr = tl.load(x_ptr + e).to(tl.pointer_type(table))
        bits_ptr = q_ptr + e * q_stride_e
        block_ptr = scale_ptr + e * scale_stride_e
    block_ptr += block_row * scale_stride_n + block_col * scale_stride_k
    x_ptrs = tl.multiple_of(matrix_ptr + row * x_stride_n + col * x_stride_k, [1, x_align])
    x = _as_bf16(tl.load(x_ptrs, mask=mask, other=0.0), native)  # WS-12

    if find_amax:
        # as integers: their order is that of the sizes, with NaN above all, which max() would lose
        size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        amax = tl.max(size).to(tl.float32, bitcast=True)
        if encode:
            scale = tl.div_rn(amax, tl.full([], 448.0, tl.float32))
            scale = tl.where(scale < 1e-12, 1e-12, scale)
            tl.store(block_ptr, scale)
        else:
            tl.store(block_ptr, amax)
    else:
        scale = tl.load(block_ptr)

    if encode:
        bits = _e4m3_bits(_quotient(x, scale, native), native)
        q_ptrs = bits_ptr + row * q_stride_n + col * q_stride_k
        tl.store(tl.multiple_of(q_ptrs, [1, q_align]), bits, mask=mask)


#: rows and columns that share a scale: :data:`weightsync.quantize.BLOCK`
_BLOCK = 128
#: what the kernel takes: [E, N, K], or E of [N, K] with equal strides
Matrices = torch.Tensor | tuple[torch.Tensor, ...]


def quantize(matrices: Matrices, weight: torch.Tensor, scale_inv: torch.Tensor) -> None:
    """Amax, scales and fp8 values of whole matrices: every block is read once."""
    _launch(matrices, (0, 0), weight, scale_inv, find_amax=True)


def block_amax(matrices: Matrices, lead: tuple[int, int], amax: torch.Tensor) -> None:
    """Amax of every block that a box touches; its first row and column begin ``lead`` before it."""
    _launch(matrices, lead, None, amax, find_amax=True)


def quantize_with_scales(
    matrices: Matrices, lead: tuple[int, int], scales: torch.Tensor, weight: torch.Tensor
) -> None:
    """The fp8 values of a box."""
    _launch(matrices, lead, weight, scales, find_amax=False)


def _launch(
    matrices: Matrices,
    lead: tuple[int, int],
    weight: torch.Tensor | None,
    scales: torch.Tensor,
    *,
    find_amax: bool,
) -> None:
    programs = scales.numel()
    if not programs:
        return
    first = matrices[0]
    if isinstance(matrices, torch.Tensor):
        x, stride_e, table = matrices, matrices.stride(0), None
        addresses = [matrices.data_ptr()]
    else:
        addresses = [m.data_ptr() for m in matrices]
        x, stride_e, table = _upload(addresses, first.device), 0, _DTYPES[first.dtype]
    # fp8 as bytes: the kernel makes the bits
    q = scales if weight is None else weight.view(torch.uint8)
    with torch.cuda.device_of(first):
        _block_kernel[(programs,)](
            x,
            q,
            scales,
            *first.shape,
            *lead,
            *scales.shape[1:],
            stride_e,
            *first.stride(),
            *q.stride(),
            *scales.stride(),
            table=table,
            apart=False,
            x_align=_alignment(addresses, stride_e, first, lead),
            q_align=1 if weight is None else _alignment([q.data_ptr()], q.stride(0), q[0], lead),
            find_amax=find_amax,
            encode=weight is not None,
            native=_casts_natively(first.device),
            block=_BLOCK,
            **_OPTIONS,
        )


class Launch:
    """A launch that quantises whole matrices of one form, again and again from where they are.

    It keeps nothing of them in memory: what is at their addresses is read and written.
    """

    def __init__(
        self,
        matrices: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
    ) -> None:
        x, q, scale = matrices[0], weights[0].view(torch.uint8), scales[0]
        self._programs = len(matrices) * scale.numel()
        rows = [
            [t.data_ptr() for t in each] for each in zip(matrices, weights, scales, strict=True)
        ]
        self._table = _upload(rows, x.device)
        if x.device.type == "cuda":  # the next use may be on another stream
            torch.cuda.current_stream(x.device).synchronize()
        self._args = (
            *x.shape,
            0,
            0,
            *scale.shape,
            0,
            *x.stride(),
            0,
            *q.stride(),
            0,
            *scale.stride(),
        )
        self._options = {
            "table": _DTYPES[x.dtype],
            "x_align": _alignment([row[0] for row in rows], 0, x, (0, 0)),
            "q_align": _alignment([row[1] for row in rows], 0, q, (0, 0)),
            "native": _casts_natively(x.device),
        }

    def run(self) -> None:
        """Queue it on the current stream."""
        if not self._programs:
            return
        with torch.cuda.device_of(self._table):
            _block_kernel[(self._programs,)](
                self._table, self._table, self._table, *self._args,
                apart=True, find_amax=True, encode=True, block=_BLOCK, **self._options, **_OPTIONS,
            )  # fmt: skip


def launches(
    matrices: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
) -> list[Launch]:
    """What quantises whole matrices of any forms: one launch a form."""
    forms: dict[tuple[object, ...], list[int]] = {}
    for k, (x, weight, scale) in enumerate(zip(matrices, weights, scales, strict=True)):
        form = x.dtype, x.shape, x.stride(), weight.stride(), scale.stride()
        forms.setdefault(form, []).append(k)
    return [
        Launch(*([group[k] for k in alike] for group in (matrices, weights, scales)))
        for alike in forms.values()
    ]


def _alignment(
    addresses: list[int], stride_e: int, matrix: torch.Tensor, lead: tuple[int, int]
) -> int:
    """16 if every row of every block begins at a multiple of 16 bytes, else 1."""
    size = matrix.element_size()
    steps = (stride_e * size, matrix.stride(0) * size, lead[1] * size)
    if matrix.stride(1) != 1 or any(n % 16 for n in (*addresses, *steps)):
        return 1
    return 16


def _casts_natively(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _upload(addresses: list[int] | list[list[int]], device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return torch.tensor(addresses, dtype=torch.int64)
    host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
    return host.to(device, non_blocking=True)
