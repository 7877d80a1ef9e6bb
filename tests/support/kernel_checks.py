"""What the Triton kernels must do, on a GPU or in Triton's interpreter; each check returns words.

As a program (with TRITON_INTERPRET=1 set before Triton is imported) it runs all checks on the CPU
and prints one JSON object: what differs, by check.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from tests.support.quantize_cases import KINDS, SHAPES, all_pairs, boxes, formula, mismatch
from tests.support.quantize_cases import random_weights as weights_of
from weightsync import digest
from weightsync import quantize as q

Check = Callable[[torch.device], str]


@contextmanager
def kernels_on_any_device() -> Iterator[None]:
    """``quantize`` runs its Triton kernels for CPU tensors, too."""
    from weightsync import quantize_triton

    before, q._kernels = q._kernels, lambda device: quantize_triton
    try:
        yield
    finally:
        q._kernels = before


def _kind(kind: str, dtype: torch.dtype, device: torch.device) -> str:
    found = []
    for shape in SHAPES:
        weights = weights_of(kind, shape, dtype)
        words = mismatch(q.quantize(weights.to(device)), formula(weights))
        found += [f"shape {shape}: {words}"] if words else []
    return "\n".join(found)


def _all_pairs(device: torch.device) -> str:
    weights = all_pairs()
    return mismatch(q.quantize(weights.to(device)), formula(weights))


def _every_bfloat16(device: torch.device) -> str:
    """All finite values under scale 1: the cast alone, its saturation and its subnormals."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values)).view(512, 128)
    scales = torch.ones(4, 1)
    got = q.quantize_with_scales(values.to(device), (0, 0), scales.to(device))
    want = values.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return mismatch(q.Quantized(got, scales), q.Quantized(want, scales))


def _rounding_to_bfloat16(device: torch.device) -> str:
    """float32 masters on, just above and just below every kind of tie, both signs."""
    upper = torch.arange(0x3F00, 0x3F80, dtype=torch.int32)[None, :] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)[:, None]
    bits = torch.cat([upper + lower, (upper + lower) | -0x80000000])
    weights = bits.view(torch.float32)
    return mismatch(q.quantize(weights.to(device)), formula(weights))


def _strides(device: torch.device) -> str:
    weights = weights_of("random", (300, 288), torch.bfloat16)
    want = formula(weights)
    wide = torch.zeros(300, 576, dtype=torch.bfloat16, device=device)
    wide[:, ::2] = weights.to(device)
    out = q.Quantized(
        torch.empty(288, 300, dtype=torch.float8_e4m3fn, device=device).t(),
        torch.empty(3, 6, device=device)[:, ::2],
    )
    shifted = torch.empty(300 * 288 + 1, dtype=torch.bfloat16, device=device)[1:].view(300, 288)
    shifted.copy_(weights)
    return "".join(
        mismatch(got, want)
        for got in (
            q.quantize(weights.to(device).t().contiguous().t()),
            q.quantize(wide[:, ::2]),
            q.quantize(shifted),
            q.quantize(weights.to(device), out=out),
            out,
        )
    )


def _groups(device: torch.device) -> str:
    stacked = weights_of("wide", (5, 200, 144), torch.bfloat16)
    want = formula(stacked)
    listed = [w.clone().to(device) for w in stacked]
    unlike = [w.t().contiguous().t() if e % 2 else w for e, w in enumerate(listed)]
    odd = []
    for weights in listed:
        moved = torch.empty(200 * 144 + 1, dtype=weights.dtype, device=device)[1:]
        odd.append(moved.view(200, 144).copy_(weights))
    transposed = stacked.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    groups = (stacked.to(device), listed, unlike, odd, transposed)
    return "".join(mismatch(q.quantize(group), want) for group in groups)


