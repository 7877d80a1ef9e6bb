"""The NICs of each GPU, on recorded machines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import sysfs
from tests.support.sysfs import grow
from weightsync.topology import Machine, describe, normal_address, read_machine


@pytest.fixture
def machine(tmp_path: Path):
    def make(table: dict[str, Any]) -> Machine:
        return read_machine(*grow(tmp_path, table))

    return make


def nics_of(machine: Machine) -> list[list[str]]:
    """NIC names of each GPU, in the order of the GPUs."""
    return [[nic.name for nic in machine.shares[gpu.address].nics] for gpu in machine.gpus]


def links_of(machine: Machine) -> set[str]:
    return {share.link for share in machine.shares.values()}


def test_on_hgx_every_gpu_has_the_nic_behind_its_own_switch(machine):
    hgx = machine(sysfs.HGX)
    assert nics_of(hgx) == [[f"mlx5_{i}:1"] for i in range(8)]
    assert links_of(hgx) == {"pci bridge"}
    assert [gpu.address for gpu in hgx.gpus][:2] == ["0000:13:00.0", "0000:23:00.0"]


def test_a_storage_card_behind_a_gpus_own_switch_is_of_another_fabric(machine):
    assert {nic.link_layer for nic in machine(sysfs.HGX).fabric} == {"InfiniBand"}


def test_on_gb200_the_numa_node_decides_and_its_two_gpus_split_what_is_there(machine):
    gb200 = machine(sysfs.GB200)
    assert nics_of(gb200) == [
        ["mlx5_0:1", "mlx5_0:2"],
        ["mlx5_0:2", "mlx5_1:1"],
        ["mlx5_2:1"],
        ["mlx5_3:1"],
    ]
    assert links_of(gb200) == {"numa node"}


def test_a_gpu_whose_port_is_down_takes_the_other_nics_of_its_numa_node(machine):
    down = machine(sysfs.HGX_PORT_DOWN)
    assert nics_of(down)[:3] == [["mlx5_0:1"], ["mlx5_0:1", "mlx5_2:1", "mlx5_3:1"], ["mlx5_2:1"]]
    (nic,) = [nic for nic in down.nics if nic.name == "mlx5_1:1"]
    assert nic.unusable == "the port is 1: DOWN, expected ACTIVE"


def test_two_gpus_behind_a_switch_share_its_bonded_nic_and_leave_the_slow_one(machine):
    roce = machine(sysfs.ROCE_BONDED)
    assert nics_of(roce) == [["mlx5_bond_0:1"]] * 2 + [["mlx5_bond_1:1"]] * 2
    assert "mlx5_2:1" not in {nic.name for nic in roce.fabric}


@pytest.mark.parametrize(
    ("table", "shares"),
    [
        (sysfs.CLOUD_VM, [[f"mlx5_{i}:1"] for i in range(4)]),
        (sysfs.HYPER_V, [["mlx5_ib0:1"], ["mlx5_ib1:1"]]),
    ],
    ids=["one bus", "a domain each"],
)
def test_where_nothing_tells_what_is_near_every_gpu_gets_a_fair_share(machine, table, shares):
    vm = machine(table)
    assert nics_of(vm) == shares
    assert links_of(vm) == {"unknown"}


@pytest.mark.parametrize("table", [sysfs.NO_NIC, {"gpus": {}, "nics": {}, "nodes": {}}])
def test_a_machine_without_nics_has_no_fabric(machine, table):
    bare = machine(table)
    assert bare.fabric == ()
    assert nics_of(bare) == [[] for _ in table["gpus"]]


def test_a_machine_without_sysfs_is_empty_and_no_error(tmp_path):
    assert describe(tmp_path / "none") == {"gpus": [], "nics": []}


def vm_with(nics: dict[str, Any], gpus: int = 1, **more: Any) -> dict[str, Any]:
    """Nothing tells what is near: all GPUs share all NICs."""
    paths = {f"pci0000:00/0000:00:{0x10 + i:02x}.0": -1 for i in range(gpus)}
    return {"gpus": paths, "nics": nics, "nodes": {}} | more


def on_bus(slot: int) -> str:
    return f"pci0000:00/0000:00:{slot:02x}.0"


@pytest.mark.parametrize(
    ("gpus", "count", "shares"),
    [
        (1, 3, ["012"]),
        (2, 4, ["01", "23"]),
        (2, 3, ["01", "12"]),
        (3, 2, ["0", "01", "1"]),
        (4, 2, ["0", "0", "1", "1"]),
    ],
)
def test_gpus_that_share_nics_split_them_evenly(machine, gpus, count, shares):
    vm = machine(vm_with({f"mlx5_{i}": (on_bus(i), -1, [sysfs.NDR]) for i in range(count)}, gpus))
    assert ["".join(name[5] for name in names) for names in nics_of(vm)] == shares


@pytest.mark.parametrize(
    ("nic", "why"),
    [
        ((on_bus(1), -1, [(sysfs.INIT, "InfiniBand", "400 Gb/sec")]), "the port is 2: INIT"),
        ((on_bus(1), -1, [(sysfs.UP, "IPoIB?", "400 Gb/sec")]), "neither InfiniBand nor RoCE"),
        ((on_bus(1), -1, [sysfs.ROCE_200], {"node_type": "4: RNIC"}), "neither"),
        ((on_bus(1), -1, [sysfs.NDR], {"node": False}), "cannot open .*/infiniband/uverbs0"),
        (("virtual/net/rxe0", -1, [sysfs.ROCE_200]), "no PCI device"),
    ],
)
def test_a_nic_that_cannot_carry_bytes_is_left_out_and_says_why(machine, nic, why):
    vm = machine(vm_with({"mlx5_0": nic}))
    assert vm.fabric == ()
    assert re.search(why, vm.nics[0].unusable)


def test_virtual_functions_are_left_out_beside_their_physical_one_only(machine):
    vf = (on_bus(2), -1, [sysfs.NDR], {"physfn": on_bus(1)})
    assert [
        n.name for n in machine(vm_with({"pf": (on_bus(1), -1, [sysfs.NDR]), "vf": vf})).fabric
    ] == ["pf:1"]


def test_a_container_that_may_open_the_virtual_function_alone_uses_it(machine):
    closed = (on_bus(1), -1, [sysfs.NDR], {"node": False})
    vf = (on_bus(2), -1, [sysfs.NDR], {"physfn": on_bus(1)})
    assert [n.name for n in machine(vm_with({"pf": closed, "vf": vf})).fabric] == ["vf:1"]


def test_of_two_nodes_without_a_nic_each_takes_the_one_that_is_nearer(machine):
    table = {
        "gpus": {"pci0000:10/0000:11:00.0": 1, "pci0000:20/0000:21:00.0": 2},
        "nics": {
            "mlx5_0": ("pci0000:30/0000:31:00.0", 0, [sysfs.NDR]),
            "mlx5_1": ("pci0000:40/0000:41:00.0", 3, [sysfs.NDR]),
        },
        "nodes": {
            0: ("0", "10 12 32 32"),
            1: ("1", "12 10 32 32"),
            2: ("2", "32 32 10 12"),
            3: ("3", "32 32 12 10"),
        },
    }
    numa = machine(table)
    assert nics_of(numa) == [["mlx5_0:1"], ["mlx5_1:1"]]
    assert links_of(numa) == {"system"}


def test_a_nic_of_the_same_numa_node_is_nearer_than_one_of_an_unknown_node(machine):
    table = {
        "gpus": {"pci0000:10/0000:11:00.0": 0},
        "nics": {
            "mlx5_0": ("pci0000:30/0000:31:00.0", -1, [sysfs.NDR]),
            "mlx5_1": ("pci0000:40/0000:41:00.0", 0, [sysfs.NDR]),
        },
        "nodes": {0: ("0", "10")},
    }
    assert nics_of(machine(table)) == [["mlx5_1:1"]]


def test_the_cpus_of_a_gpu_are_those_of_its_numa_node(machine):
    hgx = machine(sysfs.HGX)
    assert hgx.cpus_near("0000:13:00.0") == {0, 1, 2, 3, 8, 9, 10, 11}
    assert hgx.cpus_near("0000:83:00.0") == {4, 5, 6, 7, 12, 13, 14, 15}
    assert hgx.cpus_near("0000:ff:00.0") == frozenset()


def test_nodes_that_are_memory_of_gpus_have_no_cpus(machine):
    assert sorted(machine(sysfs.GB200).cpus) == [0, 1]


def test_describe_is_json_with_every_gpu_and_every_port(tmp_path):
    told = json.loads(json.dumps(describe(*grow(tmp_path, sysfs.HGX_PORT_DOWN))))
    assert told["gpus"][1] == {
        "address": "0000:23:00.0",
        "numa_node": 0,
        "cpus": 8,
        "nics": ["mlx5_0:1", "mlx5_2:1", "mlx5_3:1"],
        "link": "numa node",
    }
    by_name = {nic["name"]: nic for nic in told["nics"]}
    assert by_name["mlx5_0:1"] == {
        "name": "mlx5_0:1",
        "address": "0000:14:00.0",
        "numa_node": 0,
        "link_layer": "InfiniBand",
        "rate_gbps": 400.0,
        "used": True,
        "unusable": "",
    }
    assert "DOWN" in by_name["mlx5_1:1"]["unusable"]
    assert not by_name["mlx5_8:1"]["used"]


@pytest.mark.parametrize("text", ["0000:1A:00.0", "00000000:1a:00.0", "0000:1a:00.0\n"])
def test_addresses_of_nvml_and_cuda_become_those_of_sysfs(text):
    assert normal_address(text) == "0000:1a:00.0"


@pytest.mark.parametrize("text", ["", "1a:00.0", "0000:1a:00.8", "GPU-0"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="no PCI address"):
        normal_address(text)
