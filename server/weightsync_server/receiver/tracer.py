"""Find a worker's layout by running the engine's own loader on meta tensors.

Every checkpoint tensor becomes a meta tensor with a storage of its own, and so has every
parameter of the twin.  A view keeps its storage, offset and strides, so each ``copy_`` from the
one kind of storage into the other tells exactly which strided region goes where.  Nothing is
assumed about the model: slices, fusions, stacks, permutations and casts all come out of the trace.

What is no pure copy (arithmetic on a weight, an in-place update that is no copy) cannot be a
layout; it is a :class:`TraceError` that names the tensor and the operation.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.errors import ManifestError, TraceError, WeightSyncError
from weightsync.manifest import Manifest, TensorSpec

Loader = Callable[[nn.Module, Iterable[tuple[str, torch.Tensor]]], None]
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Strided:
    """A strided region, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, t: torch.Tensor) -> Strided:
        return cls(int(t.storage_offset()), tuple(t.shape), tuple(t.stride()))

    def expand(self, shape: tuple[int, ...]) -> Strided:
        """The region as torch broadcasts it to ``shape``."""
        lead = len(shape) - len(self.shape)
        strides = [0] * lead
        for size, want, stride in zip(self.shape, shape[lead:], self.strides, strict=True):
            strides.append(0 if size == 1 and want != 1 else stride)
        return Strided(self.offset, shape, tuple(strides))


@dataclass(frozen=True, slots=True)
class TracedCopy:
    """``tensor[src] -> param[dst]``; both regions have the same shape."""

    tensor: str
    src: Strided
    param: str
    dst: Strided


@dataclass(frozen=True, slots=True)
class Trace:
    """What a loader does with a manifest.

    Attributes:
        copies: In the loader's order.
        fills: Regions of parameters that the loader sets to a constant.
        skipped: Tensors that it takes and drops.
    """

    copies: tuple[TracedCopy, ...]
    fills: tuple[tuple[str, Strided], ...]
    skipped: tuple[str, ...]


@dataclass(slots=True)
class _Origin:
    """Where the elements of a storage come from.

    ``base`` None: the storage *is* the checkpoint tensor.  Else the storage, seen as contiguous
    with ``base.shape``, holds that strided region of it.  ``casts`` are the dtypes it went through.
    """

    tensor: str
    base: Strided | None
    casts: tuple[torch.dtype, ...]


@dataclass(slots=True)
class _Taint:
    """A computed value: which tensors went in, and through what operation first."""

    tensors: set[str]
    op: str


def _key(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)  # the only identity that meta storages have


