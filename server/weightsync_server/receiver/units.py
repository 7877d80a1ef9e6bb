"""Modules that own kernel tensors, and what was found out about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from weightsync.layout import Mode

_PROBE_NUMEL = 4099  # a prime: no row is as long, so rows differ


@dataclass(slots=True)
class Unit:
    """A module with loaded parameters: its own names for them, and the kernel tensors' names.

    ``derived``: attributes that are tensors which post-processing makes.  ``varying``: those that
    are plain values and depend on the weights.  ``opaque``: it makes objects whose state no tensor
    shows.
    """

    path: str
    params: dict[str, str]
    kind: Literal["direct", "renewed", "staged"] = "direct"
    derived: frozenset[str] = frozenset()
    varying: frozenset[str] = frozenset()
    opaque: bool = False


@dataclass(slots=True)
class Proofs:
    """What was found out about a live model.

    ``units`` in module order; ``refusals`` by kernel tensor; ``proven``: compared with a load.
    """

    units: list[Unit] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    proven: bool = False

    def mode(self, tensor: str) -> Mode:
        """How bytes reach a kernel tensor."""
        if tensor in self.refusals:
            return "refused"
        kinds = {u.kind for u in self.units if tensor in u.params.values()}
        return "staged" if "staged" in kinds or not kinds else "direct"


def settle(units: Sequence[Unit]) -> None:
    """A tensor is staged for all modules that own it; a module is staged with all its tensors."""
    changed = True
    while changed:
        staged = {name for u in units if u.kind == "staged" for name in u.params.values()}
        late = [u for u in units if u.kind != "staged" and staged & set(u.params.values())]
        for unit in late:
            unit.kind = "staged"
        changed = bool(late)


def fill_probe(probe: torch.Tensor, *, negative: bool) -> torch.Tensor:
    """Fill a contiguous tensor so that a reordering, or a number made from it, shows."""
    flat = probe.view(-1)
    if flat.dtype.is_floating_point:
        i = torch.arange(min(_PROBE_NUMEL, flat.numel()), dtype=torch.float32)
        # two incommensurable steps: no two of them are alike at any power-of-two distance
        block = (torch.frac(i * 0.6180339887) - 0.5) * torch.exp2(torch.frac(i * 0.7548776662))
    else:
        block = (torch.arange(min(_PROBE_NUMEL, flat.numel())) * 40503 >> 4) % 2
    if flat.dtype == torch.float8_e8m0fnu:  # a bare exponent: there is no sign
        block = block.abs()
    elif negative and flat.dtype.is_floating_point:
        block = -block
    block = block.to(device=flat.device).to(flat.dtype)
    if flat.numel():
        whole, rest = divmod(flat.numel(), block.numel())
        flat[: whole * block.numel()].view(whole, block.numel()).copy_(block)
        flat[flat.numel() - rest :].copy_(block[:rest])
    return probe
