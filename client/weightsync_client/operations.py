"""What a conversion does with tensors besides giving them names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

from weightsync.errors import InputError
from weightsync_client import boxes
from weightsync_client.boxes import MisfitError
from weightsync_client.held import Held

#: the placeholders of a name and what they stand for
Binding: TypeAlias = "tuple[tuple[str, str], ...]"
#: tensors on their way from the trainer's names to the checkpoint's
Groups: TypeAlias = "dict[Binding, list[Held]]"


@dataclass(frozen=True, slots=True)
class Split:
    """One tensor becomes several, along a dim.

    Args:
        dim: Of the tensor; negative ones count from the end.
        sizes: Elements of that dim for each; they add up to all of it.  None: equal parts.
        ratio: Instead of sizes: shares, such as (4, 1, 1).
    """

    dim: int
    sizes: tuple[int, ...] = ()
    ratio: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sizes and self.ratio:
            raise InputError("Split has sizes and a ratio", hint="one of them is enough")
        if min((*self.sizes, *self.ratio, 1)) < 1:
            raise InputError(f"Split into {self.sizes or self.ratio}", hint="parts have elements")
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "ratio", tuple(self.ratio))

    def apply(self, groups: Groups, makes: int) -> Groups:
        """Part every tensor; ``makes``: names that the rule gives."""
        return {b: self._parts(_only(tensors, "Split"), makes) for b, tensors in groups.items()}

    def _parts(self, held: Held, makes: int) -> list[Held]:
        dim = _dim(held, self.dim)
        size, shares = held.shape[dim], self.ratio or (1,) * makes
        sizes = self.sizes
        if not sizes:
            if size % sum(shares):
                raise MisfitError(
                    f"dim {dim} has {size} elements, which do not split into {sum(shares)} shares"
                )
            sizes = tuple(size // sum(shares) * share for share in shares)
        if sum(sizes) != size:
            raise MisfitError(
                f"dim {dim} has {size} elements, the sizes {list(sizes)} add up to {sum(sizes)}"
            )
        return boxes.split(held, dim, sizes)


@dataclass(frozen=True, slots=True)
class Concat:
    """The tensors of a rule's names become one, one behind another along a dim."""

    dim: int

    def apply(self, groups: Groups, makes: int) -> Groups:
        """Join every group."""
        return {
            b: [boxes.concat(tensors, _dim(tensors[0], self.dim))] for b, tensors in groups.items()
        }


