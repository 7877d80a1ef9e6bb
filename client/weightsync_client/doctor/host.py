"""This host, as /proc and /sys tell of it: cards, GPUs, limits, capabilities."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from weightsync.topology import Machine, read_machine
from weightsync_client.doctor.finding import Finding
from weightsync_client.report import human_bytes

_IPC_LOCK, _SYS_PTRACE = 14, 19
#: Linux that can export GPU memory as dma-buf to the InfiniBand stack
_DMABUF_LINUX = (5, 12)
#: a worker registers every tensor that is written to: a card that takes fewer regions, or smaller
#: ones, is too small for large models of many experts
_REGIONS, _REGION_NBYTES = 100_000, 64 << 30
#: less locked memory than this registers no model
_LOCKED_NBYTES = 64 << 30


def devinfo() -> str:
    """What ``ibv_devinfo -v`` tells of the cards; empty where it is not, or tells nothing."""
    try:
        done = subprocess.run(
            ["ibv_devinfo", "-v"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def host(
    proc: str | Path = "/proc",
    sysfs: str | Path = "/sys",
    dev: str | Path = "/dev",
    cards: Callable[[], str] = devinfo,
) -> Iterator[Finding]:
    """Everything that can be read of a machine; what cannot be seen is said.

    Args:
        proc: Where procfs is mounted, or a recorded tree of it.
        sysfs: The same of sysfs.
        dev: Where the nodes of the cards are.
        cards: What sysfs does not tell of them.
    """
    proc, sysfs = Path(proc), Path(sysfs)
    machine = read_machine(sysfs, dev)
    capabilities = _capabilities(proc)
    yield from _cards(machine, sysfs)
    yield from _gpus(machine)
    yield _gpudirect(proc, sysfs, machine)
    yield _memlock(proc, capabilities, rdma=bool(machine.fabric))
    yield _regions(machine, cards)
    yield _neighbours(proc, capabilities)


def _cards(machine: Machine, sysfs: Path) -> Iterator[Finding]:
    why = "bytes between hosts go through these; without RDMA they go over TCP, many times slower"
    if not machine.nics:
        seen = "no RDMA card in sysfs" if (sysfs / "class").is_dir() else f"cannot see {sysfs}"
        yield Finding(
            "nics", "warn", seen, why,
            "modprobe mlx5_ib  # containers: --device /dev/infiniband; on one host none is needed",
        )  # fmt: skip
    used = {nic.name for nic in machine.fabric}
    for nic in machine.nics:
        what = f"{nic.name}: {nic.link_layer}, {nic.rate_gbps:g} Gb/s"
        if nic.unusable:
            yield Finding(
                f"nic.{nic.name}", "fail" if not used else "warn", f"{what}; {nic.unusable}", why,
                f"ibstat {nic.name.partition(':')[0]}  # cable, subnet manager, /dev/infiniband",
            )  # fmt: skip
        else:
            part = "used" if nic.name in used else "left out: slower, or of another fabric"
            yield Finding(f"nic.{nic.name}", "ok", f"{what}; {part}", why)
            if nic.link_layer == "Ethernet" and nic.name in used:
                yield _gids(nic.name, sysfs)


def _gids(nic: str, sysfs: Path) -> Finding:
    """RoCE addresses a port by a GID; only those of version 2 are routed."""
    device, _, port = nic.partition(":")
    folder = sysfs / "class/infiniband" / device / "ports" / port
    types = folder / "gid_attrs/types"
    entries = sorted(types.iterdir()) if types.is_dir() else []
    found = [
        entry.name
        for entry in entries
        if _text(entry) == "RoCE v2" and _text(folder / "gids" / entry.name).strip("0:")
    ]
    return Finding(
        f"gid.{nic}",
        "ok" if found else "warn",
        f"RoCE v2 by GID index {', '.join(found)}" if found else "no GID of RoCE v2 is visible",
        "without one the card reaches its own network segment at most",
        "" if found else f"show_gids {device}  # give its network interface an IP address",
    )


def _gpus(machine: Machine) -> Iterator[Finding]:
    why = "a GPU's bytes should leave through a card beside it, not through another CPU socket"
    if not machine.gpus:
        yield Finding("gpus", "ok", "no GPU in sysfs: weights in host memory only", why)
    for gpu in machine.gpus:
        share = machine.shares[gpu.address]
        cards = ", ".join(nic.name for nic in share.nics) or "none"
        far = bool(share.nics) and share.link == "system"
        yield Finding(
            f"gpu.{gpu.address}",
            "warn" if far else "ok",
            f"GPU {gpu.address}, NUMA node {gpu.numa_node}: cards {cards} ({share.link})",
            why,
            "WEIGHTSYNC_NICS=...  # if another card is nearer than sysfs tells" if far else "",
        )


def _gpudirect(proc: Path, sysfs: Path, machine: Machine) -> Finding:
    why = "without it every byte of a GPU crosses host memory on its way to the card"
    if not machine.gpus or not machine.fabric:
        return Finding("gpudirect", "ok", "not needed: no GPU with an RDMA card here", why)
    peermem = (sysfs / "module/nvidia_peermem").is_dir()
    linux = re.match(r"(\d+)\.(\d+)", _text(proc / "sys/kernel/osrelease"))
    new = linux is not None and (int(linux[1]), int(linux[2])) >= _DMABUF_LINUX
    is_open = "Open Kernel Module" in _text(proc / "driver/nvidia/version")
    ways = [n for n, there in (("peermem", peermem), ("dma-buf", new and is_open)) if there]
    if ways:
        return Finding("gpudirect", "ok", f"GPUDirect RDMA by {' and '.join(ways)}", why)
    return Finding(
        "gpudirect", "fail",
        "neither nvidia_peermem is loaded, nor do kernel and driver offer dma-buf (Linux 5.12 or "
        "later with NVIDIA's open kernel module)",
        why, "modprobe nvidia_peermem",
    )  # fmt: skip


def _memlock(proc: Path, capabilities: int | None, *, rdma: bool) -> Finding:
    why = "memory that a card reads or writes is locked; over the limit it cannot be registered"
    found = re.search(r"^Max locked memory\s+(\S+)", _text(proc / "self/limits"), re.MULTILINE)
    if found is None:
        return Finding("memlock", "warn", "cannot see the limit of locked memory", why, "ulimit -l")
    text = found[1] if found[1] == "unlimited" else f"{int(found[1]):,} bytes"
    if capabilities is not None and capabilities >> _IPC_LOCK & 1:
        return Finding("memlock", "ok", f"locked memory: {text}; CAP_IPC_LOCK lifts it", why)
    if found[1] == "unlimited" or int(found[1]) >= _LOCKED_NBYTES:
        return Finding("memlock", "ok", f"locked memory: {text}", why)
    return Finding(
        "memlock", "fail" if rdma else "warn", f"locked memory: {text}, no CAP_IPC_LOCK", why,
        "ulimit -l unlimited  # limits.conf: memlock; systemd: LimitMEMLOCK=infinity; containers: "
        "--ulimit memlock=-1 --cap-add IPC_LOCK",
    )  # fmt: skip


def _regions(machine: Machine, cards: Callable[[], str]) -> Finding:
    why = "a card takes so many memory regions and so many bytes; beyond that, nothing registers"
    used = {nic.name.partition(":")[0] for nic in machine.fabric}
    if not used:
        return Finding("memory_regions", "ok", "no RDMA card whose limits could matter", why)
    limits = {}
    for part in re.split(r"^hca_id:\s*", cards(), flags=re.MULTILINE)[1:]:
        most = re.search(r"^\s+max_mr:\s+(\d+)", part, re.MULTILINE)
        size = re.search(r"^\s+max_mr_size:\s+(0x[0-9a-fA-F]+)", part, re.MULTILINE)
        if most and size and part.split()[0] in used:
            limits[part.split()[0]] = (int(most[1]), int(size[1], 16))
    if not limits:
        return Finding(
            "memory_regions", "warn", "cannot see the cards' limits: ibv_devinfo tells none", why,
            "apt-get install ibverbs-utils  # then: ibv_devinfo -v | grep -E 'hca_id|max_mr'",
        )  # fmt: skip
    told = [
        f"{card}: {most:,} regions, each up to {human_bytes(size)}"
        for card, (most, size) in limits.items()
    ]
    small = any(m < _REGIONS or size < _REGION_NBYTES for m, size in limits.values())
    return Finding(
        "memory_regions", "warn" if small else "ok", "; ".join(told), why,
        "mlxconfig -d DEVICE query  # a virtual function gets its share from its host" if small
        else "",
    )  # fmt: skip


def _neighbours(proc: Path, capabilities: int | None) -> Finding:
    why = "on one host, processes copy straight from each other only where the kernel lets them"
    scope = _text(proc / "sys/kernel/yama/ptrace_scope") or "0"
    may = capabilities is not None and bool(capabilities >> _SYS_PTRACE & 1)
    if capabilities is None:
        return Finding("capabilities", "warn", "cannot see this process's capabilities", why)
    if scope == "0" or may:
        return Finding("capabilities", "ok", f"ptrace_scope {scope}, capabilities suffice", why)
    return Finding(
        "capabilities", "warn", f"ptrace_scope is {scope}, no CAP_SYS_PTRACE", why,
        "sysctl kernel.yama.ptrace_scope=0  # containers: --cap-add SYS_PTRACE",
    )  # fmt: skip


def _capabilities(proc: Path) -> int | None:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", _text(proc / "self/status"), re.MULTILINE)
    return int(found[1], 16) if found else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
