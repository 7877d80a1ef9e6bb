"""Decide and prove, for every kernel tensor, how bytes may reach it: direct, staged or refused.

A *unit* is a module that owns loaded parameters.  Three things can be true of it:

- ``direct``: the live parameters hold the load format, byte for byte, and post-processing leaves
  nothing else behind.  Writes may land in the live storage.
- ``renewed``: as direct, but post-processing also made something from the weights (a packed copy
  beside the plain one).  Writes land in the live storage; commit makes the rest again.
- ``staged``: the live parameters have another form.  Writes land in a buffer in load format;
  commit runs the engine's own post-processing on it.

Nothing of this is believed: the live bytes are compared with a load that the engine made (WS-11).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import nn

from weightsync.errors import LayoutError
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.changes import same_changes
from weightsync_server.receiver.install import (
    Finished,
    Given,
    finished_copy,
    obstacle,
    other_values,
    varying,
)
from weightsync_server.receiver.kernel import (
    key_of,
    own_tensors,
    reachable,
    replay,
    same_bytes,
    same_form,
    tensor_at,
    view,
    windows,
)
from weightsync_server.receiver.regions import TracedCopy
from weightsync_server.receiver.units import Proofs, Unit, fill_probe, settle

Source = Callable[[str], torch.Tensor]
_WINDOW_NBYTES = 64 * 1024
_READ_BACK_COLUMNS = 16


class Prover:
    """Looks at one live model; keeps a pristine twin of it.

    Args:
        adapter: The engine.
    """

    def __init__(self, adapter: EngineAdapter) -> None:
        self.adapter = adapter
        self.twin = adapter.new_twin()
        names: dict[int, str] = {}
        for name, t in [*self.twin.named_parameters(), *self.twin.named_buffers()]:
            if t.is_meta:
                names.setdefault(key_of(t), name)
        self._owned: dict[str, dict[str, str]] = {}
        self._aliases: dict[str, list[str]] = {}
        first: dict[nn.Module, str] = {}
        for path, module in self.twin.named_modules(remove_duplicate=False):
            if first.setdefault(module, path) != path:
                self._aliases.setdefault(first[module], []).append(path)
                continue
            found = {leaf: names[key_of(t)] for leaf, t in own_tensors(module).items() if t.is_meta}
            if found:
                self._owned[path] = found

    def load_format(self, tensor: str) -> torch.Tensor:
        """The twin's meta tensor: shape and dtype in load format.

        Raises:
            LayoutError: The engine has no such tensor.
        """
        found = tensor_at(self.twin, tensor)
        if found is None:
            raise LayoutError(
                f"the engine has no tensor {tensor}", hint="attach to the engine again"
            )
        return found

    def empty(self, tensor: str, device: torch.device | None = None) -> torch.Tensor:
        """A zeroed buffer in load format, by default on the engine's device."""
        like, device = self.load_format(tensor), self.adapter.device if device is None else device
        return torch.zeros(like.shape, dtype=like.dtype, device=device)

    def finished(
        self, unit: Unit, tensors: Mapping[str, torch.Tensor], given: Given
    ) -> tuple[Finished, nn.Module]:
        """A finished copy and the live module; ``tensors`` by kernel tensor.

        What ``given`` means, :func:`finished_copy` tells.

        Raises:
            LayoutError: The engine's post-processing failed.
        """
        live = self.adapter.live.get_submodule(unit.path)
        twin = self.twin.get_submodule(unit.path)
        own = {leaf: tensors[name] for leaf, name in unit.params.items()}
        try:
            with torch.no_grad():
                made = finished_copy(self.adapter, twin, own, live, given=given)
                return made.with_values(other_values(made, live, unit.varying)), live
        except Exception as error:
            raise LayoutError(
                f"post-processing a copy of {unit.path or 'the model'} fails: "
                f"{type(error).__name__}: {error}",
                hint="this module cannot be pushed; the engine's log may tell more",
            ) from error

    def prove(
        self, copies: Mapping[str, Sequence[TracedCopy]], source: Source, *, full: bool
    ) -> Proofs:
        """Compare the live model with the load that ``copies`` of ``source`` describe.

        Args:
            copies: By kernel tensor, what the engine's loader copies into it.
            source: Checkpoint tensors by name, flat and contiguous.
            full: Compare every byte, not windows of every copy.
        """
        proofs = self.guess(copies)
        for unit in proofs.units:
            if unit.kind != "staged" and not all(
                self._holds(name, copies[name], source, full=full) for name in unit.params.values()
            ):
                unit.kind = "staged"
        settle(proofs.units)
        for unit in proofs.units:
            if unit.kind != "direct" and not proofs.refusals.keys() & set(unit.params.values()):
                self._prove_finish(unit, copies, source, proofs, full=full)
        proofs.proven = True
        return proofs

    def guess(self, loaded: Collection[str] | None = None) -> Proofs:
        """Units by form alone: what finishing a probe does to each of them.  Proves nothing.

        Args:
            loaded: Kernel tensors that a load fills; None: all that one could.
        """
        proofs = Proofs()
        for unit in self.units(loaded):
            proofs.units.append(unit)
            names = unit.params.values()
            try:
                # and its negative: what comes out the same of both does not depend on the weights
                first, live = self.finished(unit, self._probes(unit, negative=False), "away")
                other, _ = self.finished(unit, self._probes(unit, negative=True), "away")
                unit.varying = varying(first, other)
                made = first.with_values(unit.varying)
                changed = made.changes
                if not same_changes(changed, other.changes):
                    raise LayoutError(
                        f"what post-processing does to {unit.path or 'the model'} depends on the "
                        "weights"
                    )
                self._check_aliases(unit)
            except LayoutError as error:
                unit.kind = "staged"
                proofs.refusals.update(dict.fromkeys(names, error.message))
                continue
            unit.derived, unit.opaque = changed.tensors, bool(changed.objects)
            reason = obstacle(live, made, replaceable=self.adapter.replaceable)
            if reason:
                where = unit.path or "the model"
                proofs.refusals.update(dict.fromkeys(names, f"{where}: {reason}"))
            if changed.params & unit.params.keys() or not all(
                self._same_place(live, leaf, name) for leaf, name in unit.params.items()
            ):
                unit.kind = "staged"
            elif not changed.none:
                unit.kind = "renewed"
        settle(proofs.units)
        self._refuse_shared(proofs)
        return proofs

    def units(self, loaded: Collection[str] | None = None) -> list[Unit]:
        """Modules that own kernel tensors; only those in ``loaded``, where it is given."""
        found = []
        for path, owned in self._owned.items():
            params = {k: n for k, n in owned.items() if loaded is None or n in loaded}
            if params:
                found.append(Unit(path, params))
        return found

    def _probes(self, unit: Unit, *, negative: bool) -> dict[str, torch.Tensor]:
        return {n: fill_probe(self.empty(n), negative=negative) for n in unit.params.values()}

    def _check_aliases(self, unit: Unit) -> None:
        live = self.adapter.live
        for path in self._aliases.get(unit.path, ()):
            if live.get_submodule(path) is not live.get_submodule(unit.path):
                raise LayoutError(
                    f"{unit.path} and {path} are one module when loaded, and two in the live engine"
                )

    def _same_place(self, module: nn.Module, leaf: str, tensor: str) -> bool:
        """Whether a live module's tensor is the kernel tensor itself, in load format."""
        live, like = tensor_at(self.adapter.live, tensor), self.load_format(tensor)
        mine = own_tensors(module).get(leaf)
        return (
            live is not None
            and mine is not None
            # tied when loaded, and no more: a write to the one would miss the other
            and mine.data_ptr() == live.data_ptr()
            and same_form(mine, live)
            and live.shape == like.shape
            and live.dtype == like.dtype
            and live.is_contiguous()
            and live.device == self.adapter.device
        )

    def _holds(
        self, tensor: str, copies: Sequence[TracedCopy], source: Source, *, full: bool
    ) -> bool:
        """Whether the live tensor holds what the copies say, in load format."""
        live = tensor_at(self.adapter.live, tensor)
        if live is None:
            return False
        flat = live.detach().reshape(-1)
        for c in copies:
            for w in [c] if full else windows(c, live.element_size(), _WINDOW_NBYTES):
                want = view(source(w.tensor), w.src).to(device=live.device, dtype=live.dtype)
                if not same_bytes(view(flat, w.dst), want):
                    return False
        return True

    def _prove_finish(
        self,
        unit: Unit,
        copies: Mapping[str, Sequence[TracedCopy]],
        source: Source,
        proofs: Proofs,
        *,
        full: bool,
    ) -> None:
        """Post-process a copy loaded from ``source``; refuse unless that is what serves now."""
        tensors = {}
        for name in unit.params.values():
            tensors[name] = self.empty(name)
            replay(copies[name], source, tensors[name])
        try:
            reason = self.difference(unit, tensors, "away", full=full)
        except LayoutError as error:
            reason = error.message
        if reason:
            proofs.refusals.update(
                dict.fromkeys(unit.params.values(), f"{unit.path or 'the model'}: {reason}")
            )

    def difference(
        self, unit: Unit, tensors: Mapping[str, torch.Tensor], given: Given, *, full: bool
    ) -> str:
        """Why the live module is not what post-processing makes of ``tensors``; empty: it is.

        Args:
            unit: Names the module.
            tensors: By kernel tensor, in load format.
            given: See :func:`finished_copy`.
            full: Ask opaque kernels for every column.

        Raises:
            LayoutError: The engine's post-processing failed.
        """
        columns = {}
        for leaf, name in unit.params.items():
            t = tensors[name]
            if t.ndim == 2:
                k = t.shape[1]
                count = k if full else min(k, _READ_BACK_COLUMNS)
                which = torch.linspace(0, k - 1, count, device=t.device).long()
                columns[leaf] = (which, t[:, which])
        made, live = self.finished(unit, tensors, given)
        return (
            obstacle(live, made, replaceable=self.adapter.replaceable)
            or _differs(unit, made, live)
            or self._reads_back(unit, made, live, columns)
        )

    def _reads_back(
        self,
        unit: Unit,
        made: Finished,
        live: nn.Module,
        columns: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> str:
        """What opaque kernels compute with, where it is not the checkpoint; empty if nothing."""
        read = False
        for leaf, name in unit.params.items():
            like, served = self.load_format(name), own_tensors(live).get(leaf)
            emptied = like.numel() > 0 and (served is None or not served.numel())
            unreadable = f"{leaf} is emptied by post-processing and cannot be read back"
            if leaf not in columns:
                if emptied:
                    return unreadable
                continue
            if not (made.changes.objects or emptied):
                continue
            which, want = columns[leaf]
            for who, module in (("the engine", live), ("a fresh load", made.module)):
                got = self.adapter.read_back(module, leaf, which, like.shape[1])
                if got is None:
                    if emptied:
                        return unreadable
                    continue
                read = True
                if not torch.equal(got, want):
                    return f"{who} computes with another {leaf} than its checkpoint holds"
        return "" if read else _objects_differ(made, live)

    def _refuse_shared(self, proofs: Proofs) -> None:
        """Refuse tensors that load apart and share live memory (re-tied embeddings)."""
        spans: dict[tuple[int, int, str], str] = {}
        for unit in proofs.units:
            module = self.adapter.live.get_submodule(unit.path)
            for leaf, name in unit.params.items():
                t = own_tensors(module).get(leaf)
                if t is not None and t.numel() and not t.is_meta:
                    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                    stop = t.data_ptr() + (last + 1) * t.element_size()
                    spans[t.data_ptr(), stop, name] = name
        reach, owner = 0, ""
        for start, stop, name in sorted(spans):
            if start < reach and name != owner:
                reason = f"{name} and {owner} share memory in the live engine, and load apart"
                proofs.refusals.update({name: reason, owner: reason})
            if stop > reach:
                reach, owner = stop, name


def _differs(unit: Unit, made: Finished, live: nn.Module) -> str:
    """What a finished copy has other than the live module; empty if nothing."""
    ours, changed = made.module, made.changes
    pairs = [
        (leaf, own_tensors(ours).get(leaf), own_tensors(live).get(leaf))
        for leaf in sorted({*unit.params, *changed.params})
    ] + [(k, ours.__dict__.get(k), live.__dict__.get(k)) for k in sorted(changed.tensors)]
    for name, a, b in pairs:
        if a is None and b is None:
            continue
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same_bytes(a, b)):
            return f"post-processing a fresh load makes another {name} than the engine serves"
    if changed.values:
        return (
            f"post-processing a fresh load sets another {', '.join(sorted(changed.values))} "
            "than the engine serves with"
        )
    return ""


def _objects_differ(made: Finished, live: nn.Module) -> str:
    """Compare the tensors that objects and closures hold on to; empty if they are equal."""
    for key in sorted(made.changes.objects):
        ours = reachable(made.module.__dict__.get(key), 3)
        theirs = reachable(live.__dict__.get(key), 3)
        for a, b in zip_longest(ours, theirs):
            if a is None or b is None or not same_bytes(a, b):
                return f"{key} of a fresh load holds other tensors than the engine's"
    return ""