def _compose(base: Strided, view: Strided) -> Strided | None:
    """``view`` of a contiguous storage of ``base.shape``, as a region of base's own storage.

    None: the view crosses base's dims in a way that one strided region cannot express.
    """
    packed = [math.prod(base.shape[d + 1 :]) for d in range(len(base.shape))]
    rest, index = view.offset, []
    for stride, size in zip(packed, base.shape, strict=True):
        index.append(min(rest // stride, size - 1) if stride and size else 0)
        rest -= index[-1] * stride
    room = [size - i for size, i in zip(base.shape, index, strict=True)]
    if rest:
        return None
    offset = base.offset + sum(i * s for i, s in zip(index, base.strides, strict=True))
    strides: list[int] = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size <= 1 or stride == 0:
            strides.append(0)
            continue
        for d, step in enumerate(packed):
            times = stride // step if step else 0
            if times and stride % step == 0 and (size - 1) * times < room[d]:
                room[d] -= (size - 1) * times
                strides.append(base.strides[d] * times)
                break
        else:
            return None
    return Strided(offset, view.shape, tuple(strides))


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def _lossless(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether every value of ``a`` survives a cast to ``b``."""
    if a == b:
        return True
    if not (a.is_floating_point and b.is_floating_point):
        return False
    x, y = torch.finfo(a), torch.finfo(b)
    return y.eps <= x.eps and y.max >= x.max and y.smallest_normal <= x.smallest_normal


@dataclass(slots=True)
class _State:
    params: dict[int, str]
    origins: dict[int, _Origin] = field(default_factory=dict)
    taints: dict[int, _Taint] = field(default_factory=dict)
    scalars: dict[float, tuple[str, Strided, tuple[torch.dtype, ...]]] = field(default_factory=dict)
    copies: list[TracedCopy] = field(default_factory=list)
    fills: list[tuple[str, Strided]] = field(default_factory=list)
    # meta storages must outlive the trace: a freed one's identity would be given out again
    keep: list[torch.Tensor] = field(default_factory=list)


class _Mode(TorchDispatchMode):
    """Watches every operation of the loader."""

    def __init__(self, state: _State) -> None:
        super().__init__()
        self.s = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten.copy_:
            return self._copy(args[0], args[1])
        if packet in (aten.fill_, aten.zero_):
            return self._fill(args[0], args[1] if len(args) > 1 else 0.0)
        if packet is aten._local_scalar_dense:
            return self._scalar(func, args)
        used = [t for t in _tensors([*args, *kwargs.values()]) if self._known(t)]
        written = [t for t in self._written(func, args, kwargs) if _key(t) in self.s.params]
        if written:
            raise TraceError(
                f"the loader changes {self.s.params[_key(written[0])]} in place with {func}, "
                f"which is no copy{self._about(used)}",
                hint="the engine computes while it loads; this model needs an adapter that does "
                "the same in finish()",
                operation=str(func),
            )
        if packet in (aten.clone, aten._to_copy) and used:
            return self._derived(args[0], kwargs.get("dtype") or args[0].dtype, func)
        out = func(*args, **kwargs)
        for result in _tensors(out if isinstance(out, (list, tuple)) else [out]):
            self.s.keep.append(result)
            if used and not self._known(result) and _key(result) not in self.s.params:
                self._taint(result, used, func)
        return out

    def _known(self, t: torch.Tensor) -> bool:
        return _key(t) in self.s.origins or _key(t) in self.s.taints

    def _names(self, used: Iterable[torch.Tensor]) -> set[str]:
        names: set[str] = set()
        for t in used:
            if (origin := self.s.origins.get(_key(t))) is not None:
                names.add(origin.tensor)
            elif (taint := self.s.taints.get(_key(t))) is not None:
                names |= taint.tensors
        return names

    def _about(self, used: Iterable[torch.Tensor]) -> str:
        names = self._names(used)
        return f", while it loads {', '.join(sorted(names))}" if names else ""

    def _taint(self, t: torch.Tensor, used: list[torch.Tensor], func: Any) -> None:
        op = next((self.s.taints[_key(u)].op for u in used if _key(u) in self.s.taints), str(func))
        self.s.taints[_key(t)] = _Taint(self._names(used), op)

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
        for i, arg in enumerate(func._schema.arguments):
            if arg.alias_info is not None and arg.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(arg.name)
                yield from _tensors([value])

    def _resolve(self, t: torch.Tensor) -> tuple[_Origin, Strided] | None:
        """The checkpoint region behind ``t``, or None where it is not a plain region."""
        origin = self.s.origins.get(_key(t))
        if origin is None:
            return None
        region = Strided.of(t)
        if origin.base is not None:
            composed = _compose(origin.base, region)
            if composed is None:
                return None
            region = composed
        return origin, region

    def _derived(self, t: torch.Tensor, dtype: torch.dtype, func: Any) -> torch.Tensor:
        """A copy of ``t`` (clone, contiguous, to(dtype)): new storage, known origin."""
        out = torch.empty(t.shape, dtype=dtype, device="meta")
        self.s.keep.append(out)
        found = self._resolve(t)
        if found is None:
            self._taint(out, [t], func)
            return out
        origin, region = found
        casts = origin.casts if origin.casts[-1] == dtype else (*origin.casts, dtype)
        self.s.origins[_key(out)] = _Origin(origin.tensor, region, casts)
        return out

    def _copy(self, dst: torch.Tensor, src: torch.Tensor) -> torch.Tensor:
        param = self.s.params.get(_key(dst))
        if param is None:
            # into a temporary: a whole fresh one is a derived copy, anything else is computed
            if self._known(src):
                whole = dst.is_contiguous() and dst.numel() * dst.element_size() == (
                    dst.untyped_storage().nbytes()
                )
                found = self._resolve(src) if whole and src.shape == dst.shape else None
                if found is not None:
                    origin, region = found
                    casts = (*origin.casts, dst.dtype)
                    self.s.origins[_key(dst)] = _Origin(origin.tensor, region, casts)
                else:
                    self.s.origins.pop(_key(dst), None)
                    self._taint(dst, [src], "copy_ into a part of a temporary")
            return dst
        found = self._resolve(src)
        if found is None:
            taint = self.s.taints.get(_key(src))
            what = (
                f"{', '.join(sorted(taint.tensors))} through {taint.op}"
                if taint is not None
                else f"a value that is no checkpoint tensor ({src.dtype} {tuple(src.shape)})"
            )
            raise TraceError(
                f"the loader writes {param} from {what}: that is no strided copy",
                hint="the engine computes while it loads; this tensor cannot be pushed",
                tensor=param,
            )
        origin, region = found
        self._record(param, Strided.of(dst), origin.tensor, region, (*origin.casts, dst.dtype))
        return dst

    def _record(
        self, param: str, dst: Strided, tensor: str, src: Strided, casts: tuple[torch.dtype, ...]
    ) -> None:
        if any(
            size > 1 and stride == 0 for size, stride in zip(dst.shape, dst.strides, strict=True)
        ):
            raise TraceError(f"the loader writes {param} through an expanded view from {tensor}")
        # the trainer casts once, from the checkpoint's dtype to the last: the chain must equal that
        lossy = [b for a, b in pairwise(casts) if not _lossless(a, b)]
        if len(lossy) > 1 or (lossy and lossy[0] != casts[-1]):
            raise TraceError(
                f"the loader casts {tensor} through {' -> '.join(map(str, casts))} into {param}",
                hint=f"publish the tensor as {lossy[0]}",
                tensor=tensor,
            )
        self.s.copies.append(TracedCopy(tensor, src.expand(dst.shape), param, dst))

    def _fill(self, dst: torch.Tensor, value: Any) -> torch.Tensor:
        param = self.s.params.get(_key(dst))
        if isinstance(value, torch.Tensor):
            return self._copy(dst, value) if param is not None or self._known(value) else dst
        if param is None:
            return dst
        known = self.s.scalars.get(value)
        if known is not None:
            tensor, region, casts = known
            self._record(param, Strided.of(dst), tensor, region, (*casts, dst.dtype))
        elif self.s.scalars and value != 0:
            raise TraceError(
                f"the loader fills {param} with a number after it has read scalars of "
                f"{', '.join(sorted({name for name, _, _ in self.s.scalars.values()}))}: "
                "it may have been computed from them",
                hint="this tensor cannot be pushed",
                tensor=param,
            )
        else:
            self.s.fills.append((param, Strided.of(dst)))
        return dst

    def _scalar(self, func: Any, args: Any) -> Any:
        """``item()`` of a meta tensor: answer with a number that nothing else has."""
        t = args[0]
        found = self._resolve(t)
        if found is None:
            if _key(t) in self.s.taints:
                raise TraceError(
                    f"the loader reads a number computed from {', '.join(self._names([t]))}",
                    hint="this tensor cannot be pushed",
                )
            return func(*args)
        origin, region = found
        if not t.dtype.is_floating_point:
            raise TraceError(
                f"the loader decides by the value of {origin.tensor} ({t.dtype})",
                hint="this tensor cannot be pushed",
            )
        # an odd, tiny, distinct float: exact in double, never a constant that a loader would use
        number = struct.unpack(
            "<d", struct.pack("<q", 0x3B5A_0000_0000_0001 + len(self.s.scalars))
        )[0]
        self.s.scalars[number] = (origin.tensor, region, origin.casts)
        return number


def _feed(
    manifest: Iterable[TensorSpec], state: _State, last: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in manifest:
        dtype = getattr(torch, spec.dtype)
        t = torch.empty(spec.shape, dtype=dtype, device="meta")
        state.keep.append(t)
        state.origins[_key(t)] = _Origin(spec.name, None, (dtype,))
        last[:] = [spec.name]
        yield spec.name, t


def trace(twin: nn.Module, load: Loader, manifest: Manifest) -> Trace:
    """Run ``load`` on ``twin`` with meta tensors and return what it copies where.

    Args:
        twin: A model in load format on the meta device.  It is used up.
        load: The engine's loader.
        manifest: The checkpoint tensors, given to the loader in this order.

    Raises:
        ManifestError: The loader refuses a tensor; the message names it.
        TraceError: The loader does what a layout cannot express.
    """
    params: dict[int, str] = {}
    for name, p in [*twin.named_parameters(), *twin.named_buffers()]:
        if p.is_meta:
            params.setdefault(_key(p), name)
    state = _State(params)
    before = {name: _key(p) for name, p in twin.named_parameters()}
    last: list[str] = []
    try:
        with torch.no_grad(), _Mode(state):
            load(twin, _feed(manifest, state, last))
    except WeightSyncError:
        raise
    except Exception as error:
        where = last[0] if last else "the first tensor"
        spec = manifest.by_name.get(where)
        shape = f" ({spec.dtype} {list(spec.shape)})" if spec is not None else ""
        raise ManifestError(
            f"the engine's loader refuses {where}{shape}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            hint="names and shapes must be those of a checkpoint that this engine loads",
            tensor=where,
        ) from error
    for name, p in twin.named_parameters():
        if name in before and before[name] != _key(p):
            raise TraceError(
                f"the loader puts another tensor in place of {name} instead of copying into it",
                hint="this tensor cannot be pushed",
                tensor=name,
            )
    used = {c.tensor for c in state.copies}
    skipped = tuple(t.name for t in manifest if t.name not in used and t.numel)
    return Trace(tuple(state.copies), tuple(state.fills), skipped)
