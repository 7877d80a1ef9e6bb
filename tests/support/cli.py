"""Commands of ``weightsync`` in the tests' own process, and folders to hand to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.support.stack import Weights, save
from weightsync_client.cli import app


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        assert self.out.count("\n") == 1, self.out
        return dict(json.loads(self.out))


Run = Callable[..., Ran]


def invoke(*arguments: object, env: dict[str, str] | None = None) -> Ran:
    """A command in this process; an error that it did not expect fails the test."""
    done = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "160", **(env or {})}
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert "Traceback" not in done.output
    return Ran(done.exit_code, done.stdout, done.stderr)


def save_in_two(weights: Weights, like: Path, folder: Path) -> Path:
    """A checkpoint in two files with an index."""
    save({}, like, folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({n: weights[n] for n in some}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, some in files.items() for n in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
