"""What a ``with`` block closes at its end."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Closing(abc.ABC):
    """A context manager that ends with ``close``, whatever happened in its block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything.  Safe to call twice; never hides an earlier error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
