"""The dispatch mode under which a loader is traced: what it knows of every storage."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.errors import TraceError
from weightsync_server.receiver.coverage import intervals, overlap
from weightsync_server.receiver.kernel import key_of
from weightsync_server.receiver.regions import Piece, Strided, TracedCopy, pieces, whole

aten = torch.ops.aten
#: operations whose result does not depend on the values of the tensor they are given
_FRESH = frozenset(
    getattr(aten, name)
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    )
)
_STUCK = "the engine computes while it loads; this tensor cannot be pushed"


@dataclass(slots=True)
class _Origin:
    """Where the elements of a storage come from.

    ``base`` None: the storage *is* the checkpoint tensor.  Else the storage, seen as contiguous
    with ``base.shape``, holds that strided region of it.  ``casts`` are the dtypes it went
    through, the storage's own last.
    """

    tensor: str
    base: Strided | None
    casts: tuple[torch.dtype, ...]


@dataclass(slots=True)
class _Taint:
    """A computed value: which tensors went in, and through what operation first."""

    tensors: set[str]
    op: str


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
class _Number:
    """A scalar that the loader read with ``item()``."""

    tensor: str
    region: Strided
    casts: tuple[torch.dtype, ...]
    used: bool = False


@dataclass(slots=True)
class TraceState:
    """What a trace knows.  ``params``: name and dtype by storage, of the twin's tensors."""

    params: dict[int, tuple[str, torch.dtype]] = field(default_factory=dict)
    origins: dict[int, _Origin] = field(default_factory=dict)
    taints: dict[int, _Taint] = field(default_factory=dict)
    numbers: dict[float, _Number] = field(default_factory=dict)
    copies: list[TracedCopy] = field(default_factory=list)
    fills: list[tuple[str, Strided]] = field(default_factory=list)
    # meta storages must outlive the trace: a freed one's identity would be given out again
    keep: list[torch.Tensor] = field(default_factory=list)

    def admit(self, t: torch.Tensor, tensor: str) -> None:
        """``t`` is the checkpoint tensor of this name."""
        self.keep.append(t)
        self.origins[key_of(t)] = _Origin(tensor, None, (t.dtype,))

    def names_of(self, used: Iterable[torch.Tensor]) -> set[str]:
        """Checkpoint tensors that went into these tensors."""
        names: set[str] = set()
        for t in used:
            if t.layout is not torch.strided:
                continue
            if (origin := self.origins.get(key_of(t))) is not None:
                names.add(origin.tensor)
            elif (taint := self.taints.get(key_of(t))) is not None:
                names |= taint.tensors
        return names

    def check_numbers(self) -> None:
        """Refuse numbers that were read and written nowhere: they went where no trace can follow.

        Raises:
            TraceError: There is one.
        """
        lost = sorted({n.tensor for n in self.numbers.values() if not n.used})
        if lost:
            raise TraceError(
                f"the loader reads the value of {', '.join(lost)} and does something else with "
                "it than to write it to a parameter",
                hint=_STUCK,
                tensor=lost[0],
            )


