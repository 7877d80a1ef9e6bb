"""One epoch's target: regions in registered memory, who writes them, and what commit must do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weightsync.errors import LayoutError, ManifestError, RefusedError
from weightsync.layout import CopyRecord, KernelRegion, Mode, Scratch, WorkerLayout, WorkerPlace
from weightsync.manifest import Manifest
from weightsync.transport.base import LocalMemory
from weightsync_server.receiver.coverage import complement, intervals, last_write_wins, within
from weightsync_server.receiver.kernel import flat_bytes, tensor_at, view
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.regions import TracedCopy
from weightsync_server.receiver.shadow import Shadow
from weightsync_server.receiver.tracer import Trace
from weightsync_server.receiver.units import Proofs

Copies = dict[str, list[TracedCopy]]
_FLOAT8 = "float8"
#: enough to tell a fast wire from a slow one in a millisecond
SCRATCH_NBYTES = 4 << 20


def copies_by_tensor(trace: Trace) -> Copies:
    """A trace's copies by kernel tensor, without those that a later one overwrites."""
    found: Copies = {}
    for c in trace.copies:
        found.setdefault(c.param, []).append(c)
    return {name: last_write_wins(list_) for name, list_ in found.items()}


def _castable(dtype: torch.dtype) -> bool:
    """Whether a number of this dtype means the same in another: no code, no scaled value."""
    return dtype.is_floating_point and _FLOAT8 not in str(dtype)


def _memory(prover: Prover, proofs: Proofs, name: str, device: torch.device | None) -> torch.Tensor:
    """The live tensor where it can be written directly, else a buffer in load format."""
    if proofs.mode(name) != "direct":
        return prover.empty(name, device)
    live = tensor_at(prover.adapter.live, name)
    if live is None:
        raise LayoutError(
            f"kernel tensor {name} is gone from the live engine",
            hint="attach to the engine again",
            tensor=name,
        )
    return live.data


