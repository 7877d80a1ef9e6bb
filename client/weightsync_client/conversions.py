"""The conversions that are known by name: those that weightsync brings, and those registered.

It brings some for experts in one parameter, as transformers 5 has them.  A transformers module
needs none of them (its own conversion is looked at); they are for state dicts and for trainers'
own modules with the same names.  Experts that are modules of their own, as in transformers 4, have
the checkpoint's names and pass through.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from weightsync.errors import InputError
from weightsync_client.conversion import ConversionSpec, Rule
from weightsync_client.operations import Split, Unstack


def _fused_experts(
    name: str, inner: str, outer: str, projections: tuple[str, str, str], *others: Rule
) -> ConversionSpec:
    """Experts as transformers 5 has them, [E, 2I, H] and [E, H, I], to one tensor an expert."""
    gate, up, down = (f"{{*at}}.{outer}.experts.{{e}}.{p}.weight" for p in projections)
    fused = f"{{*at}}.{inner}.experts"
    return ConversionSpec(
        name,
        (
            Rule(f"{fused}.gate_up_proj", (gate, up), (Unstack("e"), Split(0)), optional=True),
            Rule(f"{fused}.down_proj", down, Unstack("e"), optional=True),
            *others,
        ),
    )


_SILU = ("gate_proj", "up_proj", "down_proj")
SHIPPED = (
    _fused_experts("qwen3_moe", "mlp", "mlp", _SILU),
    _fused_experts("deepseek_v3", "mlp", "mlp", _SILU),
    _fused_experts("glm4_moe", "mlp", "mlp", _SILU),
    _fused_experts(
        "mixtral",
        "mlp",
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        Rule("{*at}.mlp.gate.weight", "{*at}.block_sparse_moe.gate.weight", optional=True),
    ),
)

_registered: dict[str, ConversionSpec] = {}
_by_architecture: dict[str, str] = {}


def register_conversion(spec: ConversionSpec, *, architectures: Sequence[str] = ()) -> None:
    """Let publishers find a conversion by its name, and by the class of the module pushed.

    Args:
        spec: It.
        architectures: Class names of modules that it is for, ``MyMoEForCausalLM``; it is then used
            for them without being asked for, also in the place of what transformers would do.

    Raises:
        InputError: Another conversion has that name or that architecture.
    """
    architectures = [architectures] if isinstance(architectures, str) else list(architectures)
    if _known().get(spec.name, spec) != spec:
        raise InputError(
            f"another conversion is registered as {spec.name!r}", hint="give it another name"
        )
    for architecture in architectures:
        other = _by_architecture.get(architecture, spec.name)
        if other != spec.name:
            raise InputError(
                f"{architecture} has the conversion {other!r}",
                hint="hand yours to the publisher: Publisher(..., conversion=spec)",
            )
    _registered[spec.name] = spec
    _by_architecture.update(dict.fromkeys(architectures, spec.name))


def find_conversion(name: str) -> ConversionSpec:
    """The conversion that is registered under a name.

    Raises:
        InputError: There is none; the nearest names are told.
    """
    known = _known()
    if name not in known:
        near = difflib.get_close_matches(name, known) or sorted(known)
        raise InputError(
            f"no conversion is registered as {name!r}",
            hint=f"nearest: {', '.join(near)}; register_conversion(spec) adds your own",
        )
    return known[name]


def conversion_of(module: nn.Module) -> ConversionSpec | None:
    """The conversion that is registered for a module's class, or one that it is derived from."""
    classes = (cls.__name__ for cls in type(module).__mro__)  # FSDP2 derives a class of its own
    return next(
        (_registered[_by_architecture[name]] for name in classes if name in _by_architecture), None
    )


def _known() -> dict[str, ConversionSpec]:
    return {spec.name: spec for spec in SHIPPED} | _registered
