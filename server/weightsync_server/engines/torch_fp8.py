"""fp8 blocks in the embedded torch engine: kept as loaded, multiplied out for each forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from weightsync.quantize import BLOCK

#: what follows a weight's name in that of its scales
SCALES = "_scale_inv"


def grid(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor whose last two dims are cut into blocks."""
    return (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))


def keep_blocks(model: nn.Module, names: Collection[str]) -> None:
    """Turn parameters into fp8 blocks, values and scales not set, that compute as before.

    Args:
        model: On any device.
        names: Parameters of two dims, or of three: experts.  A module that uses one does so in its
            own ``forward``.
    """
    leaves: dict[nn.Module, list[str]] = {}
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module.get_parameter(leaf)
        values = torch.empty_like(old, dtype=torch.float8_e4m3fn)
        scales = torch.empty(grid(old.shape), dtype=torch.float32, device=old.device)
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
        module.register_parameter(leaf + SCALES, nn.Parameter(scales, requires_grad=False))
        leaves.setdefault(module, []).append(leaf)
        dtype = old.dtype
    for module, own in leaves.items():
        module.register_forward_pre_hook(partial(_multiply_out, own, dtype))
        module.register_forward_hook(partial(_drop, own), always_call=True)


def _multiply_out(leaves: list[str], dtype: torch.dtype, module: nn.Module, args: Any) -> None:
    for leaf in leaves:
        values, scales = module.get_parameter(leaf), module.get_parameter(leaf + SCALES)
        rows, cols = values.shape[-2:]
        wide = scales.repeat_interleave(BLOCK, -2)[..., :rows, :]
        wide = wide.repeat_interleave(BLOCK, -1)[..., :cols]
        # an attribute of the module hides its parameter while it computes
        module.__dict__[leaf] = (values.float() * wide).to(dtype)


def _drop(leaves: list[str], module: nn.Module, *_: Any) -> None:
    for leaf in leaves:
        module.__dict__.pop(leaf, None)
