"""``weightsync doctor``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from weightsync_client.commands.common import (
    EXIT_NO,
    AsJson,
    TokenFile,
    errors_told,
    files_of_command,
    new_fleet,
    print_json,
)
from weightsync_client.doctor.finding import Finding
from weightsync_client.doctor.host import host
from weightsync_client.doctor.probe import probe as measure
from weightsync_client.doctor.remote import agent_port, engine, tls_files
from weightsync_client.doctor.remote import agents as ask_agents
from weightsync_client.doctor.software import installed, software
from weightsync_client.settings import Deadlines

_MARKS = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[bold red]✗[/]"}


def doctor(
    agent: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Ask this agent, too; may be repeated."),
    ] = None,
    engine_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Look at this engine's API server, too."),
    ] = None,
    probe: Annotated[
        bool, typer.Option(help="Measure a write between two processes of this host.")
    ] = True,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Look for what would make pushes fail or crawl, on a trainer, an inference node, or both.

    Changes nothing.  What it cannot see it says.

    Exit status: 0 nothing is wrong; 1 something is; 2 bad arguments.
    """
    with errors_told("doctor", as_json=as_json):
        findings: list[Finding] = []
        console = Console(highlight=False)
        for finding in _examine(agent or (), engine_url, token_file, probe=probe):
            findings.append(finding)
            if not as_json:
                _print(console, finding)
        if as_json:
            print_json({"findings": [f.to_dict() for f in findings]})
        else:
            counts = {s: sum(f.severity == s for f in findings) for s in ("ok", "warn", "fail")}
            console.print(", ".join(f"{n} {severity}" for severity, n in counts.items()))
    raise typer.Exit(EXIT_NO if any(f.severity == "fail" for f in findings) else 0)


def _examine(
    urls: Sequence[str], engine_url: str | None, token_file: Path | None, *, probe: bool
) -> Iterator[Finding]:
    # first, so that bad arguments are told before anything is measured
    fleet = new_fleet(urls, token_file, Deadlines(connect_s=5, grace_s=1)) if urls else None
    yield from software(os.environ)
    here = list(host())
    yield from here
    yield from tls_files(files_of_command())
    if fleet is None:
        yield agent_port()
    else:
        with fleet:
            yield from ask_agents(fleet)
    if engine_url is not None:
        yield from engine(engine_url)
    if probe and installed("nixl"):
        yield from measure(os.environ, gpu=any(f.id.startswith("gpu.") for f in here))


def _print(console: Console, finding: Finding) -> None:
    where = "" if finding.where == "host" else f" ({finding.where})"
    told = escape(f"{finding.id}{where}: {finding.what}")
    console.print(f"{_MARKS[finding.severity]} {told}", soft_wrap=True)
    if finding.severity != "ok":
        console.print(f"    [dim]why:[/] {escape(finding.why)}", soft_wrap=True)
        if finding.fix:
            console.print(f"    [dim]fix:[/] {escape(finding.fix)}", soft_wrap=True)
