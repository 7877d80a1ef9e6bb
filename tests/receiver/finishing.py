"""A model with one module that post-processing changes, and the ways in which it may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tests.receiver.toys import (
    Bag,
    ToyAdapter,
    Weights,
    random_like,
    state_of,
)
from weightsync_server.receiver.units import Proofs


class Linear(Bag):
    """The module that post-processing changes; ``Net`` has one, and one that it leaves alone."""

    def __init__(self) -> None:
        super().__init__(weight=torch.empty(6, 6))
        self.scale = 1.0
        self.flag = False
        self.child = Plain()
        self.cache: dict[str, torch.Tensor] = {}
        self.register_buffer("table", torch.empty(6), persistent=False)


class Plain(nn.Module):
    note: object = None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = Linear()
        self.norm = Bag(weight=torch.empty(6))


def weights(seed: int = 0) -> Weights:
    return {
        "lin.weight": random_like(torch.float32, 6, 6, seed=seed),
        "norm.weight": random_like(torch.float32, 6, seed=seed),
    }


Finish = Callable[[nn.Module], None]


def on_linear(change: Callable[[Linear], object]) -> Finish:
    def finish(module: nn.Module) -> None:
        if isinstance(module, Linear):
            change(module)

    return finish


def nothing(m: Linear) -> None:
    pass


def repack_in_new_memory(m: Linear) -> None:
    m.weight = nn.Parameter(m.weight.data.t().contiguous(), requires_grad=False)


def repack_in_place(m: Linear) -> None:
    m.weight.data.copy_(m.weight.data.t().clone())


def swap_data(m: Linear) -> None:
    m.weight.data = m.weight.data.t().contiguous()


def pad(m: Linear) -> None:
    m.weight = nn.Parameter(nn.functional.pad(m.weight.data, (0, 2)), requires_grad=False)


def keep_packed_copy(m: Linear) -> None:
    m.packed = m.weight.data.t().contiguous() * 2


def keep_a_view(m: Linear) -> None:
    m.transposed = m.weight.data.t()


def keep_derived_number(m: Linear) -> None:
    m.scale = float(m.weight.abs().max())


def keep_derived_flag(m: Linear) -> None:
    m.flag = bool(m.weight[0, 0] > 0)


def fill_buffer(m: Linear) -> None:
    m.table.copy_(m.weight.sum(0))


def new_parameter(m: Linear) -> None:
    m.register_parameter("scales", nn.Parameter(m.weight.amax(0), requires_grad=False))


def closure_over_copy(m: Linear) -> None:
    packed = m.weight.data.clone()
    m.compute = lambda x: x @ packed.t()


def closure_over_weight(m: Linear) -> None:
    own = m.weight.data
    m.compute = lambda x: x @ own.t()


KINDS: dict[str, tuple[Callable[[Linear], object], str]] = {
    "nothing": (nothing, "direct"),
    "repack in new memory": (repack_in_new_memory, "staged"),
    "repack in place": (repack_in_place, "staged"),
    "swap data": (swap_data, "staged"),
    "pad": (pad, "staged"),
    "keep a packed copy": (keep_packed_copy, "renewed"),
    "keep a view": (keep_a_view, "renewed"),
    "keep a derived number": (keep_derived_number, "renewed"),
    "fill a buffer": (fill_buffer, "renewed"),
    "make a new parameter": (new_parameter, "renewed"),
    "closure over a copy": (closure_over_copy, "renewed"),
    "closure over the weight": (closure_over_weight, "renewed"),
}


def kind_of(receiver: object, path: str = "lin") -> str:
    proofs: Proofs = receiver._attachment.proofs
    return next(u.kind for u in proofs.units if u.path == path)


def engine(
    change: Callable[[Linear], object], folder: Path | None, **options: object
) -> ToyAdapter:
    return ToyAdapter(Net, start=weights(), finish=on_linear(change), folder=folder, **options)


def served(model: nn.Module) -> dict[str, bytes]:
    found = state_of(model)
    compute = getattr(model.lin, "compute", None)
    if compute is not None:
        found["compute"] = compute(torch.eye(6)).numpy().tobytes()
    return found