def _each(device: torch.device) -> str:
    """Matrices of several forms into memory of their own, with other bytes around."""
    found = []
    forms = [((200, 144), torch.bfloat16), ((130, 260), torch.float32), ((128, 128), torch.float16)]
    weights = [weights_of("random", shape, dtype) for shape, dtype in forms for _ in range(3)]
    weights[1] = weights[1].t().contiguous().t()
    memory = [torch.full((w.shape[0] + 2, w.shape[1] + 16), 7, dtype=torch.uint8) for w in weights]
    there = [m.to(device) for m in memory]
    slots = [m.view(torch.float8_e4m3fn)[1:-1, 8:-8] for m in there]
    wanted = [formula(w) for w in weights]
    scales = [torch.zeros(want.scale_inv.shape, device=device) for want in wanted]
    out = [q.Quantized(slot, scale) for slot, scale in zip(slots, scales, strict=True)]
    # a transposed destination, and nothing at all
    turned = torch.empty(144, 200, dtype=torch.float8_e4m3fn, device=device).t()
    out[2] = q.Quantized(turned, scales[2])
    nothing = torch.zeros(0, 128, device=device)
    matrices = [torch.zeros_like(w, device=device) for w in weights]
    prepared = q.prepare_each([*matrices, nothing], [*out, q.quantize(nothing)])
    for matrix, values in zip(matrices, weights, strict=True):
        matrix.copy_(values)
    for launch in prepared or ():
        launch.run()
    for k, (got, want) in enumerate(zip(out, wanted, strict=True)):
        words = mismatch(got, want)
        found += [f"matrix {k}: {words}"] if words else []
        if k != 2:
            there[k][1:-1, 8:-8] = 7
            found += [] if torch.equal(there[k].cpu(), memory[k]) else [f"{k} is written beyond"]
    return "\n".join(found)


def _surrounded(box: torch.Tensor, fill: float, device: torch.device) -> torch.Tensor:
    """A copy of a box within other memory, to see who reads or writes beyond it."""
    rows, cols = box.shape
    memory = torch.full((rows + 256, cols + 256), fill, dtype=box.dtype, device=device)
    return memory[128 : 128 + rows, 128 : 128 + cols].copy_(box)


def _shards(cuts: tuple[list[int], list[int]], device: torch.device) -> str:
    whole = weights_of("wide", (cuts[0][-1], cuts[1][-1]), torch.float32)
    want = formula(whole)
    amax = torch.zeros(want.scale_inv.shape, device=device)
    shards = [(o, where, _surrounded(whole[where], 3e38, device)) for o, where in boxes(*cuts)]
    for offset, _, box in shards:
        part = amax[q.touched_blocks(box.shape, offset)]
        torch.maximum(part, q.block_amax(box, offset), out=part)
    scales = q.scales_from_amax(amax)
    weight = torch.empty(whole.shape, dtype=torch.float8_e4m3fn, device=device)
    found = ""
    for offset, where, box in shards:
        mine = scales[q.touched_blocks(box.shape, offset)]
        memory = torch.zeros(box.shape[0] + 256, box.shape[1] + 256, device=device)
        memory = memory.to(torch.float8_e4m3fn)
        out = memory[128:-128, 128:-128]
        q.quantize_with_scales(box, offset, mine, out=out)
        weight[where] = out
        out.copy_(torch.zeros_like(out))
        if memory.float().count_nonzero():
            found += f"the box at {offset} is written beyond; "
    return found + mismatch(q.Quantized(weight, scales), want)


def _not_finite(device: torch.device) -> str:
    weights = torch.ones(128, 384)
    weights[3, 5], weights[3, 200] = float("nan"), float("-inf")
    finite = torch.isfinite(q.quantize(weights.to(device)).scale_inv).flatten().tolist()
    amax_finite = torch.isfinite(q.block_amax(weights.to(device))).flatten().tolist()
    want = [False, False, True]
    return "" if finite == want and amax_finite == want else f"{finite}, {amax_finite}"


def _nothing(device: torch.device) -> str:
    for shape in ((0, 128), (128, 0), (0, 3, 4)):
        q.quantize(torch.zeros(shape, device=device))
    return ""


