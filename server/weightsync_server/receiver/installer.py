"""Turn what lies in staging memory, or in live load format, into what the engine computes with."""

from __future__ import annotations

import torch

from weightsync.errors import LayoutError
from weightsync.manifest import Manifest
from weightsync_server.receiver.install import Given, materialise, transplant
from weightsync_server.receiver.kernel import same_bytes, tensor_at
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.target import Copies, Target
from weightsync_server.receiver.units import Proofs, Unit


def unproven(prover: Prover, copies: Copies) -> Proofs:
    """What can be done where nothing was proven: everything is staged."""
    proofs = prover.guess(copies)
    for unit in proofs.units:
        unit.kind = "staged"
    return proofs


def install(prover: Prover, target: Target, proofs: Proofs) -> None:
    """Post-process what was written, and put the result into the live modules."""
    adapter = prover.adapter
    for unit in proofs.units:
        if unit.kind == "renewed":
            renew(prover, unit)
        elif unit.kind == "staged":
            staged = {n: target.memory[n].to(adapter.device) for n in unit.params.values()}
            made, live = prover.finished(unit, staged, "copy")
            transplant(live, made, replaceable=adapter.replaceable)


def renew(prover: Prover, unit: Unit) -> None:
    """Make again what stands beside a unit's live tensors."""
    adapter = prover.adapter
    live_tensors: dict[str, torch.Tensor] = {}
    for name in unit.params.values():
        live = tensor_at(adapter.live, name)
        if live is None:
            raise LayoutError(
                f"kernel tensor {name} is gone from the live engine",
                hint="attach to the engine again",
                tensor=name,
            )
        live_tensors[name] = live.data
    # finishing leaves the live memory alone, and may go on referring to it
    given: Given = "share"
    made, module = prover.finished(unit, live_tensors, given)
    transplant(module, made, replaceable=adapter.replaceable)


def load_apart(prover: Prover, target: Target, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Nothing was proven: load what was written with the engine's own loader, beside the engine.

    Returns:
        The checkpoint tensors, flat, to prove the live tensors by.

    Raises:
        LayoutError: The loader does not do what its trace says; the engine keeps its weights.
    """
    adapter = prover.adapter
    rebuilt = target.rebuild(manifest)
    twin = adapter.new_twin()
    materialise(twin, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=adapter.device))
    adapter.load(twin, [(t.name, rebuilt[t.name].reshape(t.shape)) for t in manifest])
    for name, staged in target.memory.items():
        loaded = tensor_at(twin, name)
        if loaded is None or not same_bytes(loaded, staged.to(loaded.device)):
            raise LayoutError(
                f"the engine's loader makes another {name} than its trace predicted",
                hint="this model cannot be pushed; the engine keeps its weights",
                tensor=name,
            )
    return rebuilt
