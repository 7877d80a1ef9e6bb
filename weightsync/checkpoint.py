"""A folder of safetensors, as names, shapes and lazily paged tensors.  Loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weightsync.errors import InputError
from weightsync.manifest import Manifest, TensorSpec

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Checkpoint:
    """Read access to a Hugging Face checkpoint folder.

    Files are mapped, not read: a tensor costs memory only where it is looked at.

    Raises:
        InputError: The folder holds no readable safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                files = [folder / name for name in names]
            else:
                files = sorted(folder.glob("*.safetensors"))
            if not files:
                there = f"no safetensors in {folder}" if folder.is_dir() else f"no folder {folder}"
                raise InputError(there, hint="name the folder of a Hugging Face model")
            self._where: dict[str, Any] = {}
            for file in files:
                handle = safe_open(file, framework="pt", device="cpu")
                self._where.update(dict.fromkeys(handle.keys(), handle))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(
                f"the checkpoint in {folder} cannot be read: {error}",
                hint="is it whole? save or copy it again",
            ) from error

    def manifest(self) -> Manifest:
        """Names, dtypes and shapes, in the order of the files.

        Raises:
            InputError: A tensor has a dtype that weightsync does not know.
        """
        specs = []
        for name, handle in self._where.items():
            part = handle.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise InputError(
                    f"{name} in {self.folder} is {part.get_dtype()}, which weightsync cannot move",
                    hint=f"it moves {', '.join(_DTYPES)}",
                )
            specs.append(TensorSpec(name, dtype, tuple(part.get_shape())))
        return Manifest.of(specs)

    def flat(self, name: str) -> torch.Tensor:
        """The tensor as one contiguous dimension, on the CPU."""
        return self.tensor(name).reshape(-1)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, on the CPU: a view of the mapped file."""
        return self._where[name].get_tensor(name)  # type: ignore[no-any-return]
