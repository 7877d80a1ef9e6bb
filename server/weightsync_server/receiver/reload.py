"""The weights that an engine was started with, loaded again by its own loader."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weightsync.checkpoint import Checkpoint
from weightsync.errors import EngineError, InputError, NoCheckpointError, RefusedError, VerifyError
from weightsync_server.receiver.attachment import Attachment
from weightsync_server.receiver.install import materialise, transplant
from weightsync_server.receiver.installer import unproven
from weightsync_server.receiver.kernel import tensor_at
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.target import copies_by_tensor
from weightsync_server.receiver.tracer import trace
from weightsync_server.receiver.units import Proofs


def reload(prover: Prover, attachment: Attachment, started: Callable[[], None]) -> None:
    """Load the engine's checkpoint again, put it into the live modules, and compare all bytes.

    The engine is paused (WS-1).  The loader fills host memory, as large as this worker's part of
    the model; from there one module after the other goes through post-processing.

    Args:
        prover: Of its live model.
        attachment: Gets the proofs of what then is live.
        started: Called right before the first live byte changes.

    Raises:
        NoCheckpointError: The engine has none on disk.
        EngineError: It cannot be read.
        RefusedError: A module could not be put back; nothing was changed, as in the two above.
        VerifyError: What is live now is not what the checkpoint holds.
    """
    adapter = prover.adapter
    folder = adapter.checkpoint()
    if folder is None:
        raise NoCheckpointError(
            f"the engine at {adapter.place} has no checkpoint on disk (dummy weights?)",
            hint="push again, all of it; or restart the engine",
        )
    try:
        checkpoint = Checkpoint(folder)
        manifest = checkpoint.manifest()
    except InputError as error:
        raise EngineError(
            error.message, hint="mend the checkpoint, or push again, all of it"
        ) from error
    copies = copies_by_tensor(trace(adapter.new_twin(), adapter.load, manifest))
    proofs = unproven(prover, copies)
    if proofs.refusals:
        raise _refused(RefusedError, "cannot be put back by a reload", proofs)
    twin = adapter.new_twin()
    materialise(twin, lambda t: torch.zeros(t.shape, dtype=t.dtype, device="cpu"))
    adapter.load(twin, ((t.name, checkpoint.flat(t.name).view(t.shape)) for t in manifest))
    adapter.synchronize()
    started()
    for unit in proofs.units:
        loaded = {}
        for name in unit.params.values():
            tensor = tensor_at(twin, name)
            if tensor is not None:
                loaded[name] = tensor.data.to(adapter.device)
        made, live = prover.finished(unit, loaded, "away")
        transplant(live, made, replaceable=adapter.replaceable)
    adapter.refresh()
    adapter.synchronize()
    found = prover.prove(copies, checkpoint.flat, full=True)
    if found.refusals:
        raise _refused(VerifyError, "are not what the checkpoint holds after a reload", found)
    attachment.accept(copies, found)


def _refused(
    kind: type[RefusedError | VerifyError], what: str, proofs: Proofs
) -> RefusedError | VerifyError:
    names = sorted(proofs.refusals)
    return kind(
        f"{len(names)} kernel tensors {what}: "
        + "; ".join(f"{n}: {proofs.refusals[n]}" for n in names[:4]),
        hint="push again, all of it; or restart the engine",
        refusals=[{"tensor": n, "reason": proofs.refusals[n]} for n in names],
    )
