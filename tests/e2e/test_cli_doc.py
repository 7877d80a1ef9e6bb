"""docs/cli.md does what it says, and names every command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_complete_commands_and_options(shell: str) -> None:
    assert "--install-completion" in invoke("--help").out
    for line, completed in (("weightsync st", "status"), ("weightsync push --tr", "--trace")):
        env = {
            "_WEIGHTSYNC_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")),  # bash
            "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }  # fmt: skip
        done = CliRunner().invoke(app, [], prog_name="weightsync", env=env)
        assert done.exit_code == 0
        assert completed in done.stdout


def test_every_commands_help_names_its_exit_statuses() -> None:
    documented = {status for row in re.findall(r"^\| ([\d, ]+) \|", DOC, flags=re.MULTILINE)
                  for status in row.split(", ")}  # fmt: skip
    for name, command in vars(typer.main.get_command(app))["commands"].items():
        for each in vars(command).get("commands", {name: command}).values():
            text = str(each.help)
            assert "Exit status: 0" in text, each.name
            told = re.search(r"Exit status:(.*?)(\n\n|\Z)", text, flags=re.DOTALL)
            assert told is not None
            assert set(re.findall(r"(?:^|[ ;,])(\d+)(?= [a-z])", told[1])) <= documented


@pytest.mark.nixl
def test_the_commands_run_as_written(stack: Stack, tmp_path: Path) -> None:
    folder = save_in_two(stack.weights(), stack.checkpoint, tmp_path / "new-checkpoint")
    here = {"http://127.0.0.1:9100": stack.agent.url, "new-checkpoint": str(folder)}
    commands = [line for block in BLOCKS for line in block.splitlines()]
    assert len(commands) == 9
    out = ""
    for command in commands:
        words = shlex.split(command)[1:]
        arguments = [here.get(word, word) for word in words]
        done = invoke(*arguments, env={"WEIGHTSYNC_TOKEN": TOKEN})
        assert done.code == 0, f"{command}\n{done.out}{done.err}"
        out += done.out
    for text in ("paused", '"state": "ready"', "kernel tensors compared: equal", "q_proj"):
        assert text in out
