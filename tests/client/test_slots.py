from __future__ import annotations

import pytest
import torch

from weightsync.digest import all_finite
from weightsync.errors import RegistrationError
from weightsync.slab import ALIGN_NBYTES, Slab


@pytest.mark.parametrize("nbytes", [0, 1, ALIGN_NBYTES, ALIGN_NBYTES + 1])
def test_a_slab_is_whole_pages_at_a_page(nbytes: int) -> None:
    slab = Slab(nbytes, torch.device("cpu"))
    memory = slab.memory
    assert memory.addr % ALIGN_NBYTES == memory.nbytes % ALIGN_NBYTES == 0
    assert memory.nbytes >= max(nbytes, 1)
    assert slab.data.numel() == memory.nbytes
    slab.close()
    slab.close()


@pytest.mark.gpu
def test_a_gpu_slab_is_plain_device_memory_that_torch_can_use() -> None:
    device = torch.device("cuda:0")
    free_before, _ = torch.cuda.mem_get_info(device)
    slab = Slab(1 << 30, device)
    assert slab.memory.kind == "VRAM"
    assert free_before - torch.cuda.mem_get_info(device)[0] >= 1 << 30
    values = slab.data.view(torch.bfloat16)
    values.copy_(
        torch.arange(1024, device=device).to(torch.bfloat16).repeat(values.numel() // 1024)
    )
    assert all_finite(values)
    assert values[-1].item() == torch.tensor(1023.0).to(torch.bfloat16).item()
    del values
    slab.close()
    torch.cuda.empty_cache()  # torch keeps what the check itself took; its kernels stay loaded
    assert torch.cuda.mem_get_info(device)[0] >= free_before - (256 << 20)
    with pytest.raises(RegistrationError, match="cudaMalloc"):
        Slab(1 << 50, device)
    assert torch.ones(8, device=device).sum().item() == 8  # torch hears nothing of that failure
