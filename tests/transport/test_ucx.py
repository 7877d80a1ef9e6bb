"""What an agent finds in its environment while it starts, and what is left of it afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support import sysfs
from weightsync.errors import InputError, TransportError
from weightsync.transport import NixlTransport, ucx

REPOSITORY = Path(__file__).parents[2]
NAMES = ("UCX_NET_DEVICES", "UCX_MAX_RMA_RAILS", "UCX_LOG_FILE")
GPU = "0000:13:00.0"


class Start:
    """An agent's start that sees the environment, and fails on the NICs in ``fails_on``."""

    def __init__(self, fails_on: str | None = None) -> None:
        self.fails_on = fails_on
        self.seen: list[dict[str, str]] = []
        self.cpus: set[int] = set()

    def __call__(self) -> str:
        self.seen.append({name: os.environ[name] for name in NAMES if name in os.environ})
        child = threading.Thread(target=lambda: self.cpus.update(os.sched_getaffinity(0)))
        child.start()
        child.join()
        if self.fails_on is not None and os.environ.get("UCX_NET_DEVICES") == self.fails_on:
            raise RuntimeError("no such device")
        return "agent"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, ucx.SETTING):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(tmp_path: Path):
    def run(make: Start, gpu: str | None = GPU, table=sysfs.HGX) -> str:
        tree, dev = sysfs.grow(tmp_path, table)
        (tree / "class/net/eth7").mkdir(parents=True)
        return ucx.start(make, gpu, sysfs=tree, dev=dev)

    return run


def test_an_agent_starts_on_the_nics_of_its_gpu_whatever_the_environment_says(
    start, monkeypatch, caplog
):
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_7:1")
    make = Start()
    assert start(make) == "agent"
    assert make.seen == [{"UCX_NET_DEVICES": "mlx5_0:1", "UCX_LOG_FILE": "stderr"}]
    assert "UCX_NET_DEVICES=mlx5_7:1 is set aside" in caplog.text


def test_afterwards_the_environment_is_what_it_was(start, monkeypatch):
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_7:1")
    before = dict(os.environ)
    start(Start())
    assert dict(os.environ) == before


def test_a_start_that_fails_leaves_the_environment_and_the_cpus_as_they_were(start, monkeypatch):
    monkeypatch.setenv(ucx.SETTING, "eth7")
    before, cpus = dict(os.environ), os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="no such device"):
        start(Start(fails_on="eth7"))
    assert dict(os.environ) == before
    assert os.sched_getaffinity(0) == cpus


def test_where_ucx_does_not_start_on_what_was_chosen_it_chooses_and_says_so(start, caplog):
    make = Start(fails_on="mlx5_0:1")
    assert start(make) == "agent"
    assert make.seen[1] == {"UCX_LOG_FILE": "stderr"}
    assert "does not start on ['mlx5_0:1'], near GPU 0000:13:00.0 (no such device)" in caplog.text


@pytest.mark.parametrize(
    ("setting", "devices"),
    [
        ("auto", "mlx5_0:1"),
        ("", "mlx5_0:1"),
        ("keep", None),
        ("mlx5_3:1, mlx5_4", "mlx5_3:1,mlx5_4"),
        ("eth7", "eth7"),
    ],
)
def test_the_setting_keeps_ucx_own_choice_or_names_the_nics(start, monkeypatch, setting, devices):
    monkeypatch.setenv(ucx.SETTING, setting)
    make = Start()
    start(make)
    assert make.seen[0].get("UCX_NET_DEVICES") == devices


@pytest.mark.parametrize("setting", ["mlx5_77:1", "mlx5_0:2", "Keep", "mlx5_0:1,,", "all"])
def test_a_setting_that_names_no_nic_is_refused_before_anything_starts(start, monkeypatch, setting):
    monkeypatch.setenv(ucx.SETTING, setting)
    make = Start()
    with pytest.raises(InputError, match=f"WEIGHTSYNC_NICS={setting}.*mlx5_0:1"):
        start(make)
    assert make.seen == []


@pytest.mark.parametrize("user", [None, "1"])
def test_more_nics_than_ucx_uses_at_once_are_all_used_unless_the_user_says_how_many(
    start, monkeypatch, user
):
    if user is not None:
        monkeypatch.setenv("UCX_MAX_RMA_RAILS", user)
    make = Start()
    start(make, "0000:23:00.0", sysfs.HGX_PORT_DOWN)
    assert make.seen[0]["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_2:1,mlx5_3:1"
    assert make.seen[0]["UCX_MAX_RMA_RAILS"] == (user or "3")


@pytest.mark.parametrize(
    ("gpu", "table"),
    [(None, sysfs.HGX), ("0000:00:05.0", sysfs.NO_NIC), ("0000:99:00.0", sysfs.HGX)],
    ids=["host memory", "no NIC", "a GPU that sysfs hides"],
)
def test_where_nothing_is_known_the_choice_stays_with_ucx_and_its_variables(
    start, monkeypatch, gpu, table
):
    monkeypatch.setenv("UCX_NET_DEVICES", "eth0")
    make = Start()
    start(make, gpu, table)
    assert make.seen == [{"UCX_NET_DEVICES": "eth0", "UCX_LOG_FILE": "stderr"}]


def test_a_log_file_of_the_users_stays(start, monkeypatch):
    monkeypatch.setenv("UCX_LOG_FILE", "/var/log/ucx.log")
    make = Start()
    start(make)
    assert make.seen[0]["UCX_LOG_FILE"] == "/var/log/ucx.log"


def test_threads_of_an_agent_run_on_the_cpus_of_its_gpu_and_the_caller_is_free_again(start):
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    make = Start()
    start(make, GPU, sysfs.HGX | {"nodes": {0: (str(one), "10")}})
    assert make.cpus == {one}
    assert os.sched_getaffinity(0) == allowed


def test_cpus_that_this_process_may_not_use_are_not_asked_for(start):
    allowed = os.sched_getaffinity(0)
    make = Start()
    start(make, GPU, sysfs.HGX | {"nodes": {0: (str(max(allowed) + 1), "10")}})
    assert make.cpus == allowed


@pytest.mark.nixl
def test_nixl_starts_on_what_the_setting_names_where_ucx_own_variable_is_wrong(monkeypatch):
    monkeypatch.setenv("UCX_NET_DEVICES", "none:1")
    monkeypatch.setenv(ucx.SETTING, "lo")
    NixlTransport("named").close()
    assert os.environ["UCX_NET_DEVICES"] == "none:1"
    monkeypatch.delenv(ucx.SETTING)
    with pytest.raises(TransportError, match="starting the agent failed"):
        NixlTransport("free")


@pytest.mark.nixl
def test_ucx_errors_do_not_reach_standard_output():
    code = """
from weightsync.errors import TransportError
from weightsync.transport import NixlTransport
try:
    NixlTransport()
except TransportError as error:
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "UCX_NET_DEVICES": "none:1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "refused\n"
    assert "UCX" in done.stderr
