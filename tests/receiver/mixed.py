"""An engine with a bit of everything: fused, padded, repacked, and packed beside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.receiver.toys import (
    Bag,
    Pairs,
    ToyAdapter,
    Weights,
    by_name,
    random_like,
    state_of,
)

BF16, F32 = torch.bfloat16, torch.float32


class Model(nn.Module):
    """A bf16 model with a fused parameter, a repacked one, one with a packed copy, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Bag(weight=torch.empty(10, 8, dtype=BF16))
        self.qkv = Bag(weight=torch.empty(16, 8, dtype=BF16), bias=torch.empty(16, dtype=BF16))
        self.packed = Bag(weight=torch.empty(8, 8, dtype=BF16))
        self.copied = Bag(weight=torch.empty(8, 8, dtype=BF16))
        self.norm = Bag(weight=torch.empty(8, dtype=F32))


SHAPES = {
    "embed.weight": (7, 8), "q.weight": (8, 8), "kv.weight": (8, 8), "qkv.bias": (16,),
    "packed.weight": (8, 8), "copied.weight": (8, 8), "norm.weight": (8,),
}  # fmt: skip


def weights(seed: int = 0, dtype: torch.dtype = BF16) -> Weights:
    return {k: random_like(dtype, *v, seed=seed + i) for i, (k, v) in enumerate(SHAPES.items())}


def load(module: nn.Module, tensors: Pairs) -> None:
    for name, t in tensors:
        if name == "embed.weight":
            module.embed.weight.data[:7].copy_(t)
            module.embed.weight.data[7:].zero_()
        elif name in {"q.weight", "kv.weight"}:
            module.qkv.weight.data.narrow(0, 0 if name == "q.weight" else 8, 8).copy_(t)
        else:
            by_name(module, [(name, t)])


def model_with_roles() -> nn.Module:
    made = Model()
    made.packed.weight.role = "packed"
    return made


def make(folder: Path | None, start: Weights | None = None) -> ToyAdapter:
    def finish(module: nn.Module) -> None:
        weight = getattr(module, "weight", None)
        if weight is None or weight.shape != (8, 8):
            return
        if getattr(weight, "role", "") == "packed":
            module.weight = nn.Parameter(weight.data.t().contiguous(), requires_grad=False)
        else:
            module.copy = weight.data.t().contiguous()

    return ToyAdapter(
        model_with_roles,
        load=load,
        start=weights() if start is None else start,
        finish=finish,
        folder=folder,
    )


def serves(adapter: ToyAdapter, given: Weights) -> bool:
    return state_of(adapter.live) == state_of(adapter.fresh(given))
