"""One rank at a time of a job that is not there: torch's fake backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def mesh_of(
    rank: int, shape: tuple[int, ...], names: tuple[str, ...] | None = None
) -> Iterator[DeviceMesh]:
    """The mesh as that rank sees it; collectives do nothing."""
    # what torch remembers of an equal mesh has another rank's place in it
    _clear_sharding_prop_cache()
    world_size = int(torch.tensor(shape).prod())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def shard(whole: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """This rank's DTensor of ``whole``, which every rank knows."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)
