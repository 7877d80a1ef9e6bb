"""SHA-256 of what a model serves with, to compare two engines."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from weightsync.errors import LayoutError
from weightsync_server.receiver.kernel import flat_bytes, own_tensors
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.units import Proofs

_COLUMNS = 1024


def checksums(prover: Prover, proofs: Proofs | None) -> dict[str, str]:
    """Digests of every final kernel tensor; of opaque weights, of what they compute.

    Args:
        prover: Of the live model.
        proofs: What is known of its modules; None: every one that could own a weight is looked at.

    Raises:
        LayoutError: A weight was emptied by post-processing and cannot be read back, so it
            could be anything.
    """
    live = prover.adapter.live
    prover.adapter.synchronize()
    found = {name: _sha256([t]) for name, t in [*live.named_parameters(), *_persistent(live)]}
    for unit in (proofs or prover.guess()).units:
        module = live.get_submodule(unit.path)
        where = f"{unit.path}." if unit.path else ""
        for key in sorted(unit.derived):
            if isinstance(held := module.__dict__.get(key), torch.Tensor):
                found[f"{where}{key} (derived)"] = _sha256([held])
        for leaf, name in unit.params.items():
            numel = prover.load_format(name).numel()
            served = own_tensors(module).get(leaf)
            emptied = numel > 0 and (served is None or not served.numel())
            parts = _read_back(prover, module, leaf, name) if emptied or unit.opaque else None
            if parts is not None:
                found[f"{where}{leaf} (read back)"] = _sha256(parts)
            elif emptied:
                raise LayoutError(
                    f"{where}{leaf} is emptied by post-processing and cannot be read back",
                    hint="its checksum cannot be told: compare what the engine answers",
                    tensor=name,
                )
    return found


def _sha256(parts: list[torch.Tensor]) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(flat_bytes(part).cpu().numpy().data)
    return h.hexdigest()


def _read_back(
    prover: Prover, module: nn.Module, leaf: str, name: str
) -> list[torch.Tensor] | None:
    like = prover.load_format(name)
    if like.ndim != 2:
        return None
    parts: list[torch.Tensor] = []
    for start in range(0, like.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, like.shape[1])
        columns = torch.arange(start, stop, device=prover.adapter.device)
        part = prover.adapter.read_back(module, leaf, columns, like.shape[1])
        if part is None:
            return None
        parts.append(part)
    return parts


def _persistent(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    keys = model.state_dict().keys()
    return [(name, b) for name, b in model.named_buffers() if name in keys]
