"""Machines as small tables, and the sysfs tree that each of them has.

A table has ``gpus``: PCI path → NUMA node; ``nics``: device name → (PCI path, NUMA node, ports,
options), a port being (state, link layer, rate); ``nodes``: NUMA node → (CPU list, distances).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

UP, DOWN, INIT = "4: ACTIVE", "1: DOWN", "2: INIT"
NDR = (UP, "InfiniBand", "400 Gb/sec (4X NDR)")
ROCE_200 = (UP, "Ethernet", "200 Gb/sec (4X HDR)")
ROCE_25 = (UP, "Ethernet", "25 Gb/sec (1X EDR)")
NO_LINK = (DOWN, "Ethernet", "40 Gb/sec (4X QDR)")


def below_switch(root: str, port: int, bus: int) -> str:
    """A device behind a PCI switch, as on HGX: root port, upstream port, downstream port."""
    at = int(root[-2:], 16)
    return (
        f"{root}/0000:{at:02x}:01.0/0000:{at + 1:02x}:00.0/0000:{at + 2:02x}:{port:02x}.0"
        f"/0000:{bus:02x}:00.0"
    )


_HGX_ROOTS = [f"pci0000:{0x10 + 0x10 * i:02x}" for i in range(8)]

#: eight GPUs, each behind a switch of its own with one NIC; two Ethernet cards for storage
HGX = {
    "gpus": {below_switch(r, 0, 0x13 + 0x10 * i): i // 4 for i, r in enumerate(_HGX_ROOTS)},
    "nics": {
        f"mlx5_{i}": (below_switch(r, 1, 0x14 + 0x10 * i), i // 4, [NDR])
        for i, r in enumerate(_HGX_ROOTS)
    }
    | {
        "mlx5_8": (below_switch(_HGX_ROOTS[0], 2, 0x15), 0, [ROCE_200]),
        "mlx5_9": ("pci0000:90/0000:90:01.0/0000:91:00.0", 1, [ROCE_200]),
    },
    "nodes": {0: ("0-3,8-11", "10 21"), 1: ("4-7,12-15", "21 10")},
}


def _gpu_of_gb200(domain: int) -> str:
    return f"pci{domain:04x}:00/{domain:04x}:00:00.0/{domain:04x}:01:00.0"


#: four GPUs and four NICs, each the only one in its PCI domain: NUMA nodes tell what is near.
#: Nodes 2 and 3 are memory of GPUs.  The first NIC has two ports; DPUs are for other networks.
GB200 = {
    "gpus": {_gpu_of_gb200(d): i // 2 for i, d in enumerate((0x8, 0x9, 0x18, 0x19))},
    "nics": {
        f"mlx5_{i}": (
            f"pci{d:04x}:00/{d:04x}:00:00.0/{d:04x}:03:00.0",
            i // 2,
            [NDR, NDR] if i == 0 else [NDR],
        )
        for i, d in enumerate((0x0, 0x2, 0x10, 0x12))
    }
    | {
        f"mlx5_bf{i}": (f"pci{d:04x}:00/{d:04x}:00:00.0/{d:04x}:03:00.0", i, [ROCE_200, NO_LINK])
        for i, d in enumerate((0x6, 0x16))
    },
    "nodes": {
        0: ("0-71", "10 40 80 80"),
        1: ("72-143", "40 10 80 80"),
        2: ("", "80 80 10 11"),
        3: ("", "80 80 11 10"),
    },
}

#: HGX, and the port of the second NIC is down
HGX_PORT_DOWN = HGX | {
    "nics": HGX["nics"]
    | {"mlx5_1": (HGX["nics"]["mlx5_1"][0], 0, [(DOWN, "InfiniBand", "10 Gb/sec (4X SDR)")])}
}

#: four GPUs and two bonded RoCE cards, a pair to each; a slow card for the front end
ROCE_BONDED = {
    "gpus": {
        below_switch(root, i, bus + i): node
        for node, (root, bus) in enumerate([("pci0000:20", 0x23), ("pci0000:60", 0x63)])
        for i in range(2)
    },
    "nics": {
        "mlx5_bond_0": (below_switch("pci0000:20", 2, 0x26), 0, [ROCE_200]),
        "mlx5_bond_1": (below_switch("pci0000:60", 2, 0x66), 1, [ROCE_200]),
        "mlx5_2": (below_switch("pci0000:20", 3, 0x27), 0, [ROCE_25]),
    },
    "nodes": {0: ("0-3", "10 21"), 1: ("4-7", "21 10")},
}

#: a virtual machine that tells nothing: every device on one bus, no NUMA node
CLOUD_VM = {
    "gpus": {f"pci0000:00/0000:00:{0x10 + i:02x}.0": -1 for i in range(4)},
    "nics": {f"mlx5_{i}": (f"pci0000:00/0000:00:{0x05 + i:02x}.0", -1, [NDR]) for i in range(4)},
    "nodes": {0: ("0-7", "10")},
}

#: a virtual machine of Hyper-V: every device alone in its PCI domain, no NUMA node
HYPER_V = {
    "gpus": {f"LNXSYSTM:00/VMBUS:00/pci{i:04x}:00/{i:04x}:00:00.0": -1 for i in (1, 2)},
    "nics": {
        f"mlx5_ib{i}": (f"LNXSYSTM:00/VMBUS:00/pci{d:04x}:00/{d:04x}:00:02.0", -1, [NDR])
        for i, d in enumerate((0x101, 0x102))
    },
    "nodes": {0: ("0-7", "10")},
}

#: one GPU, no card
NO_NIC = {
    "gpus": {"pci0000:00/0000:00:05.0": -1},
    "nics": {},
    "nodes": {0: ("0-1", "10")},
}


def write(file: Path, text: str | int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def link(at: Path, to: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(to)


def grow(folder: Path, machine: dict[str, Any]) -> tuple[Path, Path]:
    """Make a machine's sysfs and /dev below ``folder``; returns both."""
    sysfs, dev = folder / "sys", folder / "dev"

    def pci(path: str, node: int, vendor: str, kind: str) -> Path:
        device = sysfs / "devices" / path
        write(device / "numa_node", node)
        write(device / "vendor", vendor)
        write(device / "class", kind)
        link(sysfs / "bus/pci/devices" / device.name, device)
        return device

    pci("pci0000:00/0000:00:1f.0", -1, "0x1a03", "0x030000")  # the display of the board
    for path, node in machine["gpus"].items():
        pci(path, node, "0x10de", "0x030200")
    for number, (name, (path, node, ports, *options)) in enumerate(machine["nics"].items()):
        device = pci(path, node, "0x15b3", "0x020700")
        option = options[0] if options else {}
        rdma = device / "infiniband" / name
        write(rdma / "node_type", option.get("node_type", "1: CA"))
        link(rdma / "device", device)
        link(sysfs / "class/infiniband" / name, rdma)
        if "physfn" in option:
            link(device / "physfn", sysfs / "devices" / option["physfn"])
        write(device / f"infiniband_verbs/uverbs{number}/ibdev", name)
        if option.get("node", True):
            write(dev / f"infiniband/uverbs{number}", "")
        for index, (state, link_layer, rate) in enumerate(ports, 1):
            write(rdma / f"ports/{index}/state", state)
            write(rdma / f"ports/{index}/link_layer", link_layer)
            write(rdma / f"ports/{index}/rate", rate)
    for node, (cpus, distances) in machine["nodes"].items():
        write(sysfs / f"devices/system/node/node{node}/cpulist", cpus)
        write(sysfs / f"devices/system/node/node{node}/distance", distances)
    return sysfs, dev
