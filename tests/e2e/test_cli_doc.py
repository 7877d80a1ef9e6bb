"""docs/cli.md does what it says, and names every command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from tests.support.cli import invoke, save_in_two
from tests.support.stack import TOKEN, Stack
from weightsync_client.cli import app

DOC = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"<!-- run -->\n```sh\n(.*?)```", DOC, flags=re.DOTALL)


def test_every_command_and_exit_status_is_told() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", DOC, flags=re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([a-z]+)(?: [^`]*)?`", row)}
    assert set(vars(typer.main.get_command(app))["commands"]) <= told
    for status in ("0", "1", "2", "3", "4", "130, 143"):
        assert f"| {status} |" in DOC


def test_the_shells_complete_commands() -> None:
    assert "--install-completion" in invoke("--help").out


@pytest.mark.nixl
def test_the_commands_run_as_written(stack: Stack, tmp_path: Path) -> None:
    folder = save_in_two(stack.weights(), stack.checkpoint, tmp_path / "new-checkpoint")
    here = {"http://127.0.0.1:9100": stack.agent.url, "new-checkpoint": str(folder)}
    commands = [line for block in BLOCKS for line in block.splitlines()]
    assert len(commands) == 8
    out = ""
    for command in commands:
        words = shlex.split(command)[1:]
        arguments = [here.get(word, word) for word in words]
        done = invoke(*arguments, env={"WEIGHTSYNC_TOKEN": TOKEN})
        assert done.code == 0, f"{command}\n{done.out}{done.err}"
        out += done.out
    for text in ("paused", '"state": "ready"', "kernel tensors compared: equal", "q_proj"):
        assert text in out
