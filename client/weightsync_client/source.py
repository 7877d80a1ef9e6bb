"""Where a push takes its weights from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from weightsync.dtypes import ITEMSIZE
from weightsync.errors import InputError, ManifestError
from weightsync.geometry import Box
from weightsync.manifest import Manifest, TensorSpec
from weightsync_client.hf import checkpoint_tensors


@runtime_checkable
class WeightSource(Protocol):
    """One rank's weights, as checkpoint tensors.

    The publisher asks ``manifest`` and ``holdings`` once a push, and ``local`` for every box that
    it sends; nothing may change the weights until ``push`` has returned.
    """

    def manifest(self) -> Manifest:
        """Every checkpoint tensor of the whole job; the same on all ranks."""

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """The boxes of each checkpoint tensor that this rank holds."""

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The values of ``holdings()[name][box_index]``, in that box's shape.

        Any dtype, strides and device; no copy where it can be helped.  A dtype that differs from
        the manifest's is cast to it first (WS-12).
        """


class StateDictSource:
    """A mapping of checkpoint names to whole tensors.

    Entries that are the same memory seen the same way (tied weights) become aliases of the first.

    Args:
        tensors: Name to tensor; views and any strides are fine.
        dtype: Checkpoint dtype of every floating tensor, where it is not the tensors' own: fp32
            masters of a bf16 checkpoint are rounded to bf16 before anything else (WS-12).

    Raises:
        InputError: An entry is no dense tensor with memory of its own rank.
        ManifestError: Nothing to send, or an element type that does not travel.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
    ) -> None:
        self._tensors = {name: _checked(name, tensor) for name, tensor in tensors.items()}
        first_by_memory: dict[tuple[Any, ...], str] = {}
        specs = []
        for name, tensor in self._tensors.items():
            made = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
            alias_of = ""
            if tensor.numel():
                where = (tensor.device, tensor.data_ptr())
                memory = (*where, tensor.dtype, tensor.shape, tensor.stride())
                first = first_by_memory.setdefault(memory, name)
                alias_of = "" if first == name else first
            specs.append(TensorSpec(name, dtype_name(made), tuple(tensor.shape), alias_of))
        self._manifest = Manifest.of(specs)

    def manifest(self) -> Manifest:
        """One tensor an entry, in the mapping's order."""
        return self._manifest

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """Everything, whole."""
        return {t.name: (Box.whole(t.shape),) for t in self._manifest}

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The tensor itself."""
        return self._tensors[name]


class ModuleSource(StateDictSource):
    """A plain ``nn.Module`` in one process: parameters and persistent buffers by their names.

    The names are ``state_dict``'s, less what ``torch.compile`` and ``DistributedDataParallel`` put
    in front; for a transformers model they are those of the checkpoint that it saves.  Nothing is
    left out: what the engine has no use for is named by the error of the push, and can then be
    ignored by pattern.

    Args:
        module: The model; it is read anew in every push, so its parameters may be replaced.
        dtype: As :class:`StateDictSource` has it.

    Raises:
        InputError, ManifestError: As :class:`StateDictSource`.
    """

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        module = getattr(module, "_orig_mod", module)
        tensors = {name.replace("_orig_mod.", ""): t for name, t in module.state_dict().items()}
        super().__init__(checkpoint_tensors(module, tensors), dtype=dtype)


def as_source(model: nn.Module | Mapping[str, torch.Tensor] | WeightSource) -> WeightSource:
    """What ``Publisher.push`` was handed, as a source.

    Raises:
        InputError: It is none of the three.
    """
    if isinstance(model, nn.Module):
        return ModuleSource(model)
    if isinstance(model, Mapping):
        return StateDictSource(model)
    if isinstance(model, WeightSource):
        return model
    raise InputError(
        f"cannot take weights from a {type(model).__name__}",
        hint="push an nn.Module, a mapping of names to tensors, or a WeightSource",
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _checked(name: str, tensor: object) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{name!r} is a {type(tensor).__name__}, not a tensor",
            hint="push a mapping without it: {k: v for k, v in model.state_dict().items() if ...}",
            tensor=name,
        )
    # A subclass (DTensor, quantised) need not hold what its shape says; reading its memory would
    # send a shard, or packed values, as if they were the tensor.
    if type(tensor) not in {torch.Tensor, nn.Parameter, nn.Buffer}:
        raise InputError(
            f"{name!r} is a {type(tensor).__name__}, and its memory is not the whole tensor",
            hint="gather it to a plain tensor first, or write a WeightSource for it",
            tensor=name,
        )
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        raise InputError(
            f"{name!r} has no dense values (device {tensor.device}, layout {tensor.layout})",
            hint="load the model, or make the tensor dense, before the push",
            tensor=name,
        )
    if dtype_name(tensor.dtype) not in ITEMSIZE:
        raise ManifestError(
            f"{name!r} has dtype {tensor.dtype}, which does not travel",
            hint=f"cast it to one of {', '.join(ITEMSIZE)}",
            tensor=name,
        )
    # a lazily conjugated or negated view: its memory holds other values than it shows
    return tensor.detach().resolve_conj().resolve_neg()