def _digests(device: torch.device) -> str:
    from weightsync import digest_triton

    chunk = 8 * digest_triton._TILE_WORDS * digest_triton._TILES
    torch.manual_seed(0)
    memory = torch.randint(0, 256, (2 * chunk + 5000,), dtype=torch.uint8)
    memory[: chunk // 2] = 255
    there = torch.zeros(memory.numel() + 64, dtype=torch.uint8, device=device)
    there = there[-there.data_ptr() % 64 :][: memory.numel()]
    there.copy_(memory)
    cuts = [
        (start, start + nbytes)
        for start in (0, 1, 4, 8, 12, 24, 64)
        for nbytes in (0, 1, 4, 7, 8, 9, 12, 4096, 16384, 16385, chunk - start, chunk, chunk + 3)
    ]
    cuts += [(0, 2 * chunk), (8, 2 * chunk + 4005), (7, 2 * chunk + 4000)]
    sums = digest_triton.Scan([there[a:b] for a, b in cuts], None).queue()[:-1].view(-1, 2)
    want = torch.stack([digest.digest_sums(memory[a:b]) for a, b in cuts])
    return "\n".join(
        f"bytes {cut}: {got}, not {right}"
        for cut, got, right in zip(cuts, sums.tolist(), want.tolist(), strict=True)
        if got != right
    )


def _finite(device: torch.device) -> str:
    """Values around the largest ones of every dtype, alone among others, at any place of a word."""
    from weightsync import digest_triton

    wrong = []
    for dtype in (*_FINITE_DTYPES, torch.int16):
        ones = torch.ones(5000, dtype=torch.float32).to(dtype)
        values = ones[:2]
        if dtype.is_floating_point:
            size, largest = (
                dtype.itemsize,
                torch.tensor([torch.finfo(dtype).max], dtype=torch.float64).to(dtype),
            )
            bits = int.from_bytes(largest.view(torch.uint8).numpy().tobytes(), "little")
            codes = [0, bits, bits + 1, (1 << (8 * size - 1)) - 1]
            codes += [code | 1 << (8 * size - 1) for code in codes]
            raw = b"".join(code.to_bytes(size, "little") for code in codes)
            values = torch.frombuffer(bytearray(raw), dtype=dtype)
        for k, value in enumerate(values.to(dtype).unbind()):
            some = ones.clone()
            at = (0, 1, 3, 2500, 4998, 4999)[k % 6]
            some[at] = value
            there = some.view(torch.uint8).to(device)
            cut = 8 * (k % 3) if at > 100 else 0
            scan = digest_triton.Scan([there[:0], there[cut:]], [torch.float32, dtype])
            got = scan.queue()[-1].item()
            finite = value.to(torch.float64).isfinite().item()
            if got != (not finite):
                wrong.append(f"{dtype} {value.item()!r} at {at}: {got}")
    return "\n".join(wrong)


def _digests_in_short_chunks(device: torch.device) -> str:
    from weightsync import digest_triton

    before, digest_triton._TILES = digest_triton._TILES, 2
    try:
        return _digests(device)
    finally:
        digest_triton._TILES = before


_FINITE_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip


def _exchange(device: torch.device) -> str:
    from weightsync_server.receiver import exchange_triton

    # less than a vector row, one tile, some, and past one program's part
    sizes = [16, 4096 * 4, 4096 * 4 + 16, 3 * 4096 * 4 - 16, 17 * 4096 * 4 + 48]
    generator = torch.Generator().manual_seed(0)

    def bytes_of(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator).to(device)

    pairs = [(bytes_of(n), bytes_of(n)) for n in sizes]
    before = [(a.clone(), b.clone()) for a, b in pairs]
    launch = exchange_triton.Launch(pairs)
    found = []
    for turn in (1, 2):
        launch.run()
        for n, (a, b), (x, y) in zip(sizes, pairs, before, strict=True):
            want = (y, x) if turn == 1 else (x, y)
            if not (torch.equal(a, want[0]) and torch.equal(b, want[1])):
                found.append(f"{n} bytes after {turn}")
    return "\n".join(found)


#: on a GPU and in the interpreter
CHECKS: dict[str, Check] = {
    **{f"bfloat16 {kind}": partial(_kind, kind, torch.bfloat16) for kind in KINDS},
    "float32 wide": partial(_kind, "wide", torch.float32),
    "float16 random": partial(_kind, "random", torch.float16),
    "every mantissa under every amax": _all_pairs,
    "every bfloat16 under scale 1": _every_bfloat16,
    "ties of rounding to bfloat16": _rounding_to_bfloat16,
    "strides and addresses": _strides,
    "groups": _groups,
    "matrices of several forms": _each,
    "shards at any border": partial(_shards, ([0, 1, 100, 200, 384, 400], [0, 77, 256, 300])),
    "shards at multiples of 16": partial(_shards, ([0, 16, 208, 256], [0, 32, 176, 512])),
    "finite values of every dtype": _finite,
    "not finite": _not_finite,
    "nothing": _nothing,
    "digests": _digests_in_short_chunks,
    "exchange": _exchange,
}

#: on a GPU alone: the interpreter takes too long
GPU_CHECKS: dict[str, Check] = {**CHECKS, "digests in chunks of their real size": _digests}


def main() -> None:
    """Run all checks on the CPU."""
    cpu = torch.device("cpu")
    with kernels_on_any_device():
        json.dump({name: check(cpu) for name, check in CHECKS.items()}, sys.stdout)


if __name__ == "__main__":
    main()