class Target:
    """Where one epoch's bytes land.

    Args:
        place: The worker's place.
        prover: Knows the load format.
        trace: The load of the trainer's manifest.
        proofs: How bytes may reach each kernel tensor.
        manifest: The trainer's manifest.
        reference: The load of the engine's own checkpoint, where there is one: what it leaves
            alone may stay untouched.
        shadow_of: Makes the shadow of live tensors, or of some of them; None: there is none.
        device: Where buffers lie; None: where the engine's weights do.

    Attributes:
        memory: By kernel tensor: the live tensor, or the buffer that is installed from.
        landing: The same where the writes land: a shadow, where there is one.
        copies: By kernel tensor, what the loader copies into it.
        layout: What the trainer is told.

    Raises:
        ManifestError: Tensors are missing, or a dtype cannot be cast to the engine's.
        RefusedError: A tensor of the manifest lands in one that was refused.
        HeadroomError: See :class:`weightsync_server.receiver.shadow.Shadow`.
    """

    def __init__(
        self,
        place: WorkerPlace,
        prover: Prover,
        trace: Trace,
        proofs: Proofs,
        manifest: Manifest,
        reference: Copies | None,
        *,
        shadow_of: Callable[[dict[str, torch.Tensor]], Shadow] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.copies = copies_by_tensor(trace)
        known = {name for unit in proofs.units for name in unit.params.values()}
        unknown = "the engine's own checkpoint loads nothing into it, so nothing is proven"
        refused = dict.fromkeys(self.copies.keys() - known, unknown)
        refused |= {n: r for n, r in proofs.refusals.items() if n in self.copies}
        if refused:
            names = sorted(refused)
            raise RefusedError(
                f"{len(refused)} kernel tensors of {place} are refused: "
                + "; ".join(f"{n}: {refused[n]}" for n in names[:4]),
                hint="they cannot be written safely; the engine keeps its weights",
                refusals=[{"tensor": n, "reason": refused[n]} for n in names],
            )
        self._check_dtypes(prover, manifest)
        untouched = self._untouched(prover, trace, manifest, reference)
        self.memory = {name: _memory(prover, proofs, name, device) for name in self.copies}
        self.staged = {n for n in self.memory if proofs.mode(n) != "direct"}
        self.landing = dict(self.memory)
        self._flat: dict[tuple[int, bool], torch.Tensor] = {}
        self._slab: LocalMemory | None = None
        if shadow_of is not None:
            shadow = shadow_of({n: t for n, t in self.memory.items() if n not in self.staged})
            self.landing |= shadow.memory
            self._slab = shadow.slab.memory
            for name in shadow.memory:
                shadow.take_over(name, untouched[name])
        regions, records = [], []
        for index, name in enumerate(self.copies):
            like, memory = prover.load_format(name), self.landing[name]
            mode: Mode = "shadow" if memory is not self.memory[name] else "direct"
            regions.append(
                KernelRegion(
                    name=name,
                    dtype=str(like.dtype).removeprefix("torch."),
                    shape=tuple(like.shape),
                    nbytes=memory.numel() * memory.element_size(),
                    mode="staged" if name in self.staged else mode,
                    addr=memory.data_ptr(),
                    kind="VRAM" if memory.is_cuda else "DRAM",
                    device_id=memory.device.index or 0 if memory.is_cuda else 0,
                    untouched=untouched[name],
                )
            )
            records += [
                CopyRecord(
                    c.tensor, c.src.shape, c.src.offset, c.src.strides,
                    index, c.dst.offset, c.dst.strides,
                )
                for c in self.copies[name]
            ]  # fmt: skip
        # a tensor that a later one overwrites whole is dropped, too (tied names, last write wins)
        used = {r.tensor for r in records}
        skipped = tuple(t.name for t in manifest if t.name not in used and t.numel)
        self.scratch = torch.zeros(SCRATCH_NBYTES, dtype=torch.uint8, device=prover.adapter.device)
        at = self.scratch_memory()
        scratch = Scratch(at.addr, at.nbytes, at.kind, at.device_id)
        self.layout = WorkerLayout(place, tuple(regions), tuple(records), skipped, scratch)

    def buffers(self) -> list[torch.Tensor]:
        """What staged tensors are installed from."""
        return [self.memory[name] for name in self.staged]

    def scratch_memory(self) -> LocalMemory:
        """Where probes go."""
        on_gpu = self.scratch.is_cuda
        return LocalMemory(
            self.scratch.data_ptr(),
            self.scratch.numel(),
            "VRAM" if on_gpu else "DRAM",
            (self.scratch.device.index or 0) if on_gpu else 0,
        )

    def _check_dtypes(self, prover: Prover, manifest: Manifest) -> None:
        for name, copies in self.copies.items():
            want = prover.load_format(name).dtype
            for tensor in {c.tensor for c in copies}:
                got = getattr(torch, manifest.by_name[tensor].dtype)
                if got != want and not (_castable(got) and _castable(want)):
                    raise ManifestError(
                        f"{tensor} is {got}, and the engine keeps it as {want} in {name}",
                        hint="a plain cast would be wrong here: publish it as the engine's "
                        "checkpoint has it",
                        tensor=tensor,
                    )

    def _untouched(
        self, prover: Prover, trace: Trace, manifest: Manifest, reference: Copies | None
    ) -> dict[str, tuple[tuple[int, int], ...]]:
        """Byte intervals of each region that this load leaves alone, all accounted for."""
        found: dict[str, tuple[tuple[int, int], ...]] = {}
        missing: dict[str, list[tuple[int, int]]] = {}
        expected = (
            reference.keys()
            if reference is not None
            else {n for n, p in prover.twin.named_parameters() if p.numel()}
            - prover.adapter.optional(prover.twin)
        )
        filled = {n: [r for m, r in trace.fills if m == n] for n in expected | self.copies.keys()}
        for name in sorted(expected - self.copies.keys()):
            everything = [(0, prover.load_format(name).numel())]
            # what the engine's checkpoint loads, a constant does not replace
            if reference is not None or not within(everything, intervals(filled[name])):
                missing[name] = everything
        for name, copies in self.copies.items():
            like = prover.load_format(name)
            gaps = complement(intervals(c.dst for c in copies), like.numel())
            size = like.element_size()
            found[name] = tuple((a * size, b * size) for a, b in gaps)
            if reference is not None and name in reference:
                known = complement(intervals(c.dst for c in reference[name]), like.numel())
                if gaps != known:
                    missing[name] = gaps
            elif gaps and not within(gaps, intervals(filled[name])):
                missing[name] = gaps
        if missing:
            names = sorted(
                {c.tensor for n in missing for c in (reference or {}).get(n, ())}
                - {t.name for t in manifest}
            )
            what = (
                f"checkpoint tensors are missing: {', '.join(names[:8])}"
                if names
                else f"nothing is loaded into {', '.join(sorted(missing)[:8])}"
            )
            raise ManifestError(
                f"{what}{' ...' if max(len(names), len(missing)) > 8 else ''}",
                hint="publish every tensor that a checkpoint for this engine holds",
                missing=names,
                kernel_tensors=sorted(missing),
            )
        return found

    def local_memory(self) -> list[LocalMemory]:
        """What has to be registered: the scratch, every region, those in the shadow as one."""
        apart = [
            LocalMemory(r.addr, r.nbytes, r.kind, r.device_id)
            for r in self.layout.regions
            if r.nbytes and (r.mode != "shadow" or self._slab is None)
        ]
        apart.append(self.scratch_memory())
        return apart if self._slab is None else [*apart, self._slab]

    def piece(self, region: int, offset: int, nbytes: int, *, shadow: bool = True) -> torch.Tensor:
        """Bytes of a region, as flat uint8 in place; not ``shadow``: of what serves instead."""
        flat = self._flat.get((region, shadow))
        if flat is None:
            name = self.layout.regions[region].name
            flat = flat_bytes(self.landing[name] if shadow else self.memory[name])
            self._flat[region, shadow] = flat
        return flat[offset : offset + nbytes]

    def rebuild(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Checkpoint tensors, flat on the CPU, from the regions: parts that land nowhere are 0.

        The inverse of the writes; it exists where nothing else holds the weights (WS-11).
        """
        made: dict[str, torch.Tensor] = {
            t.name: torch.zeros(t.numel, dtype=getattr(torch, t.dtype)) for t in manifest
        }
        for name, copies in self.copies.items():
            flat = self.memory[name].reshape(-1).cpu()
            for c in copies:
                source = view(flat, c.dst)
                drop = tuple(
                    0 if stride == 0 and size > 1 else slice(None)
                    for size, stride in zip(c.src.shape, c.src.strides, strict=True)
                )
                target = view(made[c.tensor], c.src)
                target[drop].copy_(source[drop])
        return made
