"""A module's tree and its tensors, without what it costs to make a state dict in every push."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
#: what follows is the name of a buffer, or are those of children
_BUFFER, _CHILDREN = object(), object()


def take_apart(module: nn.Module, form: list[object], tensors: list[torch.Tensor | None]) -> bool:
    """Tell all that the names of a module's state dict come from, and the tensors that it has.

    A push waits for this: it reads few fields of each module, and makes no name.

    Args:
        module: The model.
        form: Gets classes and names: the same for the same tree.
        tensors: Gets parameters and persistent buffers, in the order of the state dict; None where
            a name has none.

    Returns:
        False where a module has a way of its own to save its state: only that way can tell.
    """
    todo: list[nn.Module | None] = [module]
    while todo:
        here = todo.pop()
        kind: object = type(here)
        form.append(kind)
        if here is None:
            continue
        own = here.__dict__
        if (
            not _is_plain(kind)
            or own["_state_dict_hooks"]
            or own["_state_dict_pre_hooks"]
            or "state_dict" in own
        ):
            return False
        if parameters := own["_parameters"]:
            form += parameters
            tensors += parameters.values()
        if buffers := own["_buffers"]:
            passing = own["_non_persistent_buffers_set"]
            for name, buffer in buffers.items():
                if name not in passing:
                    form += (_BUFFER, name)
                    tensors.append(buffer)
        if children := own["_modules"]:
            form.append(_CHILDREN)
            form += children
            todo += reversed(children.values())  # memory is quicker read in the order of its birth
    return True


@cache
def _is_plain(kind: object) -> bool:
    return all(getattr(kind, name) is getattr(nn.Module, name) for name in _METHODS)
