"""A source whose tensors go through a conversion, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from weightsync.errors import InputError, ManifestError
from weightsync.geometry import Box
from weightsync.manifest import TensorSpec
from weightsync_client.boxes import MAX_PIECES, MisfitError
from weightsync_client.conversion import ConversionSpec, Rule
from weightsync_client.held import Held
from weightsync_client.operations import Binding, Groups, Stack

_SHOWN = 4


class _Source(Protocol):
    # WeightSource is defined where conversions are chosen
    def manifest(self) -> Iterable[TensorSpec]: ...
    def holdings(self) -> Mapping[str, tuple[Box, ...]]: ...
    def local(self, name: str, box_index: int) -> torch.Tensor: ...


class ConvertedSource:
    """Another source's tensors under the names and in the shapes that a conversion makes of them.

    Every piece is a view of what the other source's ``local`` gave, which is asked once a box.

    Args:
        source: Its tensors must not be replaced until the push is over.
        spec: The conversion.
        left_out: Names that the trainer has besides, and the conversion leaves out.

    Raises:
        InputError: Tensors or shards that a rule does not fit.
        ManifestError: Two tensors of one name.
    """

    def __init__(
        self, source: _Source, spec: ConversionSpec, *, left_out: Iterable[str] = ()
    ) -> None:
        self._spec = spec
        self._given: dict[str, Held] = {}
        holdings = source.holdings()
        for tensor in source.manifest():
            if tensor.name in self._given:
                raise ManifestError(
                    f"the trainer has {tensor.name!r} twice",
                    hint="every tensor has one name",
                    tensor=tensor.name,
                )
            boxes = holdings.get(tensor.name, ())
            pieces = tuple((box, source.local(tensor.name, k)) for k, box in enumerate(boxes))
            self._given[tensor.name] = Held(tensor.shape, getattr(torch, tensor.dtype), pieces)
        self._made: dict[str, Held] = {}
        self._makers: dict[str, str] = {}
        self._unmatched: dict[str, list[str]] = {}
        self._used: set[str] = set()
        taken, rest = spec.match([*self._given, *left_out])
        for rule, groups in zip(spec.rules, taken.values(), strict=True):
            if not groups and not rule.optional:
                self._unmatched[str(rule)] = rule.near(rest or self._given)
            if rule.make is not None:
                self._used.update(n for names in groups.values() for n in names.values())
                self._run(rule, groups)
        if rest and spec.rest == "refuse":
            more = f" and {len(rest) - _SHOWN} more" if len(rest) > _SHOWN else ""
            raise InputError(
                f"conversion {spec.name!r} has no rule for {', '.join(rest[:_SHOWN])}{more}",
                hint='add one (make=None drops a tensor), or let the rest be: rest="keep"'
                + "".join(
                    f"; nothing here is for {rule}" for rule in list(self._unmatched)[:_SHOWN]
                ),
                names=rest,
            )
        for name in rest if spec.rest == "keep" else ():
            self._used.add(name)
            self._add(name, self._given[name], None, "its own name, which no rule takes")
        self._tensors = self._declare()
        self._holdings = {n: tuple(box for box, _ in h.pieces) for n, h in self._made.items()}

    def manifest(self) -> Sequence[TensorSpec]:
        """The checkpoint tensors, in the order of the rules; behind them what no rule takes."""
        return self._tensors

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """The boxes of each that are here."""
        return self._holdings

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The values of one box: a view."""
        return self._made[name].pieces[box_index][1]

    @property
    def unmatched(self) -> Mapping[str, list[str]]:
        """Rules that are not optional and take nothing here, each with names that are near it.

        Another rank may have what they take; if none has, the push fails.
        """
        return self._unmatched

    def replicas(self) -> dict[str, torch.Tensor]:
        """The other source's tensors that are whole here and are published, by its names."""
        given = ((name, self._given[name]) for name in self._given if name in self._used)
        return {
            name: held.pieces[0][1]
            for name, held in given
            if [box for box, _ in held.pieces] == [Box.whole(held.shape)]
        }

    def maker(self, name: str) -> str:
        """What gave a checkpoint tensor its name."""
        return self._makers.get(name, "another rank's tensors")

    # ------------------------------------------------------------ one rule

    def _run(self, rule: Rule, taken: Mapping[Binding, Mapping[int, str]]) -> None:
        stacked = {step.placeholder for step in rule.steps if isinstance(step, Stack)}
        together: dict[Binding, dict[Binding, Mapping[int, str]]] = {}
        for binding, names in taken.items():
            key = tuple(pair for pair in binding if pair[0] not in stacked)
            together.setdefault(key, {})[binding] = names
        for part in together.values():
            self._run_one(rule, part)

    def _run_one(self, rule: Rule, taken: Mapping[Binding, Mapping[int, str]]) -> None:
        groups: Groups = {}
        for binding, names in taken.items():
            missing = [n for k, n in enumerate(rule.names) if k not in names]
            if missing:
                raise self._misfit(rule, taken, f"there is no {missing[0]!r} that goes with it")
            groups[binding] = [self._given[names[k]] for k in range(len(rule.names))]
        try:
            for step in rule.steps:
                groups = step.apply(groups, len(rule.made))
        except MisfitError as error:
            raise self._misfit(rule, taken, str(error)) from None
        for binding, tensors in groups.items():
            if len(tensors) != len(rule.made):
                why = f"it leaves {len(tensors)} tensors for {len(rule.made)} names"
                raise self._misfit(rule, taken, why)
            for name, held in zip(rule.fill(binding), tensors, strict=True):
                self._add(name, held, rule.dtype, str(rule))

    def _misfit(
        self, rule: Rule, taken: Mapping[Binding, Mapping[int, str]], why: str
    ) -> InputError:
        name = next(iter(next(iter(taken.values())).values()))
        return InputError(
            f"conversion {self._spec.name!r}, {rule}: {why}; {self._tell(name)}",
            hint="change the rule; or, if it is the shards that do not fit, shard another dim, and "
            "declare what is taken together on one rank",
            tensor=name,
        )

    def _tell(self, name: str) -> str:
        held = self._given[name]
        boxes = [box for box, _ in held.pieces]
        where = ", ".join(f"{list(b.lo)}..{list(b.hi)}" for b in boxes[:_SHOWN])
        here = "whole here" if boxes == [Box.whole(held.shape)] else f"of it here: {where or '-'}"
        return f"{name!r} has shape {list(held.shape)}, {here}"

    def _add(self, name: str, held: Held, dtype: torch.dtype | None, maker: str) -> None:
        if name in self._made:
            raise ManifestError(
                f"conversion {self._spec.name!r} makes {name!r} twice: by {self._makers[name]}, "
                f"and by {maker}",
                hint="every checkpoint tensor has one source; make=None drops the other",
                tensor=name,
            )
        if len(held.pieces) > MAX_PIECES:
            raise InputError(
                f"conversion {self._spec.name!r}: this rank's shards of {name!r}, made by {maker}, "
                f"are {len(held.pieces)} boxes, more than {MAX_PIECES}",
                hint="shard what it is made of along another dim",
                tensor=name,
            )
        dtype = self._spec.dtype if dtype is None else dtype
        if dtype is not None and held.dtype.is_floating_point:
            held = replace(held, dtype=dtype)
        self._made[name], self._makers[name] = held, maker

    # ------------------------------------------------------------ the manifest

    def _declare(self) -> tuple[TensorSpec, ...]:
        aliases = {}
        for name, of in self._spec.aliases.items():
            if of in self._made:
                self._add(name, self._made[of], self._made[of].dtype, f"alias of {of}")
                aliases[name] = of
            else:
                near = Rule(of, of).near(self._made)
                self._unmatched[f"alias {name} of {of}"] = near
        first_by_memory: dict[tuple[object, ...], str] = {}
        specs = []
        for name, held in self._made.items():
            memory = held.memory
            first = first_by_memory.setdefault(memory, name) if memory else name
            alias_of = aliases.get(name, "" if first == name else first)
            specs.append(
                TensorSpec(name, str(held.dtype).removeprefix("torch."), held.shape, alias_of)
            )
        return tuple(specs)
