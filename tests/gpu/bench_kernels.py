"""Rates of the quantisation and digest kernels, beside a device copy in the same run.

    PYTHONPATH=. python3 tests/gpu/bench_kernels.py

A kernel's bytes are what it must read and write: 3 an element of bfloat16, 5 of float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import triton.testing

from weightsync import quantize as q
from weightsync import quantize_triton
from weightsync.digest import digests
from weightsync.digest_triton import Scan


def _rate(nbytes: int, work: Callable[[], object]) -> float:
    """GB/s of the median run, with the caches flushed before each."""
    return nbytes / triton.testing.do_bench(work, return_mode="median") / 1e6


def _row(name: str, rate: float, copy: float) -> None:
    print(f"{name:58s} {rate:8.0f} GB/s {100 * rate / copy:5.0f}% of copy", flush=True)


def bench_copy() -> float:
    """GB/s, read and written, of copying 1 GiB on the device."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return _rate(2 * source.nbytes, lambda: target.copy_(source))


def bench_quantize(copy: float) -> None:
    """One row a case; the first are one large matrix under other options of the compiler."""
    dense = torch.empty(16384, 16384, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    out = q.quantize(dense)
    chosen = dict(quantize_triton._OPTIONS)
    for options in (
        chosen,
        {"num_warps": 8, "maxnreg": 80},
        {"num_warps": 8, "maxnreg": 64},
        {"num_warps": 4},
        {"num_warps": 16},
    ):
        quantize_triton._OPTIONS.clear()
        quantize_triton._OPTIONS.update(options)
        rate = _rate(3 * dense.numel(), lambda: q.quantize(dense, out=out))
        _row(f"quantize bfloat16 16384x16384 {options}", rate, copy)
    quantize_triton._OPTIONS.clear()
    quantize_triton._OPTIONS.update(chosen)

    master = dense.float()
    _row("quantize float32", _rate(5 * dense.numel(), lambda: q.quantize(master, out=out)), copy)
    turned = dense.t()
    _row("quantize transposed", _rate(3 * dense.numel(), lambda: q.quantize(turned, out=out)), copy)
    _row("amax of a shard", _rate(2 * dense.numel(), lambda: q.block_amax(dense, (64, 0))), copy)
    scales = q.scales_from_amax(q.block_amax(dense, (64, 0)))
    shard = _rate(
        3 * dense.numel(),
        lambda: q.quantize_with_scales(dense, (64, 0), scales, out=out.weight),
    )
    _row("quantize a shard with scales", shard, copy)

    experts = torch.empty(64, 2048, 7168, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    into = q.quantize(experts)
    rate = _rate(3 * experts.numel(), lambda: q.quantize(experts, out=into))
    _row("quantize 64 experts, one tensor", rate, copy)
    listed = [e.clone() for e in experts]
    rate = _rate(3 * experts.numel(), lambda: q.quantize(listed, out=into))
    _row("quantize 64 experts, a list", rate, copy)
    small = torch.empty(128, 768, 2048, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    into = q.quantize(small)
    rate = _rate(3 * small.numel(), lambda: q.quantize(small, out=into))
    _row("quantize 128 experts of 768x2048", rate, copy)


def bench_matrices(copy: float) -> None:
    """The matrices of an 8B model, each into memory of its own: one launch for all of a form."""
    forms = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(12288, 4096)] * 2 + [(4096, 12288)]
    layers = [
        torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        for _ in range(36)
        for shape in forms
    ]
    out = [q.quantize(matrix) for matrix in layers]
    nbytes = 3 * sum(matrix.numel() for matrix in layers)
    prepared = q.prepare_each(layers, out) or []

    def run() -> None:
        for launch in prepared:
            launch.run()

    rate = _rate(nbytes, run)
    _row(f"quantize {len(layers)} matrices of an 8B model, {len(prepared)} launches", rate, copy)


def bench_digest(copy: float) -> None:
    """Rates of the kernel, and of the whole call with its tables and its host sync."""
    memory = torch.randint(0, 256, (4 << 30,), dtype=torch.uint8, device="cuda")
    for name, nbytes in (("1 x 4 GiB", 4 << 30), ("400", (4 << 30) // 400), ("16384", 1 << 18)):
        for start in (0, 4):
            pieces = [memory[a : a + nbytes - 16] for a in range(start, 4 << 30, nbytes)]
            total = sum(p.numel() for p in pieces)
            rate = _rate(total, lambda p=pieces: Scan(p, None).queue())
            _row(f"digest kernel and tables, {name} pieces at +{start}", rate, copy)
            before = time.perf_counter()
            digests(pieces)
            print(
                f"{'':4s}the whole call {1e3 * (time.perf_counter() - before):.2f} ms", flush=True
            )


def main() -> None:
    """Print all rows."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    copy = bench_copy()
    _row("copy on the device", copy, copy)
    bench_quantize(copy)
    bench_matrices(copy)
    bench_digest(copy)


if __name__ == "__main__":
    main()
