"""Where a push takes its weights from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import nn

from weightsync.errors import InputError
from weightsync.geometry import Box
from weightsync.manifest import TensorSpec
from weightsync_client.conversion import ConversionSpec
from weightsync_client.conversions import conversion_of, find_conversion
from weightsync_client.converted import ConvertedSource
from weightsync_client.held import Held, LocalShard, hold
from weightsync_client.hf import checkpoint_tensors

#: a whole tensor, a DTensor, or a part of a tensor
Tensor: TypeAlias = "torch.Tensor | LocalShard"


@runtime_checkable
class WeightSource(Protocol):
    """One rank's weights, as checkpoint tensors.

    The publisher asks ``manifest`` and ``holdings`` once a push, and ``local`` for every box that
    it sends; nothing may change the weights until ``push`` has returned.
    """

    def manifest(self) -> Iterable[TensorSpec]:
        """The checkpoint tensors that this rank knows of, with the shapes that they have whole.

        The job's manifest is what all ranks know of, rank 0's first.
        """

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """The boxes of each checkpoint tensor that this rank holds."""

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The values of ``holdings()[name][box_index]``, in that box's shape.

        Any dtype, strides and device; no copy where it can be helped.  A dtype that differs from
        the manifest's is cast to it first (WS-12).
        """


class StateDictSource:
    """Checkpoint names and tensors: plain ones, DTensors in any placement, or LocalShards.

    In a distributed job every rank makes one of what it has.  A plain tensor counts as whole: ranks
    that hold the same share the work, and a name that only some ranks have (a pipeline stage) is
    sent by those.  Entries that are the same memory seen the same way (tied weights) become aliases
    of the first.

    Args:
        tensors: Name to tensor, or pairs of them; views and any strides are fine.
        dtype: Checkpoint dtype of every floating tensor, where it is not the tensors' own: fp32
            masters of a bf16 checkpoint are rounded to bf16 before anything else (WS-12).

    Raises:
        InputError: An entry is no dense tensor, or does not say which values it has.
        ManifestError: An element type that does not travel.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        named = tensors.items() if isinstance(tensors, Mapping) else tensors
        self._take(((name, hold(name, tensor)) for name, tensor in _pairs(named)), dtype)

    def _take(self, held: Iterable[tuple[str, Held]], dtype: torch.dtype | None) -> None:
        self._held: dict[str, Held] = {}
        first_by_memory: dict[tuple[object, ...], str] = {}
        specs = []
        for name, part in held:
            self._held[name] = part
            made = part.dtype if dtype is None or not part.dtype.is_floating_point else dtype
            memory = part.memory
            first = first_by_memory.setdefault(memory, name) if memory else name
            alias_of = "" if first == name else first
            specs.append(TensorSpec(name, dtype_name(made), part.shape, alias_of))
        self._manifest = tuple(specs)

    def manifest(self) -> Sequence[TensorSpec]:
        """One tensor an entry, in their order."""
        return self._manifest

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """The boxes of every entry that are here."""
        return {name: tuple(box for box, _ in part.pieces) for name, part in self._held.items()}

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The values of one box: a view."""
        return self._held[name].pieces[box_index][1]


class ModuleSource(StateDictSource):
    """An ``nn.Module``, plain or sharded: parameters and persistent buffers by their names.

    The names are ``state_dict``'s, less what ``torch.compile`` and ``DistributedDataParallel`` put
    in front; for a transformers model they are those of the checkpoint that it saves.  Nothing is
    left out: what the engine has no use for is named by the error of the push, and can then be
    ignored by pattern.

    Args:
        module: The model; it is read anew in every push, so its parameters may be replaced.
        dtype: As :class:`StateDictSource` has it.

    Raises:
        InputError, ManifestError: As :class:`StateDictSource`.
    """

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        module, tensors = named_tensors(module)
        self._take(checkpoint_tensors(module, tensors).items(), dtype)


#: what ``Publisher.push`` takes
Weights: TypeAlias = (
    "nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | WeightSource"
)


#: what ``Publisher`` takes; the texts are ``auto`` and the names of registered conversions
Conversion: TypeAlias = "ConversionSpec | str | None"


def as_source(model: Weights, conversion: Conversion = "auto") -> WeightSource:
    """What ``Publisher.push`` was handed, as a source.  An iterator is read to its end.

    Args:
        model: The weights.
        conversion: See :class:`weightsync_client.publisher.Publisher`.

    Raises:
        InputError: It is nothing that weights can be taken from, or the conversion does not fit.
    """
    spec = as_spec(conversion)
    if spec == "auto" and isinstance(model, nn.Module):
        module, tensors = named_tensors(model)
        spec = conversion_of(module)
        if spec is None:
            return ModuleSource(model)
        return _converted(tensors, spec)
    if not isinstance(spec, ConversionSpec):
        return model if isinstance(model, WeightSource) else StateDictSource(_named(model))
    if isinstance(model, WeightSource):
        return ConvertedSource(model, spec)
    return _converted(_named(model), spec)


def as_spec(conversion: Conversion) -> ConversionSpec | Literal["auto"] | None:
    """A conversion by its name; what is none is handed back.

    Raises:
        InputError: No conversion, or not the name of one.
    """
    if conversion is None or isinstance(conversion, ConversionSpec):
        return conversion
    if conversion == "auto":
        return "auto"
    if not isinstance(conversion, str):
        raise InputError(
            f"a {type(conversion).__name__} is no conversion",
            hint='"auto", None, a ConversionSpec, or the name of one that is registered',
        )
    return find_conversion(conversion)


def _converted(
    named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], spec: ConversionSpec
) -> ConvertedSource:
    """What is left out is not looked at: state dicts also have what is no tensor."""
    every = _pairs(named.items() if isinstance(named, Mapping) else named)
    pairs = cast("list[tuple[str, Tensor]]", list(every))  # StateDictSource looks at what is kept
    left_out = spec.left_out(name for name, _ in pairs)
    kept = StateDictSource([pair for pair in pairs if pair[0] not in left_out])
    return ConvertedSource(kept, spec, left_out=left_out)


def _named(
    model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]:
    if isinstance(model, nn.Module):
        return named_tensors(model)[1]
    if isinstance(model, Mapping) or (isinstance(model, Iterable) and not isinstance(model, str)):
        return model
    raise InputError(
        f"cannot take weights from a {type(model).__name__}",
        hint="push an nn.Module, a mapping of names to tensors, pairs of them, or a WeightSource",
    )


def named_tensors(module: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module itself, and its state dict without what wrappers put in front of the names."""
    module = unwrapped(module)
    return module, {n.replace("_orig_mod.", ""): t for n, t in module.state_dict().items()}


def unwrapped(module: nn.Module) -> nn.Module:
    """What ``DistributedDataParallel`` and ``torch.compile`` were given."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    found: nn.Module = getattr(module, "_orig_mod", module)
    return found


def _pairs(named: Iterable[object]) -> Iterator[tuple[str, object]]:
    for entry in named:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise InputError(
                f"expected pairs of a name and a tensor, got a {type(entry).__name__}",
                hint="push model.named_parameters(), or yield (name, tensor)",
            )
        yield entry


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