class Watch(TorchDispatchMode):
    """Watches every operation of the loader."""

    def __init__(self, state: TraceState) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.s = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Follow one operation; called by torch."""
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten.copy_:
            return self._copy(args[0], args[1])
        if packet in (aten.fill_, aten.zero_):
            return self._fill(func, args, args[1] if len(args) > 1 else 0.0)
        if packet is aten._local_scalar_dense:
            return self._scalar(func, args)
        used = [t for t in _tensors([*args, *kwargs.values()]) if self._known(t)]
        written = list(self._written(func, args, kwargs))
        for t in written:
            if key_of(t) in self.s.params:
                raise TraceError(
                    f"the loader changes {self.s.params[key_of(t)][0]} in place with {func}, "
                    f"which is no copy{self._about(used)}",
                    hint="the engine computes while it loads; this model needs an adapter that "
                    "does the same in finish()",
                    operation=str(func),
                )
        if packet in (aten.clone, aten._to_copy) and used:
            return self._derived(args[0], kwargs, func)
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view not in func.tags or packet in (aten.resize_, aten.set_):
            # weights change in place, or a temporary takes them in: neither is a copy any more
            for t in written:
                self._taint(t, [*used, t], func)
        for result in _tensors(out if isinstance(out, (list, tuple)) else [out]):
            self.s.keep.append(result)
            if packet in _FRESH:
                continue
            if used and not self._known(result) and key_of(result) not in self.s.params:
                self._taint(result, used, func)
        return out

    def _known(self, t: torch.Tensor) -> bool:
        return key_of(t) in self.s.origins or key_of(t) in self.s.taints

    def _about(self, used: Iterable[torch.Tensor]) -> str:
        names = self.s.names_of(used)
        return f", while it loads {', '.join(sorted(names))}" if names else ""

    def _taint(self, t: torch.Tensor, used: list[torch.Tensor], func: object) -> None:
        names = self.s.names_of(used)
        if not names:
            return
        op = next(
            (self.s.taints[key_of(u)].op for u in used if key_of(u) in self.s.taints), str(func)
        )
        self.s.keep.append(t)
        self.s.origins.pop(key_of(t), None)
        self.s.taints[key_of(t)] = _Taint(names, op)

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
        for i, arg in enumerate(func._schema.arguments):
            if arg.alias_info is not None and arg.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(arg.name)
                yield from _tensors([value])

    def _resolve(self, t: torch.Tensor) -> tuple[_Origin, list[Piece]] | None:
        """The checkpoint regions behind ``t``, or None where it is no plain view."""
        origin = self.s.origins.get(key_of(t))
        # a view as another dtype counts in other elements
        if origin is None or t.dtype != origin.casts[-1]:
            return None
        region = Strided.of(t)
        found = [whole(region)] if origin.base is None else pieces(origin.base, region)
        return None if found is None else (origin, found)

    def _derived(self, t: torch.Tensor, kwargs: dict[str, Any], func: Any) -> torch.Tensor:
        """A copy of ``t`` (clone, contiguous, to(dtype)): new storage, known origin."""
        out = torch.empty_like(
            t,
            dtype=kwargs.get("dtype") or t.dtype,
            memory_format=kwargs.get("memory_format") or torch.preserve_format,
        )
        self._adopt(out, t, func)
        return out

    def _adopt(self, out: torch.Tensor, t: torch.Tensor, func: object) -> None:
        """All of ``out``'s storage now holds ``t``, perhaps with its dims in another order."""
        self.s.keep.append(out)
        found = self._resolve(t)
        order = sorted(
            (d for d in range(out.ndim) if out.shape[d] > 1), key=out.stride, reverse=True
        )
        packed = out.permute([d for d in range(out.ndim) if d not in order] + order)
        if (
            found is None
            or len(found[1]) != 1
            or not packed.is_contiguous()
            or (out.untyped_storage().nbytes() != out.numel() * out.element_size())
        ):
            self._taint(out, [t], func)
            return
        origin, (piece,) = found
        dims = [
            (piece.region.shape[k], piece.region.strides[k])
            for d in order
            for k, (dim, _) in enumerate(piece.steps)
            if dim == d
        ]
        base = Strided(piece.region.offset, tuple(n for n, _ in dims), tuple(s for _, s in dims))
        same = origin.casts[-1] == out.dtype
        casts = origin.casts if same else (*origin.casts, out.dtype)
        self.s.taints.pop(key_of(out), None)
        self.s.origins[key_of(out)] = _Origin(origin.tensor, base, casts)

    def _copy(self, dst: torch.Tensor, src: torch.Tensor) -> torch.Tensor:
        src = src.expand(dst.shape)  # raises as copy_ would where the shapes do not fit
        param = self.s.params.get(key_of(dst))
        if param is None:
            # into a temporary: one that it fills is a derived copy, anything else is computed
            if not (self._known(src) or self._known(dst)):
                aten.copy_.default(dst, src)  # a table of the loader's own
                return dst
            nbytes = dst.numel() * dst.element_size()
            if self._known(src) and nbytes == dst.untyped_storage().nbytes():
                self._adopt(dst, src, "copy_ into a temporary")
            else:
                self._taint(dst, [dst, src], "copy_ into a part of a temporary")
            return dst
        found = self._resolve(src)
        if found is None or dst.dtype != param[1]:
            raise TraceError(
                f"the loader writes {param[0]} from {self._what(src)}: that is no strided copy",
                hint=_STUCK,
                tensor=param[0],
            )
        origin, parts = found
        region = Strided.of(dst)
        for piece, to in zip(parts, region.along(parts), strict=True):
            self._record(param[0], to, origin.tensor, piece.region, (*origin.casts, dst.dtype))
        return dst

    def _what(self, src: torch.Tensor) -> str:
        if (taint := self.s.taints.get(key_of(src))) is not None:
            return f"{', '.join(sorted(taint.tensors))} through {taint.op}"
        if (origin := self.s.origins.get(key_of(src))) is not None:
            return f"a view of {origin.tensor} (as {src.dtype} {tuple(src.shape)})"
        if (other := self.s.params.get(key_of(src))) is not None:
            return f"the parameter {other[0]}"
        return f"a value that is no checkpoint tensor ({src.dtype} {tuple(src.shape)})"

    def _record(
        self, param: str, dst: Strided, tensor: str, src: Strided, casts: tuple[torch.dtype, ...]
    ) -> None:
        if 0 in dst.shape:
            return
        if any(n > 1 and stride == 0 for n, stride in zip(dst.shape, dst.strides, strict=True)):
            raise TraceError(
                f"the loader writes {param} through an expanded view from {tensor}",
                hint=_STUCK,
                tensor=tensor,
            )
        # the trainer casts once, from the checkpoint's dtype to the last: the chain must equal that
        lossy = [b for a, b in pairwise(casts) if not _lossless(a, b)]
        if len(lossy) > 1 or (lossy and lossy[0] != casts[-1]):
            raise TraceError(
                f"the loader casts {tensor} through {' -> '.join(map(str, casts))} into {param}",
                hint=f"publish the tensor as {lossy[0]}",
                tensor=tensor,
            )
        self.s.copies.append(TracedCopy(tensor, src, param, dst))

    def _fill(self, func: Any, args: Any, value: Any) -> torch.Tensor:
        dst: torch.Tensor = args[0]
        param = self.s.params.get(key_of(dst))
        if isinstance(value, torch.Tensor):
            return self._copy(dst, value)
        number = self.s.numbers.get(value)
        if param is None:
            if number is not None:
                self.s.keep.append(dst)
                self.s.origins.pop(key_of(dst), None)
                self.s.taints[key_of(dst)] = _Taint({number.tensor}, str(func))
            else:
                self._taint(dst, [dst], func)
            func(*args)
            return dst
        region = Strided.of(dst)
        if number is not None and dst.dtype == param[1]:
            number.used = True
            source = number.region.expand(dst.shape)
            self._record(param[0], region, number.tensor, source, (*number.casts, dst.dtype))
        elif self.s.numbers and value != 0:
            raise TraceError(
                f"the loader fills {param[0]} with a number after it has read scalars of "
                f"{', '.join(sorted({n.tensor for n in self.s.numbers.values()}))}: "
                "it may have been computed from them",
                hint=_STUCK,
                tensor=param[0],
            )
        else:
            loaded = intervals(c.dst for c in self.s.copies if c.param == param[0])
            if dst.dtype != param[1] or overlap(loaded, intervals([region])):
                raise TraceError(
                    f"the loader fills a part of {param[0]} that it has loaded before",
                    hint=_STUCK,
                    tensor=param[0],
                )
            self.s.fills.append((param[0], region))
        return dst

    def _scalar(self, func: Any, args: Any) -> Any:
        """``item()`` of a meta tensor: answer with a number that nothing else has."""
        t: torch.Tensor = args[0]
        found = self._resolve(t)
        if found is None:
            if self._known(t):
                raise TraceError(f"the loader reads a number from {self._what(t)}", hint=_STUCK)
            return func(*args)
        origin, (piece,) = found
        if not t.dtype.is_floating_point:
            raise TraceError(
                f"the loader decides by the value of {origin.tensor} ({t.dtype})",
                hint=_STUCK,
                tensor=origin.tensor,
            )
        # an odd, tiny, distinct float: exact in double, never a constant that a loader would use
        bits = 0x3B5A_0000_0000_0001 + len(self.s.numbers)
        number = float(struct.unpack("<d", struct.pack("<q", bits))[0])
        region = Strided(piece.region.offset, (), ())
        self.s.numbers[number] = _Number(origin.tensor, region, origin.casts)
        return number
