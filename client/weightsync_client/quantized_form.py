"""What of a source is published as fp8 blocks: the same in every push of a source of that form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from weightsync.errors import ManifestError
from weightsync.geometry import Box
from weightsync.manifest import TensorSpec
from weightsync.quantize import BLOCK, touched_blocks
from weightsync_client.borders import cut_blocks
from weightsync_client.declaration import Declaration
from weightsync_client.quantization import QuantizationSpec

#: a box: its tensor's name and its place among that tensor's boxes
Key = tuple[str, int]


class BoxForm(NamedTuple):
    """What boxes of one launch have in common; ``cut``: some blocks are not all in the box."""

    shape: tuple[int, ...]
    lead: tuple[int, int]
    cut: bool


class QuantizedForm:
    """Which tensors become fp8, what is declared, and how boxes are alike.  No value is looked at.

    A block's scale is declared by who has its first value.

    Args:
        tensors: That the source knows of.
        holdings: Its boxes of each.
        spec: Selects.

    Attributes:
        chosen: The source's tensors that are quantised, by name.
        declaration: What is published: behind each tensor that is quantised, its scales.
        holdings: Boxes of values as the source has them, and of scales.
        keys: Boxes to quantise, by their form.
        places: Of each of those, its form, and its place in ``keys``.
        boxes: Where each lies in its tensor.
        parts: Of each tensor of scales and each of its boxes, which part of which box it is of.
        cut_nbytes: Values in boxes with cut blocks, as bytes of bfloat16.
        unmatched: Patterns of ``spec`` that take nothing here, with names that are near.

    Raises:
        ManifestError: There is a tensor of the name that a scale would get.
    """

    def __init__(
        self,
        tensors: Iterable[TensorSpec],
        holdings: Mapping[str, tuple[Box, ...]],
        spec: QuantizationSpec,
    ) -> None:
        given = tuple(tensors)
        chosen = spec.select(given)
        self.chosen = {t.name: t for t in given if t.name in chosen}
        self.holdings = dict(holdings)
        self.keys: dict[BoxForm, list[Key]] = {}
        self.places: dict[Key, tuple[BoxForm, int]] = {}
        self.boxes: dict[Key, Box] = {}
        self.parts: dict[str, list[tuple[Key, tuple[slice, slice]]]] = {}
        if taken := sorted({f"{name}_scale_inv" for name in chosen} & {t.name for t in given}):
            raise ManifestError(
                f"{taken[0]!r} is there already, and its weight would be quantised",
                hint="exclude that weight, or push without the scales",
                tensor=taken[0],
            )
        published: list[TensorSpec] = []
        for t in given:
            published += self._published(t)
        self.declaration = Declaration.made_of(published, self.holdings)
        self.cut_nbytes = 2 * sum(b.numel for k, b in self.boxes.items() if self.places[k][0].cut)
        self.unmatched = spec.unmatched(given)

    def _published(self, tensor: TensorSpec) -> Iterable[TensorSpec]:
        name, alias = tensor.name, tensor.alias_of
        if name not in self.chosen:
            alias = "" if alias in self.chosen else alias
            return (TensorSpec(name, tensor.dtype, tensor.shape, alias),)
        alias = alias if alias in self.chosen else ""
        grid = tuple(-(-n // BLOCK) for n in tensor.shape)
        scales = f"{name}_scale_inv"
        parts = self.parts[scales] = []
        owned = []
        for index, box in enumerate(self.holdings.get(name, ())):
            key = name, index
            form = BoxForm(box.shape, _lead(box), bool(cut_blocks(tensor.shape, box).any()))
            of_form = self.keys.setdefault(form, [])
            self.boxes[key], self.places[key] = box, (form, len(of_form))
            of_form.append(key)
            mine = _owned(box)
            if mine.numel:
                first = tuple(s.start for s in touched_blocks(box.shape, box.lo))
                rows, cols = (
                    slice(a - start, b - start)
                    for a, b, start in zip(mine.lo, mine.hi, first, strict=True)
                )
                parts.append((key, (rows, cols)))
                owned.append(mine)
        self.holdings[scales] = tuple(owned)
        return (
            TensorSpec(name, "float8_e4m3fn", tensor.shape, alias),
            TensorSpec(scales, "float32", grid, f"{alias}_scale_inv" if alias else ""),
        )


def _lead(box: Box) -> tuple[int, int]:
    return box.lo[0] % BLOCK, box.lo[1] % BLOCK


def _owned(box: Box) -> Box:
    """The blocks whose first value is in a box: shards of a tensor share its blocks out."""
    return Box(tuple(-(-n // BLOCK) for n in box.lo), tuple(-(-n // BLOCK) for n in box.hi))
