"""Tensors of models: where they are, whether they still are there, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from weightsync import digest
from weightsync.errors import IdentityError
from weightsync_server.receiver.regions import Strided, TracedCopy


@dataclass(frozen=True, slots=True)
class Identity:
    """What must not change between registration and a write."""

    addr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    storage_nbytes: int

    @classmethod
    def of(cls, t: torch.Tensor) -> Identity:
        """The identity of a tensor now."""
        return cls(
            t.data_ptr(),
            tuple(t.shape),
            tuple(t.stride()),
            t.dtype,
            t.untyped_storage().nbytes(),
        )

    def holds(self, t: torch.Tensor) -> bool:
        """Whether the tensor still has it: as ``of(t) == self``, in a third of the time."""
        return (
            t.data_ptr() == self.addr
            and t.shape == self.shape
            and t.stride() == self.strides
            and t.dtype == self.dtype
            and t.untyped_storage().nbytes() == self.storage_nbytes
        )


def tensor_at(model: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter or buffer by its dotted name, or None."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return own_tensors(module).get(leaf)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its dotted name; one that has several names has them all."""
    found: dict[str, torch.Tensor] = {}
    rest = [("", model)]
    while rest:
        prefix, module = rest.pop()
        for store in (module._parameters, module._buffers):  # noqa: SLF001
            for name, t in store.items():
                if t is not None:
                    found[prefix + name] = t
        for name, child in module._modules.items():  # noqa: SLF001
            if child is not None:
                rest.append((f"{prefix}{name}.", child))
    return found


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of this module alone."""
    own = {**module._parameters, **module._buffers}  # noqa: SLF001 - nn.Module has no other door
    return {name: t for name, t in own.items() if t is not None}


def key_of(t: torch.Tensor) -> int:
    """The identity of a tensor's storage; the only one that meta storages have."""
    return int(t.untyped_storage()._cdata)


def reachable(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Tensors in lists, dicts, objects and closures, ``depth`` levels deep; modules stay shut."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    inner: Iterable[Any] = ()
    if depth <= 0 or isinstance(value, (type, torch.nn.Module)):
        pass
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, partial):
        inner = [*value.args, *value.keywords.values(), value.func]
    elif is_dataclass(value):
        inner = [getattr(value, f.name, None) for f in fields(value)]
    elif (cells := getattr(value, "__closure__", None)) is not None:
        inner = [_content(cell) for cell in cells]
    elif hasattr(value, "__dict__"):
        inner = vars(value).values()
    for item in inner:
        yield from reachable(item, depth - 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that was never bound
        return None


class Places:
    """Where kernel tensors are that were registered.

    The engine stands still while they are checked, so the ways to them are found once: a check
    sees that each module on a way, and the tensor at its end, are the objects that they were.

    Args:
        model: The live model.
        known: The tensors' identities by dotted name.
    """

    def __init__(self, model: nn.Module, known: dict[str, Identity]) -> None:
        self._model = model
        self._known = known
        self._modules = {"": model}
        self._ways: list[tuple[nn.Module, str, nn.Module]] = []
        self._tensors = [(*self._slot(name), identity) for name, identity in known.items()]

    def _slot(self, name: str) -> tuple[nn.Module, str, str, torch.Tensor]:
        path, _, leaf = name.rpartition(".")
        module = self._module(path)
        for slot in ("_parameters", "_buffers"):
            if (t := module.__dict__[slot].get(leaf)) is not None:
                return module, slot, leaf, t
        raise AttributeError(f"{path} has no tensor {leaf}")

    def _module(self, path: str) -> nn.Module:
        found = self._modules.get(path)
        if found is None:
            parent, _, name = path.rpartition(".")
            module = self._module(parent)
            found = self._modules[path] = module.__dict__["_modules"][name]
            self._ways.append((module, name, found))
        return found

    def check(self) -> None:
        """Compare every tensor with what was registered.

        Raises:
            IdentityError: One moved; a write to its old place would be lost or would corrupt.
        """
        with plainly():
            if not (
                all(module.__dict__["_modules"].get(k) is m for module, k, m in self._ways)
                and all(
                    module.__dict__[slot].get(leaf) is t and identity.holds(t)
                    for module, slot, leaf, t, identity in self._tensors
                )
            ):
                self._compare()

    def _compare(self) -> None:
        """By name, whichever objects they are now."""
        tensors = tensors_of(self._model)
        for name, identity in self._known.items():
            t = tensors.get(name)
            if t is None or not identity.holds(t):
                now = None if t is None else Identity.of(t)
                raise IdentityError(
                    f"kernel tensor {name} changed since it was registered: {identity} is now "
                    f"{now}",
                    hint="sleep/wake, LoRA or a reload moves weights: a new rendezvous registers "
                    "them",
                    tensor=name,
                )


def plainly() -> AbstractContextManager[None]:
    """Within this a parameter of a class of the engine's is no more than a tensor.

    vLLM's classes answer each look at a shape, or at an address, in Python: several microseconds.
    """
    return torch._C.DisableTorchFunctionSubclass()


def flat_bytes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in index order, as flat uint8; a view where it is contiguous."""
    with plainly():  # and so the view is a plain one, too
        return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have equal form and equal bytes (NaNs and signed zeros included)."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(flat_bytes(a), flat_bytes(b))


def same_form(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have equal shape, dtype and strides."""
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def fingerprint(t: torch.Tensor) -> object:
    """Equal for tensors of equal form and bytes; of a meta tensor, its identity."""
    if t.is_meta:
        return id(t)
    sums: list[int] = digest.digest_sums(flat_bytes(t)).tolist()
    return t.shape, t.dtype, t.stride(), *sums


def view(flat: torch.Tensor, region: Strided) -> torch.Tensor:
    """A strided region of a flat contiguous tensor."""
    return torch.as_strided(
        flat, region.shape, region.strides, flat.storage_offset() + region.offset
    )


def windows(copy: TracedCopy, itemsize: int, limit_nbytes: int) -> Iterable[TracedCopy]:
    """First, middle and last part of a copy along its longest dim, each within ``limit_nbytes``."""
    numel = 1
    for size in copy.src.shape:
        numel *= size
    if not numel:
        return
    if numel * itemsize <= 3 * limit_nbytes:
        yield copy
        return
    dim = max(range(len(copy.src.shape)), key=lambda d: copy.src.shape[d])
    size = copy.src.shape[dim]
    count = max(1, limit_nbytes * size // (numel * itemsize))
    for start in sorted({0, (size - count) // 2, size - count}):
        yield TracedCopy(
            copy.tensor, _slice(copy.src, dim, start, count), copy.param,
            _slice(copy.dst, dim, start, count),
        )  # fmt: skip


def _slice(region: Strided, dim: int, start: int, count: int) -> Strided:
    shape = (*region.shape[:dim], count, *region.shape[dim + 1 :])
    return Strided(region.offset + start * region.strides[dim], shape, region.strides)


def replay(
    copies: Iterable[TracedCopy], source: Callable[[str], torch.Tensor], target: torch.Tensor
) -> None:
    """Do the traced copies into a contiguous ``target`` from flat checkpoint tensors."""
    flat = target.reshape(-1)
    for c in copies:
        view(flat, c.dst).copy_(view(source(c.tensor), c.src))
