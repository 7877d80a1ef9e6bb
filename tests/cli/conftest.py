"""One engine and one agent for all tests here; a test leaves the engine ready."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from tests.support.models import make_model
from tests.support.stack import Stack, new_engine, save
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
    done = CliRunner().invoke(app, [str(a) for a in arguments], env=env)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert "Traceback" not in done.output
    return Ran(done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def _stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    engine = new_engine(checkpoint, folder / "engine.log")
    stack = Stack(checkpoint, folder, engine)
    engine.start()
    try:
        yield stack
    finally:
        stack.close()
        engine.stop()


@pytest.fixture
def stack(_stack: Stack) -> Stack:
    _stack.heal()
    return _stack


@pytest.fixture
def token_file(stack: Stack) -> Path:
    return stack.folder / "token"


@pytest.fixture
def run(token_file: Path) -> Run:
    """A command with the agent's token in a file."""

    def call(*arguments: object) -> Ran:
        return invoke(*arguments, "--token-file", token_file)

    return call


@pytest.fixture
def second(stack: Stack, tmp_path: Path) -> Path:
    """Another checkpoint of the same model, in two files with an index."""
    from safetensors.torch import save_file

    weights = stack.weights()
    folder = save({}, stack.checkpoint, tmp_path / "second")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({n: weights[n] for n in some}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, some in files.items() for n in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
