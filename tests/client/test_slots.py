from __future__ import annotations

import pytest
import torch

from weightsync.errors import RegistrationError
from weightsync.slab import ALIGN_NBYTES, Slab
from weightsync_client.slots import _all_finite

FLOATS = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("nbytes", [0, 1, ALIGN_NBYTES, ALIGN_NBYTES + 1])
def test_a_slab_is_whole_pages_at_a_page(nbytes: int) -> None:
    slab = Slab(nbytes, torch.device("cpu"))
    memory = slab.memory
    assert memory.addr % ALIGN_NBYTES == memory.nbytes % ALIGN_NBYTES == 0
    assert memory.nbytes >= max(nbytes, 1)
    assert slab.data.numel() == memory.nbytes
    slab.close()
    slab.close()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_finite_check_agrees_with_isfinite_on_every_value_of_a_dtype(
    dtype: torch.dtype,
) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    if dtype.itemsize == 2:
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    elif dtype.itemsize > 2:
        specials = [0.0, -0.0, 1.0, -1e30, float("inf"), float("-inf"), float("nan"), 5e-324]
        bits = torch.tensor(specials, dtype=dtype).view(torch.uint8)
    values = bits.view(dtype)
    if dtype.itemsize == 2:  # one at a time is slow for 65,536: the finite ones, then each other
        finite = torch.isfinite(values)
        assert _all_finite(values[finite])
        assert not any(_all_finite(torch.stack([values[0], v])) for v in values[~finite][::31])
    else:
        for value in values:
            assert _all_finite(value[None]) == torch.isfinite(value.to(torch.float64))


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
    assert _all_finite(values)
    assert values[-1].item() == torch.tensor(1023.0).to(torch.bfloat16).item()
    del values
    slab.close()
    torch.cuda.empty_cache()  # torch keeps what the check itself took; its kernels stay loaded
    assert torch.cuda.mem_get_info(device)[0] >= free_before - (256 << 20)
    with pytest.raises(RegistrationError, match="cudaMalloc"):
        Slab(1 << 50, device)
