"""What the doctor says of recorded machines, environments and measurements."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import sysfs
from tests.support.sysfs import grow
from weightsync_client.doctor import probe
from weightsync_client.doctor.finding import Finding
from weightsync_client.doctor.host import host
from weightsync_client.doctor.software import software

LIMITS = "Limit   Soft Limit   Hard Limit   Units\nMax locked memory   {}   {}   bytes\n"
ALL = {"torch": "2.13.0", "nixl": "1.5.1", "vllm": "0.32.0"}


def by_id(findings) -> dict[str, Finding]:
    found = list(findings)
    assert len({f.id for f in found}) == len(found)
    # what is wrong says how to mend it
    assert all(f.fix for f in found if f.severity != "ok" and f.id != "capabilities")
    return {f.id: f for f in found}


@pytest.fixture
def machine(tmp_path: Path):
    """Findings of a recorded /sys, with a /proc of these files."""

    def look(table, **proc: str) -> dict[str, Finding]:
        root, dev = grow(tmp_path / "machine", table)
        for name, text in proc.items():
            file = tmp_path / "proc" / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return by_id(host(tmp_path / "proc", root, dev))

    return look


def test_a_good_gpu_node_with_infiniband_is_all_well(machine, tmp_path):
    found = machine(
        sysfs.HGX,
        self__limits=LIMITS.format("unlimited", "unlimited"),
        self__status="CapEff:\t000001ffffffffff\n",
        sys__kernel__osrelease="5.15.0-91-generic\n",
        driver__nvidia__version="NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570\n",
    )
    assert found["nic.mlx5_0:1"].what == "mlx5_0:1: InfiniBand, 400 Gb/s; used"
    assert "cards mlx5_0:1 (pci bridge)" in found["gpu.0000:13:00.0"].what
    assert found["gpudirect"].what == "GPUDirect RDMA by dma-buf"
    assert found["memory_regions"].severity == "warn"  # sysfs does not tell: it says so
    assert not [f for f in found.values() if f.severity == "fail"]


DEVINFO = """hca_id:\tmlx5_0
\ttransport:\t\t\tInfiniBand (0)
\tmax_mr_size:\t\t\t0xffffffffffffffff
\tmax_mr:\t\t\t\t{}
hca_id:\tmlx5_99
\tmax_mr_size:\t\t\t0x1
\tmax_mr:\t\t\t\t1
"""


def test_limits_of_memory_regions_are_those_of_the_cards_that_are_used(tmp_path):
    root, dev = grow(tmp_path / "machine", sysfs.HGX_PORT_DOWN)

    def regions(told: str) -> Finding:
        return by_id(host(tmp_path / "proc", root, dev, lambda: told))["memory_regions"]

    good = regions(DEVINFO.format(16_777_216))
    assert good.severity == "ok"
    assert "mlx5_0: 16,777,216 regions" in good.what
    assert "mlx5_1" not in good.what, "its port is down"
    small = regions(DEVINFO.format(1_024))
    assert (small.severity, small.fix[:9]) == ("warn", "mlxconfig")
    assert regions("no such thing").severity == "warn"


def test_a_gpu_node_with_a_small_limit_and_no_gpudirect_fails_with_the_command(machine):
    found = machine(
        sysfs.HGX,
        self__limits=LIMITS.format("65536", "65536"),
        self__status="CapEff:\t0000000000000000\n",
        sys__kernel__osrelease="5.4.0\n",
        driver__nvidia__version="NVRM version: NVIDIA UNIX x86_64 Kernel Module  535\n",
        sys__kernel__yama__ptrace_scope="1\n",
    )
    assert (found["memlock"].severity, found["gpudirect"].severity) == ("fail", "fail")
    assert found["gpudirect"].fix == "modprobe nvidia_peermem"
    assert "ulimit -l unlimited" in found["memlock"].fix
    assert found["capabilities"].severity == "warn"


def test_a_port_that_is_down_is_told_and_the_others_are_used(machine):
    found = machine(sysfs.HGX_PORT_DOWN)
    down = found["nic.mlx5_1:1"]
    assert down.severity == "warn"
    assert "DOWN, expected ACTIVE" in down.what
    assert found["nic.mlx5_0:1"].severity == "ok"


def test_roce_cards_need_a_gid_of_version_2(machine, tmp_path):
    assert machine(sysfs.ROCE_BONDED)["gid.mlx5_bond_0:1"].severity == "warn"
    root = tmp_path / "machine"
    port = root / "sys/class/infiniband/mlx5_bond_0/ports/1"
    gids = [("IB/RoCE v1", "fe80::1"), ("RoCE v2", "0000:0000"), ("RoCE v2", "fe80::1")]
    for index, (kind, gid) in enumerate(gids):
        sysfs.write(port / f"gid_attrs/types/{index}", kind)
        sysfs.write(port / f"gids/{index}", gid)
    found = by_id(host(tmp_path / "proc", root / "sys", root / "dev"))
    assert found["gid.mlx5_bond_0:1"].what == "RoCE v2 by GID index 2"
    assert found["gid.mlx5_bond_1:1"].severity == "warn"


def test_a_machine_that_shows_nothing_is_examined_and_says_so(tmp_path):
    found = by_id(host(tmp_path / "a", tmp_path / "b", tmp_path / "c"))
    assert found["nics"].what == f"cannot see {tmp_path / 'b'}"
    assert found["memlock"].what == "cannot see the limit of locked memory"
    assert found["capabilities"].severity == "warn"
    assert not [f for f in found.values() if f.severity == "fail"]


def test_missing_and_untested_packages_are_told():
    good = by_id(software({}, ALL.get))
    assert {f.severity for f in good.values()} == {"ok"}
    bad = by_id(software({}, {"vllm": "0.11.2"}.get))
    assert [bad[name].severity for name in ("torch", "nixl", "vllm")] == ["fail", "fail", "warn"]
    assert "tested: 0.24, 0.32" in bad["vllm"].what
    assert by_id(software({}, {"torch": "2"}.get))["vllm"].severity == "ok"


def test_variables_that_change_how_bytes_move_are_told():
    found = by_id(
        software(
            {
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True",
                "UCX_TLS": "tcp",
                "VLLM_SERVER_DEV_MODE": "1",
            },
            ALL.get,
        )
    )
    assert found["expandable_segments"].fix.startswith("unset PYTORCH_CUDA_ALLOC_CONF")
    assert found["ucx_variables"].what == "inherited: UCX_TLS=tcp"
    assert found["vllm_dev_mode"].severity == "warn"


@pytest.mark.parametrize(
    ("write_s", "severity"), [(0.001, "ok"), (0.009, "ok"), (0.02, "warn"), (0.75, "fail")]
)
def test_a_write_is_judged_by_a_plain_copy(write_s, severity):
    answer = {"kind": "VRAM", "nbytes": 10**8, "write_s": write_s, "copy_s": 0.001}
    found = probe.judge(answer)
    assert found.severity == severity
    assert "a plain copy here: 100.0 GB/s" in found.what


def test_what_ucx_chose_is_read_from_its_log():
    log = (
        "[1.5] [n:1:0] ucp_context.c:2753 UCX  INFO  Version 1.23.0 (loaded from /x, git)\n"
        "[1.5] [n:1:0] ucp_worker.c:1 UCX  INFO    a self cfg#0 rma_am(tcp/lo)  am(tcp/lo)\n"
        "[1.6] [n:1:0] ucp_worker.c:1 UCX  INFO    a inter-node cfg#1 rma(rc_mlx5/mlx5_0:1)  "
        "am(rc_mlx5/mlx5_0:1)\n"
    )
    (found,) = probe.chosen(log)
    assert found.what == "UCX 1.23.0: rma(rc_mlx5/mlx5_0:1) am(rc_mlx5/mlx5_0:1)"
    (nothing,) = probe.chosen("")
    assert nothing.severity == "warn"


def test_a_probe_whose_processes_fail_is_a_finding(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (found,) = probe.probe({}, gpu=False, timeout_s=20)
    assert (found.id, found.severity) == ("probe.write", "fail")
