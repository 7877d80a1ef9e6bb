"""When a rate is far off the link, and what is named as the cause."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.support import sysfs
from weightsync.transport.slow_path import SlowPathWarning, warn_if_slow

GPU = "0000:13:00.0"
GB = 10**9


@pytest.fixture
def said(tmp_path: Path):
    """What is said of a push: one NIC of 400 Gb/s, 50 GB/s, unless the table says otherwise."""

    def judge(
        nbytes: int, seconds: float, table=sysfs.HGX, gpu: str | None = GPU, **options: Any
    ) -> str:
        tree, dev = sysfs.grow(tmp_path, table)
        if options.pop("peermem", True):
            (tree / "module/nvidia_peermem").mkdir(parents=True)
        options = {"environ": {}, **options}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_if_slow(nbytes, seconds, gpu, sysfs=tree, dev=dev, **options)
        assert all(one.category is SlowPathWarning for one in caught)
        return "".join(str(one.message) for one in caught)

    return judge


@pytest.mark.parametrize(
    ("nbytes", "seconds", "options"),
    [
        (16 * GB, 0.4, {}),
        (16 * GB, 2.2, {}),
        (16 * GB, 1.0, {}),
        (GB - 1, 32.0, {}),
        (16 * GB, 8.0, {"writers_per_worker": 8}),
        (16 * GB, 32.0, {"gpu": None}),
        (16 * GB, 4.0, {"gpu": "0000:00:05.0", "table": sysfs.NO_NIC}),
    ],
    ids=["near", "a third", "connecting", "small", "shared", "host memory", "NVLink unknown"],
)
def test_nothing_is_said_of_what_may_be_right(said, nbytes, seconds, options):
    assert said(nbytes, seconds, **options) == ""


@pytest.mark.parametrize(
    ("nbytes", "seconds"), [(4 << 20, 0.0002), (4 << 20, 0.0005), ((4 << 20) - 1, 1.0)]
)
def test_nothing_is_said_of_a_probe_that_took_little_more_than_a_call(said, nbytes, seconds):
    assert said(nbytes, seconds, probe=True) == ""


def test_a_probe_over_tcp_is_told_by_four_mebibytes(said):
    text = said(4 << 20, 0.0042, probe=True)
    assert "4.19 MB of GPU 0000:13:00.0 took 4.20 ms, 1.00 GB/s" in text


def test_a_fall_to_tcp_is_said_with_both_rates(said):
    text = said(16 * GB, 32.0)
    assert "16.00 GB of GPU 0000:13:00.0 took 32.0 s, 0.50 GB/s" in text
    assert "mlx5_0:1 does 50 GB/s" in text
    assert "expandable segments" in text


def test_a_choice_of_the_users_is_named_first(said):
    text = said(GB, 32.0, environ={"WEIGHTSYNC_NICS": "keep", "UCX_TLS": "tcp"})
    assert "Look at: WEIGHTSYNC_NICS=keep, which chooses the wire; UCX_TLS=tcp, which" in text


def test_a_port_that_is_down_is_named_where_none_is_left(said):
    path = next(iter(sysfs.HGX["gpus"]))
    down = (path[:-12] + "0000:1f:00.0", 0, [(sysfs.DOWN, "InfiniBand", "10 Gb/sec")])
    text = said(GB, 32.0, {"gpus": {path: 0}, "nics": {"mlx5_0": down}, "nodes": {}})
    assert "by TCP (mlx5_0:1: the port is 1: DOWN, expected ACTIVE)" in text


def test_a_port_without_a_way_to_gpu_memory_and_one_that_is_far_are_named(said):
    far = {"mlx5_0": ("pci0000:90/0000:91:00.0", 1, [sysfs.NDR])}
    text = said(GB, 32.0, sysfs.HGX | {"nics": far}, peermem=False, writers_per_worker=0.5)
    assert "on another NUMA node than the GPU; the kernel module nvidia_peermem" in text
