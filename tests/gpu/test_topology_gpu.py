"""CUDA's PCI addresses are those of sysfs, and agents start near their GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weightsync.topology import cuda_address, read_machine
from weightsync.transport import NixlTransport

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).parents[2]


def test_every_cuda_device_is_a_gpu_of_sysfs_at_an_address_of_its_own():
    torch.cuda.init()
    addresses = [
        cuda_address(torch.device("cuda", index)) for index in range(torch.cuda.device_count())
    ]
    assert len(set(addresses)) == len(addresses)
    assert set(addresses) <= {gpu.address for gpu in read_machine().gpus}


def test_the_address_is_the_same_whatever_cuda_visible_devices_numbers():
    torch.cuda.init()
    last = torch.cuda.device_count() - 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    number = visible.split(",")[last] if visible else str(last)
    code = """
import torch
from weightsync.topology import cuda_address
torch.cuda.init()
print(cuda_address(torch.device("cuda")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": number, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == cuda_address(torch.device("cuda", last))


@pytest.mark.nixl
def test_an_agent_near_a_gpu_starts_and_the_environment_is_as_before():
    torch.cuda.init()
    before = dict(os.environ), os.sched_getaffinity(0)
    with NixlTransport(gpu=cuda_address(torch.device("cuda", 0))) as end:
        assert end.metadata()
    assert (dict(os.environ), os.sched_getaffinity(0)) == before