@dataclass(frozen=True, slots=True)
class Unstack:
    """A tensor becomes one for each index of a dim, which then is a placeholder of the names."""

    placeholder: str
    dim: int = 0

    def apply(self, groups: Groups, makes: int) -> Groups:
        """Take every tensor apart."""
        made: Groups = {}
        for binding, tensors in groups.items():
            dims = [_dim(held, self.dim) for held in tensors]
            counts = {held.shape[dim] for held, dim in zip(tensors, dims, strict=True)}
            if len(counts) > 1:
                raise MisfitError(f"its tensors have {sorted(counts)} indices in dim {self.dim}")
            parts = [boxes.unstack(held, dim) for held, dim in zip(tensors, dims, strict=True)]
            for index, same in enumerate(zip(*parts, strict=True)):
                made[*binding, (self.placeholder, str(index))] = list(same)
        return made


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors whose names differ in a placeholder, a number, become one with a dim for it.

    Args:
        placeholder: It.
        dim: Of the result.
        size: How many there are, for jobs whose ranks have different ones (expert parallelism);
            None: as many as each rank has.
    """

    placeholder: str
    dim: int = 0
    size: int | None = None

    def apply(self, groups: Groups, makes: int) -> Groups:
        """Put those together that differ in the placeholder alone."""
        found: dict[Binding, dict[int, list[Held]]] = {}
        for binding, tensors in groups.items():
            number = dict(binding)[self.placeholder]
            if not number.isdecimal():
                raise MisfitError(f"{{{self.placeholder}}} is {number!r}, which is no number")
            rest = tuple(pair for pair in binding if pair[0] != self.placeholder)
            found.setdefault(rest, {})[int(number)] = tensors
        return {rest: self._join(by_index) for rest, by_index in found.items()}

    def _join(self, by_index: Mapping[int, list[Held]]) -> list[Held]:
        size = len(by_index) if self.size is None else self.size
        if self.size is None and max(by_index) != size - 1:
            raise MisfitError(
                f"there are {size} of them here, the last is number {max(by_index)}: "
                f"give Stack({self.placeholder!r}, size=...) if other ranks have the rest"
            )
        if max(by_index) >= size:
            raise MisfitError(f"number {max(by_index)} is there, and the size is {size}")
        order = sorted(by_index)
        out = []
        for same in zip(*(by_index[k] for k in order), strict=True):
            dim = self.dim + len(same[0].shape) + 1 if self.dim < 0 else self.dim
            out.append(boxes.place_at([boxes.unsqueeze(h, dim) for h in same], dim, order, size))
        return out


@dataclass(frozen=True, slots=True)
class Rearrange:
    """Dims in another order, taken apart or together.

    ``Rearrange("i o -> o i")`` transposes; ``Rearrange("(head pair two) i -> (head two pair) i",
    {"head": 32, "two": 2})`` brings what alternates in a head behind one another.

    Args:
        pattern: Names of the dims before and after; those in brackets are one dim, the last one
            changes fastest.
        sizes: Of the named dims; in each bracket one may be left out.
    """

    pattern: str
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        before, after = self._sides()
        first, then = list(chain(*before)), list(chain(*after))
        if sorted(first) != sorted(then) or len(set(first)) < len(first):
            raise InputError(
                f"Rearrange({self.pattern!r}) has {first} on one side and {then} on the other",
                hint='name every dim once on each side: "i o -> o i"',
            )
        unknown = sorted(set(self.sizes) - set(first))
        if unknown:
            raise InputError(f"Rearrange({self.pattern!r}) has no dim {unknown[0]!r}")
        for group in before:
            free = [name for name in group if name not in self.sizes]
            if len(free) > 1:
                raise InputError(
                    f"Rearrange({self.pattern!r}): sizes of {', '.join(free)} are not known",
                    hint=f"give sizes={{{free[-1]!r}: ...}}: one may be left out in each bracket",
                )

    def apply(self, groups: Groups, makes: int) -> Groups:
        """Every tensor by itself."""
        return {b: [self._one(held) for held in tensors] for b, tensors in groups.items()}

    def _sides(self) -> tuple[list[list[str]], list[list[str]]]:
        sides = self.pattern.split("->")
        dims = r"\s*(?:\w+|\((?:\s*\w+\s*)+\))"
        if len(sides) != 2 or not all(re.fullmatch(rf"(?:{dims})+\s*", side) for side in sides):
            raise InputError(
                f"Rearrange({self.pattern!r}) is no pattern", hint='for example "(a b) c -> c a b"'
            )
        before, after = (
            [group.strip("()").split() for group in re.findall(r"\w+|\([^)]*\)", side)]
            for side in sides
        )
        return before, after

    def _one(self, held: Held) -> Held:
        before, after = self._sides()
        if len(before) != len(held.shape):
            raise MisfitError(f"it has {len(held.shape)} dims, {self.pattern!r} has {len(before)}")
        for dim in range(len(before) - 1, -1, -1):
            if len(before[dim]) > 1 or before[dim][0] in self.sizes:
                held = boxes.unflatten(held, dim, self._sizes(before[dim], held.shape[dim]))
        names = list(chain(*before))
        held = boxes.permute(held, [names.index(name) for name in chain(*after)])
        for dim, group in enumerate(after):
            held = boxes.flatten(held, dim, len(group))
        return held

    def _sizes(self, group: Sequence[str], size: int) -> list[int]:
        known = math.prod(self.sizes.get(name, 1) for name in group)
        free = any(name not in self.sizes for name in group)
        if size % known if free else size != known:
            told = ", ".join(f"{name}={self.sizes.get(name, '?')}" for name in group)
            raise MisfitError(f"a dim of {size} elements is not ({told})")
        return [self.sizes.get(name, size // known) for name in group]


Operation: TypeAlias = Split | Concat | Unstack | Stack | Rearrange


def _only(tensors: Sequence[Held], what: str) -> Held:
    if len(tensors) != 1:
        raise MisfitError(f"{what} is for one tensor, there are {len(tensors)}")
    return tensors[0]


def _dim(held: Held, dim: int) -> int:
    if not -len(held.shape) <= dim < len(held.shape):
        raise MisfitError(f"there is no dim {dim} in {list(held.shape)}")
    return dim % len(held.shape)
