"""Reading a Hugging Face ``config.json``: every value is checked, every error says which one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsync.errors import InputError


class ModelConfig:
    """The values of a config.

    Args:
        values: The parsed JSON object.
        where: What to call it in errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "the model config") -> None:
        self.values = values
        self.where = where

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a config file.

        Raises:
            InputError: There is no such file, or it holds no JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as a model config: {error}",
                hint="name the config.json of a Hugging Face model",
            ) from error
        if not isinstance(values, dict):
            raise InputError(
                f"{path} holds no JSON object", hint="name the config.json of a Hugging Face model"
            )
        return cls(values, str(path))

    def size(self, key: str, default: int | None = None) -> int:
        """A positive number; ``default`` where the key is missing or null.

        Raises:
            InputError: It is missing with no default, or no positive integer.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(
                f"{self.where}: {key} is {value!r}, a positive integer is needed",
                hint="is this the config.json that the engine loads?",
                key=key,
            )
        return value

    def count(self, key: str) -> int:
        """A number that may be 0, and is where the key is missing or null.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(key)
        return 0 if value is None or value == 0 else self.size(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A truth value; ``default`` where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def text(self, key: str, default: str) -> str:
        """A string; ``default`` where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else str(value)
