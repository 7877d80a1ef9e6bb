"""Which network cards a GPU should use: read from sysfs, decided here, without torch or NIXL.

A *NIC* is one port of an RDMA device, as UCX names it (``mlx5_0:1``).  Four steps:

1. Left out is what cannot carry bytes: a port that is not ACTIVE, a device whose ``/dev`` node this
   process may not open, a virtual function beside its own physical one.
2. The machine's *fabric* is the link layer (InfiniBand, or Ethernet for RoCE) with the greater sum
   of rates, so that both ends of a push choose the same one.  Of it, ports at less than half of the
   best rate are left out: storage and management cards.
3. The nearest NICs of a GPU are those with the longest common path of PCI bridges; without a common
   bridge those on the nearest NUMA node.  Several may be equally near.
4. GPUs with the same nearest NICs share them: of ``k`` GPUs the ``j``-th takes those that overlap
   the ``j``-th of ``k`` equal parts of the list.

GPUs are named by PCI address and taken from sysfs, all of the machine: ``CUDA_VISIBLE_DEVICES``
numbers anew, a container hides some, and the share of each stays the same.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NVIDIA, _AMD = "0x10de", "0x1002"
_DISPLAY_CLASS = "0x03"
_ADDRESS = re.compile(r"([0-9a-f]+):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_ROOT = re.compile(r"pci[0-9a-f]+:[0-9a-f]{2}")
_VERBS = {"InfiniBand", "Ethernet", "Unspecified"}  # the last one is AWS EFA's
# ACPI's distances between NUMA nodes: a node to itself; another one, where no table says; none
_SAME_NODE, _OTHER_NODE, _UNKNOWN_NODE = 10, 20, 255


@dataclass(frozen=True, slots=True)
class Place:
    """Where a PCI device is.

    Attributes:
        address: ``0000:18:00.0``.
        bridges: The host bridge and every PCI bridge from there to the device.
        numa_node: None: not known.
    """

    address: str
    bridges: tuple[str, ...]
    numa_node: int | None


@dataclass(frozen=True, slots=True)
class Nic:
    """One port of an RDMA device.

    Attributes:
        name: As UCX has it, ``mlx5_0:1``.
        place: None: no PCI device, so software.
        physical: PCI address of the function that this virtual one belongs to.
        link_layer: ``InfiniBand``, ``Ethernet`` (RoCE) or ``Unspecified`` (EFA).
        rate_gbps: Gigabits a second; 0: not known.
        unusable: Why no byte can go through it; empty: it can be used.
    """

    name: str
    place: Place | None
    physical: str | None
    link_layer: str
    rate_gbps: float
    unusable: str


@dataclass(frozen=True, slots=True)
class Share:
    """The NICs of one GPU, and what joins them to it: see :func:`describe`."""

    nics: tuple[Nic, ...]
    link: str


@dataclass(frozen=True)
class Machine:
    """What sysfs told, in the order of PCI addresses.

    Attributes:
        cpus: Of each NUMA node that has any.
        distances: ACPI's, by pairs of NUMA nodes.
    """

    gpus: tuple[Place, ...]
    nics: tuple[Nic, ...]
    cpus: Mapping[int, frozenset[int]]
    distances: Mapping[tuple[int, int], int]

    @cached_property
    def fabric(self) -> tuple[Nic, ...]:
        """The NICs that GPUs may use: one link layer, at rates of the same order."""
        usable = [nic for nic in self.nics if not nic.unusable]
        whole = {nic.place.address for nic in usable if nic.place is not None}
        usable = [nic for nic in usable if nic.physical not in whole]
        total: dict[str, float] = defaultdict(float)
        for nic in usable:
            total[nic.link_layer] += nic.rate_gbps
        # a tie is InfiniBand's
        layer = max(total, key=lambda name: (total[name], name == "InfiniBand"), default="")
        chosen = [nic for nic in usable if nic.link_layer == layer]
        best = max((nic.rate_gbps for nic in chosen), default=0.0)
        return tuple(nic for nic in chosen if 2 * nic.rate_gbps >= best)

    @cached_property
    def shares(self) -> Mapping[str, Share]:
        """Each GPU's NICs, by its PCI address; empty where the machine has no fabric."""
        groups: dict[tuple[Nic, ...], list[Place]] = defaultdict(list)
        for gpu in self.gpus:
            groups[self._nearest(gpu)].append(gpu)
        found = {}
        for nics, gpus in groups.items():
            n, k = len(nics), len(gpus)
            for j, gpu in enumerate(gpus):
                own = nics[j * n // k : -(-(j + 1) * n // k)]
                found[gpu.address] = Share(own, self._link(gpu, own[0]) if own else "none")
        return found

    def cpus_near(self, gpu: str) -> frozenset[int]:
        """CPUs of the NUMA node of a GPU; empty where that is not known."""
        for place in self.gpus:
            if place.address == gpu and place.numa_node is not None:
                return self.cpus.get(place.numa_node, frozenset())
        return frozenset()

    def _nearest(self, gpu: Place) -> tuple[Nic, ...]:
        near = {nic: self._nearness(gpu, nic.place) for nic in self.fabric if nic.place is not None}
        best = max(near.values(), default=None)
        return tuple(nic for nic, nearness in near.items() if nearness == best)

    def _nearness(self, gpu: Place, nic: Place) -> tuple[int, int]:
        """Larger is nearer.  Below one bridge, below one host bridge, and then by NUMA node."""
        common = _common(gpu, nic)
        if common > 1:
            return common, 0
        distance = self._distance(gpu.numa_node, nic.numa_node)
        # a virtual machine may have one host bridge for everything, and true NUMA nodes
        same_host_bridge = common == 1 and distance in {_SAME_NODE, _UNKNOWN_NODE}
        return int(same_host_bridge), -distance

    def _distance(self, a: int | None, b: int | None) -> int:
        if a is None or b is None:
            return _UNKNOWN_NODE
        return self.distances.get((a, b), _SAME_NODE if a == b else _OTHER_NODE)

    def _link(self, gpu: Place, nic: Nic) -> str:
        if nic.place is None:
            return "unknown"
        if _common(gpu, nic.place) > 1:
            return "pci bridge"
        if gpu.numa_node is None or nic.place.numa_node is None:
            return "unknown"
        return "numa node" if gpu.numa_node == nic.place.numa_node else "system"


def _common(a: Place, b: Place) -> int:
    """How many bridges two devices share, counted from the host bridge."""
    count = 0
    for one, other in zip(a.bridges, b.bridges, strict=False):
        if one != other:
            break
        count += 1
    return count


def normal_address(text: str) -> str:
    """A PCI address as sysfs writes it; NVML and CUDA write longer domains and capitals.

    Raises:
        ValueError: The text is none.
    """
    match = _ADDRESS.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no PCI address like 0000:18:00.0")
    domain, bus, device, function = match.groups()
    return f"{int(domain, 16):04x}:{bus}:{device}.{function}"


def cuda_address(device: torch.device | None) -> str | None:
    """PCI address of a CUDA device; None for another device, or where torch has not started CUDA.

    A device without an index is the current one of this thread.
    """
    loaded = sys.modules.get("torch")  # without torch there is no CUDA memory either
    if (
        loaded is None
        or device is None
        or device.type != "cuda"
        or not loaded.cuda.is_initialized()
    ):
        return None
    known = loaded.cuda.get_device_properties(device)
    return f"{known.pci_domain_id:04x}:{known.pci_bus_id:02x}:{known.pci_device_id:02x}.0"


def read_machine(root: str | Path = "/sys", dev: str | Path = "/dev") -> Machine:
    """Read GPUs, NICs and NUMA nodes; what is missing or unreadable is left out, never an error.

    Args:
        root: Where sysfs is mounted.
        dev: Where the nodes of the devices are: a NIC that this process may not open is unusable.
    """
    sysfs = Path(root)
    gpus = []
    for entry in _entries(sysfs / "bus/pci/devices"):
        if _text(entry / "class").startswith(_DISPLAY_CLASS) and (
            _text(entry / "vendor") in {_NVIDIA, _AMD}
        ):
            place = _place(entry)
            if place is not None:
                gpus.append(place)
    nics = [
        nic
        for device in _entries(sysfs / "class/infiniband")
        for port in _entries(device / "ports")
        for nic in [_nic(device, port, Path(dev))]
    ]
    nodes = {
        int(entry.name.removeprefix("node")): entry
        for entry in _entries(sysfs / "devices/system/node")
        if re.fullmatch(r"node\d+", entry.name)
    }
    cpus = {node: _cpu_list(_text(entry / "cpulist")) for node, entry in nodes.items()}
    distances = {
        (node, other): int(value)
        for node, entry in nodes.items()
        # one column a node that is online, in their order
        for other, value in zip(sorted(nodes), _text(entry / "distance").split(), strict=False)
    }
    return Machine(
        gpus=tuple(sorted(gpus, key=lambda place: _order(place.address))),
        nics=tuple(sorted(nics, key=_nic_order)),
        cpus={node: found for node, found in cpus.items() if found},
        distances=distances,
    )


def describe(root: str | Path = "/sys", dev: str | Path = "/dev") -> dict[str, Any]:
    """What :func:`read_machine` finds and what follows from it, as plain JSON-able data.

    Returns:
        ``gpus``: address, numa_node, cpus (how many are near), nics (names), link (``pci bridge``,
        ``numa node``, ``system``, ``unknown``, or ``none`` without NICs); ``nics``: name, address,
        numa_node, link_layer, rate_gbps, used (by some GPU), unusable (why; empty: it can be used).
    """
    machine = read_machine(root, dev)
    used = {nic.name for share in machine.shares.values() for nic in share.nics}
    return {
        "gpus": [
            {
                "address": gpu.address,
                "numa_node": gpu.numa_node,
                "cpus": len(machine.cpus_near(gpu.address)),
                "nics": [nic.name for nic in machine.shares[gpu.address].nics],
                "link": machine.shares[gpu.address].link,
            }
            for gpu in machine.gpus
        ],
        "nics": [
            {
                "name": nic.name,
                "address": nic.place.address if nic.place else None,
                "numa_node": nic.place.numa_node if nic.place else None,
                "link_layer": nic.link_layer,
                "rate_gbps": nic.rate_gbps,
                "used": nic.name in used,
                "unusable": nic.unusable,
            }
            for nic in machine.nics
        ],
    }


def _nic(device: Path, port: Path, dev: Path) -> Nic:
    place = _place(device / "device")
    link_layer = _text(port / "link_layer") or "unknown"
    state = _text(port / "state")
    nodes = [node.name for node in _entries(device / "device/infiniband_verbs")]
    unusable = ""
    if place is None:
        unusable = "it is no PCI device"
    elif link_layer not in _VERBS or _text(device / "node_type").startswith("4:"):
        unusable = "neither InfiniBand nor RoCE"  # 4: RNIC, which is iWARP; UCX has none of it
    elif not state.endswith(": ACTIVE"):
        unusable = f"the port is {state or 'in an unknown state'}, expected ACTIVE"
    elif not any(os.access(dev / "infiniband" / node, os.R_OK | os.W_OK) for node in nodes):
        names = ", ".join(nodes) or "uverbs*"
        unusable = f"this process cannot open {dev}/infiniband/{names}"
    rate = re.match(r"[0-9.]+", _text(port / "rate"))
    physical = device / "device/physfn"
    return Nic(
        name=f"{device.name}:{port.name}",
        place=place,
        physical=physical.resolve().name if physical.exists() else None,
        link_layer=link_layer,
        rate_gbps=float(rate.group()) if rate else 0.0,
        unusable=unusable,
    )


def _place(entry: Path) -> Place | None:
    """The PCI device that a link of sysfs leads to; None where it leads to none."""
    parts = entry.resolve().parts
    root = next((i for i, part in enumerate(parts) if _ROOT.fullmatch(part)), None)
    if root is None or not _ADDRESS.fullmatch(parts[-1]):
        return None
    node = _text(entry / "numa_node")
    return Place(
        address=parts[-1],
        bridges=parts[root:-1],
        numa_node=int(node) if node.isdigit() else None,  # -1: not known
    )


def _nic_order(nic: Nic) -> tuple[tuple[int, ...], str]:
    return _order(nic.place.address) if nic.place else (), nic.name


def _order(address: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in re.split("[:.]", address))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(file: Path) -> str:
    # reading a file of sysfs may fail for reasons of the driver, such as a port that is down
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cpu_list(text: str) -> frozenset[int]:
    """``0-3,8`` as numbers."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
