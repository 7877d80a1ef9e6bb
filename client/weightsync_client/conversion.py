"""What makes a trainer's tensors checkpoint tensors: rules, and specs of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from weightsync.errors import InputError
from weightsync_client.operations import Binding, Operation, Stack, Unstack

_PLACEHOLDER = re.compile(r"\{(\*?)(\w+)\}")
_CUTOFF = 0.5


@dataclass(frozen=True, slots=True)
class Rule:
    """Which tensors of the trainer make which checkpoint tensors.

    In a name ``{i}`` stands for what has no dot in it, ``{*path}`` for anything; the same
    placeholders in ``make`` get what they stood for.

    Args:
        take: A trainer's name, or several that are taken together.
        make: The checkpoint's name, one for each tensor that the operations leave; None: it is
            no checkpoint tensor, and is dropped.
        operations: What is done with the tensors, in that order.
        dtype: Of the checkpoint tensors, where they are floating and it is not the trainer's own.
        optional: That no rank has such a tensor is no error.

    Raises:
        InputError: Placeholders or operations that do not go together.
    """

    take: str | Sequence[str]
    make: str | Sequence[str] | None
    operations: Operation | Sequence[Operation] = ()
    dtype: torch.dtype | None = None
    optional: bool = False
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    made: tuple[str, ...] = field(init=False, repr=False, compare=False)
    steps: tuple[Operation, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.operations
        steps = tuple(given) if isinstance(given, Sequence) else (given,)
        object.__setattr__(self, "names", _tuple(self.take))
        object.__setattr__(self, "made", () if self.make is None else _tuple(self.make))
        object.__setattr__(self, "steps", steps)
        for name in (*self.names, *self.made):
            if not name or "{" in _PLACEHOLDER.sub("", name) or "}" in _PLACEHOLDER.sub("", name):
                raise InputError(f"{name!r} is no name", hint='"layers.{i}.w1", "{*path}.w1"')
        for step in steps:
            if not isinstance(step, get_args(Operation)):
                raise InputError(f"{step!r} is no operation", hint="Split(0), Unstack('e'), ...")
        if not self.names or (self.make is not None and not self.made):
            raise InputError(f"{self!r} has no names", hint="make=None drops a tensor")
        self._check_placeholders()

    def _check_placeholders(self) -> None:
        taken = _placeholders(self.names[0])
        left = set(taken)
        for step in self.steps:
            if isinstance(step, Stack):
                if step.placeholder not in left:
                    raise InputError(
                        f"{self}: Stack({step.placeholder!r}) has no {{{step.placeholder}}}",
                        hint="stack what a placeholder of the trainer's names counts",
                    )
                left.remove(step.placeholder)
            if isinstance(step, Unstack):
                if step.placeholder in left:
                    raise InputError(
                        f"{self}: {{{step.placeholder}}} is there before Unstack",
                        hint="each placeholder of a rule has a name of its own",
                    )
                left.add(step.placeholder)
        for names, wanted in ((self.names, taken), (self.made, left)):
            for name in names:
                if _placeholders(name) != wanted:
                    raise InputError(
                        f"{self}: {name!r} has the placeholders {sorted(_placeholders(name))}, "
                        f"{sorted(wanted)} are needed",
                        hint="every name of a rule has all of them; Unstack and Stack change them",
                    )

    def __str__(self) -> str:
        made = "nothing" if self.make is None else " + ".join(self.made)
        return f"rule {' + '.join(self.names)} → {made}"

    def fill(self, binding: Binding) -> list[str]:
        """The checkpoint's names for what the placeholders stand for."""
        values = dict(binding)
        return [_PLACEHOLDER.sub(lambda m: values[m[2]], name) for name in self.made]

    def near(self, names: Iterable[str]) -> list[str]:
        """Some of these names that look like those that the rule takes."""
        skeleton = _PLACEHOLDER.sub("0", self.names[0])
        # of a name that may begin with anything, the end is what can be compared
        parts = skeleton.count(".") if self.names[0].startswith("{*") else 0
        ends: dict[str, str] = {}
        for name in names:
            plain = re.sub(r"\d+", "0", name)
            ends.setdefault(".".join(plain.split(".")[-parts:]) if parts else plain, name)
        wanted = ".".join(skeleton.split(".")[-parts:]) if parts else skeleton
        return [ends[end] for end in difflib.get_close_matches(wanted, ends, cutoff=_CUTOFF)]


@dataclass(frozen=True)
class ConversionSpec:
    """How a trainer's tensors become checkpoint tensors.

    A tensor belongs to the first rule that takes its name.  Nothing is gathered and nothing is
    copied: each rank works out which boxes of which checkpoint tensors its shards are.

    Args:
        name: By which ``Publisher(conversion=...)`` finds it once it is registered.
        rules: In the order in which they are tried.
        rest: Tensors that no rule takes ``keep`` their names, are an error (``refuse``), or are
            left out (``drop``).
        aliases: Names under which a checkpoint tensor is published once more: ``{"lm_head.weight":
            "model.embed_tokens.weight"}`` for a trainer that has tied embeddings once.
        dtype: Of all floating checkpoint tensors, as a rule's; a rule's own comes first.

    Raises:
        InputError: It has no name, or a choice that there is not.
    """

    name: str
    rules: Sequence[Rule]
    rest: Literal["keep", "refuse", "drop"] = "keep"
    aliases: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.name or not all(isinstance(rule, Rule) for rule in self.rules):
            raise InputError(
                f"not a conversion: {self!r}", hint="ConversionSpec('mine', [Rule('a', 'b')])"
            )
        if self.rest not in {"keep", "refuse", "drop"}:
            raise InputError(f"rest is {self.rest!r}", hint='"keep", "refuse" or "drop"')

    def match(
        self, names: Iterable[str]
    ) -> tuple[dict[int, dict[Binding, dict[int, str]]], list[str]]:
        """Which tensors each rule takes.

        Returns:
            By the rule's place: by what the placeholders stand for: the tensor for each of the
            rule's names.  And the names that no rule takes.
        """
        patterns = [[_compile(name) for name in rule.names] for rule in self.rules]
        taken: dict[int, dict[Binding, dict[int, str]]] = {k: {} for k in range(len(self.rules))}
        rest = []
        for name in names:
            for k, alternatives in enumerate(patterns):
                found = ((n, p.fullmatch(name)) for n, p in enumerate(alternatives))
                hit = next(((n, m) for n, m in found if m), None)
                if hit:
                    binding = tuple(sorted(hit[1].groupdict().items()))
                    taken[k].setdefault(binding, {})[hit[0]] = name
                    break
            else:
                rest.append(name)
        return taken, rest

    def left_out(self, names: Iterable[str]) -> set[str]:
        """Those of these names that make no checkpoint tensor: what they name may be anything."""
        taken, rest = self.match(names)
        dropped = {
            name
            for k, rule in enumerate(self.rules)
            for group in taken[k].values()
            for name in group.values()
            if rule.make is None
        }
        return dropped.union(rest if self.rest == "drop" else ())


def _tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _placeholders(name: str) -> set[str]:
    return {found[2] for found in _PLACEHOLDER.finditer(name)}


def _compile(name: str) -> re.Pattern[str]:
    out, at, seen = "", 0, set[str]()
    for found in _PLACEHOLDER.finditer(name):
        out += re.escape(name[at : found.start()])
        star, label = found.groups()
        out += f"(?P={label})" if label in seen else f"(?P<{label}>{'.+' if star else '[^.]+'})"
        seen.add(label)
        at = found.end()
    return re.compile(out + re.escape(name[at:]))
