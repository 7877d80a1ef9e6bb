"""The demo's training job as several processes: FSDP2 over all of them, as torchrun starts them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from weightsync.errors import InputError

#: ranks start together, but on few cores one may import its libraries a minute longer
_JOIN_S = 300.0


def own_device(kind: str) -> str:
    """The device of this rank: ``cpu``, or the GPU of its number.

    Raises:
        InputError: There are not enough GPUs.
    """
    if kind != "cuda":
        return kind
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks > torch.cuda.device_count():
        raise InputError(
            f"{ranks} trainer ranks need as many GPUs, there are {torch.cuda.device_count()}",
            hint="give --trainer-ranks a smaller number, or use --device cpu",
        )
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def join(kind: str) -> DeviceMesh | None:
    """Meet the other ranks; None: this one is alone."""
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return None
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=_JOIN_S))
    return init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every layer, then the rest, as training jobs do."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for name in lists:
        if not any(name.startswith(f"{outer}.") for outer in lists):
            for layer in model.get_submodule(name).children():
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gathered(model: nn.Module) -> dict[str, Any]:
    """The whole state dict, on rank 0's CPU; elsewhere nothing.  Every rank calls it."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
