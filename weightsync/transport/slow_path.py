"""Whether a GPU's bytes took the wire that they should have taken, and if not, why probably.

What leaves the fast path still arrives, at a hundredth of the rate: UCX falls back to TCP or
copies through the host, without a word.  The first push after a rendezvous is the probe.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from weightsync.topology import Machine, read_machine
from weightsync.transport.ucx import SETTING

#: a rate below this part of the link's is no matter of tuning
_FAR_OFF = 0.25
#: what any link between GPUs does, in bytes a second: PCIe 3.0 x16, a port of 100 Gb/s
_LEAST_LINK_BYTES_PER_S = 12e9
#: of the first write, that UCX may need to connect; and bytes beside which that is little
_CONNECT_S = 1.0
_ENOUGH_NBYTES = 10**9
#: the same of a probe, a single write over a connection that is up
_PROBE_CALL_S = 200e-6
_PROBE_NBYTES = 4 << 20


class SlowPathWarning(UserWarning):
    """A push was far slower than the link of its GPU; the text says what to look at."""


def warn_if_slow(
    nbytes: int,
    seconds: float,
    gpu: str | None,
    *,
    writers_per_worker: float = 1.0,
    probe: bool = False,
    environ: Mapping[str, str] = os.environ,
    sysfs: str | Path = "/sys",
    dev: str | Path = "/dev",
) -> None:
    """Warn with :class:`SlowPathWarning` if a process wrote at less than a quarter of its link.

    Args:
        nbytes: What this process wrote; nothing is said of less than 1 GB, or 4 MiB of a probe.
        seconds: Which that took; the first second is not counted, or 0.2 ms of a probe.
        gpu: PCI address of the GPU that holds the bytes; None: host memory, nothing is said.
        writers_per_worker: How many processes share the link of a worker.
        probe: It was one write to one worker, over a connection that was up.
        environ: For tests.
        sysfs: For tests.
        dev: For tests.
    """
    enough_nbytes, free_s = (
        (_PROBE_NBYTES, _PROBE_CALL_S) if probe else (_ENOUGH_NBYTES, _CONNECT_S)
    )
    if gpu is None or nbytes < enough_nbytes or seconds <= free_s:
        return
    machine = read_machine(sysfs, dev)
    share = machine.shares.get(gpu)
    nics = share.nics if share is not None else ()
    link_bytes_per_s = sum(nic.rate_gbps for nic in nics) * 1e9 / 8 or _LEAST_LINK_BYTES_PER_S
    expected = link_bytes_per_s / max(writers_per_worker, 1.0)
    if nbytes / (seconds - free_s) >= _FAR_OFF * expected:
        return
    names = ", ".join(nic.name for nic in nics) or "any link between GPUs"
    amount = f"{nbytes / 1e6:.2f} MB" if probe else f"{nbytes / 1e9:.2f} GB"
    time = f"{seconds * 1e3:.2f} ms" if probe else f"{seconds:.1f} s"
    warnings.warn(
        f"{amount} of GPU {gpu} took {time}, {nbytes / seconds / 1e9:.2f} "
        f"GB/s, where {names} does {expected / 1e9:.0f} GB/s. Look at: "
        + "; ".join(_causes(machine, gpu, environ, Path(sysfs))),
        SlowPathWarning,
        stacklevel=2,
    )


def _causes(machine: Machine, gpu: str, environ: Mapping[str, str], sysfs: Path) -> list[str]:
    """What may be wrong, the likeliest first."""
    causes = [
        f"{name}={environ[name]}, which chooses the wire"
        for name in (SETTING, "UCX_TLS")
        if environ.get(name, "auto") not in {"", "auto"}
    ]
    share = machine.shares.get(gpu)
    if share is None or not share.nics:
        reasons = [f"{nic.name}: {nic.unusable}" for nic in machine.nics if nic.unusable]
        causes.append(
            "no RDMA port can be used, so another host is reached by TCP"
            + (f" ({', '.join(reasons[:4])})" if reasons else "")
        )
    else:
        if share.link == "system":
            causes.append("the nearest port is on another NUMA node than the GPU")
        if not (sysfs / "module/nvidia_peermem").exists():
            causes.append(
                "the kernel module nvidia_peermem is not loaded; without it or dma-buf a port does "
                "not reach GPU memory"
            )
    causes.append(
        "the engine's weights in expandable segments (its PYTORCH_CUDA_ALLOC_CONF), which UCX "
        "moves over TCP"
    )
    return causes
