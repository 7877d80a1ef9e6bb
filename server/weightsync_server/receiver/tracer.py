"""Find a worker's layout by running the engine's own loader on meta tensors.

Every checkpoint tensor becomes a meta tensor with a storage of its own, and so has every
parameter of the twin.  A view keeps its storage, offset and strides, so each ``copy_`` from the
one kind of storage into the other tells exactly which strided region goes where.  Nothing is
assumed about the model: slices, fusions, stacks, permutations and casts all come out of the trace.

What is no pure copy (arithmetic on a weight, an in-place update that is no copy) cannot be a
layout; it is a :class:`TraceError` that names the tensor and the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from weightsync.errors import ManifestError, TraceError, WeightSyncError
from weightsync.manifest import Manifest, TensorSpec
from weightsync_server.receiver.kernel import key_of, reachable
from weightsync_server.receiver.regions import Strided, TracedCopy
from weightsync_server.receiver.watch import TraceState, Watch

Loader = Callable[[nn.Module, Iterable[tuple[str, torch.Tensor]]], None]

__all__ = ["Loader", "Strided", "Trace", "TracedCopy", "trace"]


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


class _Feed:
    """Hands out the manifest's tensors on the meta device; knows which one was the last."""

    def __init__(self, manifest: Manifest, state: TraceState) -> None:
        self.manifest = manifest
        self.state = state
        self.last: TensorSpec | None = None
        self.over = False

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for spec in self.manifest:
            dtype = getattr(torch, spec.dtype)
            t = torch.empty(spec.shape, dtype=dtype, device="meta")
            self.state.admit(t, spec.name)
            self.last = spec
            yield spec.name, t
        self.over = True

    def blame(self, error: Exception) -> ManifestError:
        """The loader's error, with the tensor that it is about."""
        said = str(error).splitlines()[0] if str(error) else "no message"
        spec = self.last
        if self.over:
            # it works on all that it has collected: only its own words can tell on which
            named = [t for t in self.manifest if t.name in str(error)]
            spec = max(named, key=lambda t: len(t.name), default=None)
        what = "the manifest" if spec is None else f"{spec.name} ({spec.dtype} {list(spec.shape)})"
        return ManifestError(
            f"the engine's loader refuses {what}: {type(error).__name__}: {said}",
            hint="names and shapes must be those of a checkpoint that this engine loads",
            tensor="" if spec is None else spec.name,
        )


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
    state = TraceState()
    own = dict(_owned(twin))
    for name, p in own.items():
        if p.is_meta:
            state.params.setdefault(key_of(p), (name, p.dtype))
            state.keep.append(p)
    before = {name: (p, key_of(p)) for name, p in own.items()}
    feed = _Feed(manifest, state)
    try:
        with torch.no_grad(), Watch(state):
            load(twin, iter(feed))
    except WeightSyncError:
        raise
    except Exception as error:
        raise feed.blame(error) from error
    _check_swaps(before, dict(_owned(twin)))
    _check_kept(twin, state)
    state.check_numbers()
    used = {c.tensor for c in state.copies}
    skipped = tuple(t.name for t in manifest if t.name not in used and t.numel)
    return Trace(tuple(state.copies), tuple(state.fills), skipped)


def _owned(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under all of its names, the first one first."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check_swaps(
    before: dict[str, tuple[torch.Tensor, int]], after: dict[str, torch.Tensor]
) -> None:
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if old is None or new is None or new is not old[0] or key_of(new) != old[1]:
            raise TraceError(
                f"the loader puts another tensor in place of {name} instead of copying into it",
                hint="this tensor cannot be pushed",
                tensor=name,
            )


def _check_kept(twin: nn.Module, state: TraceState) -> None:
    """A weight that the loader keeps outside of parameters and buffers would go stale."""
    for path, module in twin.named_modules():
        for key, value in vars(module).items():
            if key in {"_parameters", "_buffers", "_modules"}:
                continue
            names = state.names_of(reachable(value, 2))
            if names:
                raise TraceError(
                    f"the loader keeps {', '.join(sorted(names))} in {path or 'the model'}.{key}, "
                    "which is no parameter",
                    hint="this tensor cannot be pushed",
                    tensor=min(names),
                )
