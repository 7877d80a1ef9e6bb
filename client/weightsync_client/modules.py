"""The tensors of a module's state dict, without what it costs to make one in every push."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor] | None:
    """What ``state_dict(keep_vars=True)`` gives, in its order.

    Returns:
        None where a module has a way of its own to save its state: only that way can tell.
    """
    found: dict[str, torch.Tensor] = {}
    return found if _take(module, "", found) else None


def _take(module: nn.Module, prefix: str, found: dict[str, torch.Tensor]) -> bool:
    own = module.__dict__
    kind: object = type(module)
    if (
        not _is_plain(kind)
        or own["_state_dict_hooks"]
        or own["_state_dict_pre_hooks"]
        or "state_dict" in own
    ):
        return False
    for name, parameter in own["_parameters"].items():
        if parameter is not None:
            found[prefix + name] = parameter
    if buffers := own["_buffers"]:
        passing = own["_non_persistent_buffers_set"]
        for name, buffer in buffers.items():
            if buffer is not None and name not in passing:
                found[prefix + name] = buffer
    for name, child in own["_modules"].items():
        if child is not None and not _take(child, f"{prefix}{name}.", found):
            return False
    return True


@cache
def _is_plain(kind: object) -> bool:
    return all(getattr(kind, name) is getattr(nn.Module, name) for name in _METHODS)
