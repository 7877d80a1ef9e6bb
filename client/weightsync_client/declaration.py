"""What each rank declares, and the whole that they make together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weightsync.digest import digests
from weightsync.errors import InputError, ManifestError
from weightsync.geometry import Box
from weightsync.manifest import Manifest, TensorSpec
from weightsync_client.converted import ConvertedSource
from weightsync_client.source import WeightSource


@dataclass(frozen=True)
class Declaration:
    """One rank's tensors, and its boxes of each, in the same order."""

    tensors: tuple[TensorSpec, ...]
    boxes: tuple[tuple[Box, ...], ...]

    @classmethod
    def of(cls, source: WeightSource) -> Declaration:
        """What this rank's source declares.

        Raises:
            ManifestError: A name twice, or what is no tensor.
        """
        return cls.made_of(source.manifest(), source.holdings())

    @classmethod
    def made_of(
        cls, tensors: Iterable[TensorSpec], holdings: Mapping[str, tuple[Box, ...]]
    ) -> Declaration:
        """The same of a source's manifest and holdings."""
        tensors = tuple(tensors)
        if tensors:  # a rank may hold nothing; that there is anything at all is asked of the job
            Manifest(tensors)
        return cls(tensors, tuple(tuple(holdings.get(t.name, ())) for t in tensors))

    @property
    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """The boxes by name."""
        return {t.name: boxes for t, boxes in zip(self.tensors, self.boxes, strict=True)}


@dataclass(frozen=True)
class Introduction:
    """What a rank brings to a rendezvous.

    ``copies`` are the digests of the tensors that it has whole: where several ranks have one, those
    must be equal.  ``unmatched`` are rules of its conversion that take nothing here, with names
    that are near.
    """

    declaration: Declaration
    copies: dict[str, bytes]
    unmatched: dict[str, list[str]] = field(default_factory=dict)


def introduce(declaration: Declaration, source: WeightSource, *, alone: bool) -> Introduction:
    """This rank's introduction.

    Args:
        declaration: What it declares.
        source: Where its values are, before any quantisation.
        alone: No other rank could have a copy.
    """
    unmatched = dict(source.unmatched) if isinstance(source, ConvertedSource) else {}
    if alone:
        return Introduction(declaration, {}, unmatched)
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, local in _replicas(declaration, source).items():
        by_device.setdefault(local.device, {})[name] = local.detach()
    copies: dict[str, bytes] = {}
    for tensors in by_device.values():
        flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in tensors.values())
        copies.update(zip(tensors, digests(list(flat)), strict=True))
    return Introduction(declaration, copies, unmatched)


def _replicas(declaration: Declaration, source: WeightSource) -> dict[str, torch.Tensor]:
    if isinstance(source, ConvertedSource):  # what is whole there may be many boxes here
        found = source.replicas()
    else:
        holdings = source.holdings()
        found = {
            spec.name: source.local(spec.name, 0)
            for spec in declaration.tensors
            if tuple(holdings.get(spec.name, ())) == (Box.whole(spec.shape),) and not spec.alias_of
        }
    return {name: local for name, local in found.items() if local.numel()}


def join(ranks: Sequence[Introduction]) -> Manifest:
    """The manifest of the whole job: rank 0's tensors, then what each next rank adds.

    Raises:
        InputError: A rule of the conversion takes nothing on any rank.
        ManifestError: Ranks disagree about a tensor's shape, dtype or values, or there is none.
    """
    _check_rules(ranks)
    specs: dict[str, TensorSpec] = {}
    first: dict[str, int] = {}
    copies: dict[str, tuple[int, bytes]] = {}
    # an alias is one where every rank with elements of it says so: an empty shard cannot tell
    denied = Counter[str]()
    for rank, one in enumerate(ranks):
        for spec, boxes in zip(one.declaration.tensors, one.declaration.boxes, strict=True):
            known = specs.setdefault(spec.name, spec)
            other = first.setdefault(spec.name, rank)
            if (known.shape, known.dtype) != (spec.shape, spec.dtype):
                raise ManifestError(
                    f"{spec.name!r} is {known.dtype} {list(known.shape)} on rank {other} and "
                    f"{spec.dtype} {list(spec.shape)} on rank {rank}",
                    hint="a plain tensor counts as whole: declare shards as DTensor or LocalShard",
                    tensor=spec.name,
                    ranks=[other, rank],
                )
            if spec.alias_of and not known.alias_of:
                specs[spec.name] = spec
            if not spec.alias_of and boxes:
                denied[spec.name] += 1
        for name, digest in one.copies.items():
            other, known_digest = copies.setdefault(name, (rank, digest))
            if known_digest != digest:
                raise ManifestError(
                    f"{name!r} is whole on ranks {other} and {rank}, with different values",
                    hint="replicas must be equal; if each rank has a part of its own (experts, "
                    "say), declare it as DTensor or LocalShard",
                    tensor=name,
                    ranks=[other, rank],
                )
    return Manifest.of(
        TensorSpec(s.name, s.dtype, s.shape) if denied[s.name] else s for s in specs.values()
    )


def _check_rules(ranks: Sequence[Introduction]) -> None:
    unmatched = [r for r in ranks[0].unmatched if all(r in one.unmatched for one in ranks)]
    if unmatched:
        near = {name: None for one in ranks for name in one.unmatched[unmatched[0]]}
        raise InputError(
            f"no tensor of any rank is what the conversion has a {unmatched[0]} for"
            + (f"; nor for: {', '.join(unmatched[1:4])}" if unmatched[1:] else ""),
            hint=(f"the trainer's nearest names: {', '.join(list(near)[:3])}; " if near else "")
            + "a rule that may take nothing is Rule(..., optional=True)",
            rules=unmatched,
        )
