"""Which checkpoint tensors an engine has as fp8 blocks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from typing import Any

from weightsync.errors import InputError
from weightsync.manifest import TensorSpec

#: rows and columns of a block
BLOCK = (128, 128)
#: matrices that fp8 checkpoints keep as they are: embeddings, output heads, routers, and
#: DeepSeek's projection of a predicted token
KEPT = ("*embed*", "*lm_head*", "*gate.weight", "*router*", "*eh_proj*")

_SOURCES = {"bfloat16", "float16", "float32"}
_LISTS = ("modules_to_not_convert", "ignored_layers")


@dataclass(frozen=True, slots=True)
class QuantizationSpec:
    """Publish matrices as float8_e4m3fn with a float32 scale for every block of 128×128.

    ``X.weight`` [M, N] is published as ``X.weight`` (float8_e4m3fn [M, N]) and
    ``X.weight_scale_inv`` (float32 [ceil(M / 128), ceil(N / 128)]), of the values rounded to
    bfloat16 (WS-12).  Matrices are two-dimensional tensors of float32, bfloat16 or float16 named
    ``*.weight``, after the source's own conversion: fused experts count as one matrix an expert.

    Args:
        include: Shell patterns of matrices to quantise; none: all but :data:`KEPT`.
        exclude: Shell patterns of matrices that stay as they are.
        keep_modules: Modules whose matrices stay, with all below them: ``lm_head`` or the end of a
            path, ``mlp.gate``.  The trainer need not have them.

    A pattern of ``include`` or ``exclude`` that no rank has a matrix for is an error of the push.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "keep_modules"):
            given = getattr(self, field)
            if isinstance(given, str) or not all(isinstance(p, str) and p for p in given):
                raise InputError(
                    f"{field} is {given!r}, a list of names is needed", hint="('*.q_proj.weight',)"
                )
            object.__setattr__(self, field, tuple(given))

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> QuantizationSpec:
        """What a checkpoint's ``config.json`` says.

        Args:
            config: The file's object, or its ``quantization_config``.
            include: As in the class.
            exclude: Likewise.

        Raises:
            InputError: It says nothing of fp8, or another kind than e4m3 in blocks of 128×128 with
                float32 scales.
        """
        given = config.get("quantization_config", config)
        given = given if isinstance(given, Mapping) else {}
        wrong = [
            f"{key} is {given.get(key, 'not set')!r}, not {want!r}"
            for key, want, allowed in (
                ("quant_method", "fp8", {"fp8"}),
                ("weight_block_size", list(BLOCK), {BLOCK}),
                ("fmt", "e4m3", {"e4m3", "float8_e4m3fn", None}),
                ("activation_scheme", "dynamic", {"dynamic", None}),
                ("scale_fmt", "float32", {"float", "float32", None}),
            )
            if _plain(given.get(key)) not in allowed
        ]
        if wrong:
            raise InputError(
                f"this quantization_config cannot be published for: {'; '.join(wrong)}",
                hint="hand over the config.json of a checkpoint with quant_method fp8, e4m3 in "
                "blocks of 128×128",
            )
        keep = [module for key in _LISTS for module in given.get(key) or ()]
        return cls(tuple(include), tuple(exclude), tuple(keep))

    def select(self, tensors: Iterable[TensorSpec]) -> frozenset[str]:
        """Names of those of a rank's tensors that are quantised."""
        chosen = _matcher(self.include) if self.include else None
        stays = _matcher(self.exclude if self.include else (*self.exclude, *KEPT))
        keeps = _below(self.keep_modules)
        return frozenset(
            t.name
            for t in tensors
            if _is_matrix(t)
            and (chosen is None or chosen.match(t.name))
            and not stays.match(t.name)
            and not keeps.search(t.name)
        )

    def unmatched(self, tensors: Iterable[TensorSpec]) -> dict[str, list[str]]:
        """Patterns that none of these matrices has a name for, each with near names."""
        names = [t.name for t in tensors if _is_matrix(t)]
        return {
            pattern: _near(pattern, names)
            for pattern in (*self.include, *self.exclude)
            if not any(fnmatchcase(name, pattern) for name in names)
        }


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _is_matrix(tensor: TensorSpec) -> bool:
    return len(tensor.shape) == 2 and tensor.dtype in _SOURCES and tensor.name.endswith(".weight")


def _matcher(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(p) for p in patterns) or r"(?!)")


def _below(modules: Sequence[str]) -> re.Pattern[str]:
    paths = "|".join(re.escape(module) for module in modules)
    return re.compile(rf"(?:^|\.)(?:{paths})\." if paths else r"(?!)")


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Ends of names, as long as the pattern, that look like it."""
    parts = pattern.count(".") + 1
    ends = {".".join(name.split(".")[-parts:]) for name in names}
    return difflib.get_close_matches(pattern, sorted(ends), cutoff=0.5)
