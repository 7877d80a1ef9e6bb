"""``weightsync status``, ``pause`` and ``resume``: look at agents, and stop and start engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from weightsync.errors import WeightSyncError
from weightsync.protocol import (
    PauseRequest,
    ReloadRequest,
    ResumeRequest,
    RollbackRequest,
    StepResponse,
)
from weightsync_client.commands.common import (
    EXIT_NO,
    AsJson,
    TokenFile,
    Urls,
    errors_told,
    exit_status,
    new_fleet,
    print_json,
    tell_error,
)
from weightsync_client.commands.status_view import Answer, status_table, trouble, watched
from weightsync_client.control import Agent, Fleet
from weightsync_client.settings import Deadlines


class Mode(StrEnum):
    """What a pause does to running requests."""

    keep = "keep"
    wait = "wait"
    abort = "abort"


class PushModes(StrEnum):
    """How pushes reach the engine's weights."""

    direct = "direct"
    shadow = "shadow"


def ask_each(fleet: Fleet, call: Callable[[Agent], dict[str, Any]]) -> list[Answer]:
    """``call`` of every agent at once; what fails is an answer too."""

    def guarded(agent: Agent) -> Answer:
        try:
            return Answer(agent.url, call(agent))
        except WeightSyncError as error:
            return Answer(agent.url, error=error)

    return fleet.each(guarded)


def _worst(answers: Sequence[Answer]) -> int:
    return max((exit_status(a.error) for a in answers if a.error is not None), default=0)


# ------------------------------------------------------------------ status


def status(
    urls: Urls,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between two looks of --watch.")
    ] = 1.0,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what agents and their engines do; with --json and --watch, one object a look.

    Exit status: 0 every engine serves a whole version; 1 one does not; 2 bad arguments; 4 an agent
    does not answer, or does not take the token; 130 ended by Ctrl-C.
    """
    with errors_told("status", as_json=as_json):
        deadlines = Deadlines()
        with new_fleet(urls, token_file, deadlines) as fleet:

            def look() -> list[Answer]:
                return ask_each(fleet, lambda a: a.get("/status", timeout_s=deadlines.status_s))

            if watch and not as_json:
                _watch(look, interval)
            answers = look()
            while as_json and watch:
                print_json(_status_json(answers))
                time.sleep(interval)
                answers = look()
            if as_json:
                print_json(_status_json(answers))
            else:
                Console().print(status_table(answers, time.time()))
                for answer in answers:
                    if answer.error is not None:
                        tell_error("status", answer.error)
                    elif text := trouble(answer):
                        typer.echo(f"{answer.url}: {text}")
    raise typer.Exit(_worst(answers) or (0 if all(map(_serves, answers)) else EXIT_NO))


def _serves(answer: Answer) -> bool:
    """What ``/readyz`` says."""
    told = answer.body or {}
    return told.get("state") in {"ready", "shadowing"} and not told.get("syncing")


def _watch(look: Callable[[], list[Answer]], interval_s: float) -> None:
    console = Console()
    while not console.is_terminal:  # a file or a pipe gets one look after the other
        console.print(watched(look(), time.time()))
        time.sleep(interval_s)
    with Live(watched(look(), time.time()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(watched(look(), time.time()), refresh=True)


def _status_json(answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "agents": [
            {
                "url": a.url,
                "status": a.body,
                "error": None if a.error is None else a.error.to_problem(),
            }
            for a in answers
        ]
    }


# ------------------------------------------------------------------ pause, resume


def pause(
    urls: Urls,
    mode: Annotated[
        Mode,
        typer.Option(help="Running requests are frozen and go on later, end first, or are ended."),
    ] = Mode.keep,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds until an engine must be drained.")
    ] = 60.0,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Stop generation; only a resume by hand ends it, and no push is taken meanwhile.

    Exit status: 0 every engine stands still; 1 one does not; 2 bad arguments; 4 an agent does not
    answer, or does not take the token.
    """
    request = PauseRequest(mode=mode.value, timeout_s=timeout)
    _step("pause", urls, token_file, as_json, lambda a: _post(a, "/pause", request, timeout))


def resume(urls: Urls, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """Start generation again after a pause by hand; never with weights that are not whole.

    Exit status: 0 every engine generates; 1 one was refused; 2 bad arguments; 4 an agent does not
    answer, or does not take the token.
    """
    timeout_s = Deadlines().resume_s
    call = ResumeRequest()
    _step("resume", urls, token_file, as_json, lambda a: _post(a, "/resume", call, timeout_s))


def rollback(
    urls: Urls,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="The version to give up.  [default: whichever an engine has]"),
    ] = None,
    pause_mode: Annotated[Mode, typer.Option(help="What happens to running requests.")] = Mode.keep,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds for pause and exchange.")
    ] = 120.0,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Serve the version before the last push in shadow mode again; one step, until the next push.

    Also mends an engine whose commit in shadow mode failed half way.

    Exit status: 0 every engine serves its version before; 1 one was refused or failed; 2 bad
    arguments; 4 an agent does not answer, or does not take the token.
    """
    request = RollbackRequest(version=version, mode=pause_mode.value, timeout_s=timeout)
    # pause, exchange and resume follow each other
    wait_s = 2 * timeout + Deadlines().resume_s
    _step("rollback", urls, token_file, as_json, lambda a: _post(a, "/rollback", request, wait_s))


def reload(
    urls: Urls,
    pause_mode: Annotated[Mode, typer.Option(help="What happens to running requests.")] = Mode.keep,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds for pause and load.")
    ] = 600.0,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Serve the checkpoint again that each engine was started with, as version 0.

    Mends an engine that is torn, when there is nobody who could push.

    Exit status: 0 every engine serves its checkpoint; 1 one was refused or failed; 2 bad
    arguments; 4 an agent does not answer, or does not take the token.
    """
    request = ReloadRequest(mode=pause_mode.value, timeout_s=timeout)
    wait_s = 2 * timeout + Deadlines().resume_s
    _step("reload", urls, token_file, as_json, lambda a: _post(a, "/reload", request, wait_s))


def _post(
    agent: Agent,
    path: str,
    request: PauseRequest | ResumeRequest | RollbackRequest | ReloadRequest,
    timeout_s: float,
) -> dict[str, Any]:
    answer = agent.post(path, request, StepResponse, timeout_s=timeout_s)
    return answer.model_dump(include={"state", "version", "seconds"})


def _step(
    command: str,
    urls: Sequence[str],
    token_file: TokenFile,
    as_json: bool,
    call: Callable[[Agent], dict[str, Any]],
) -> None:
    with errors_told(command, as_json=as_json):
        with new_fleet(urls, token_file, Deadlines()) as fleet:
            answers = ask_each(fleet, call)
        if as_json:
            agents = [
                {"url": a.url, "error": None if a.error is None else a.error.to_problem()}
                | (a.body or {"state": None, "version": None, "seconds": {}})
                for a in answers
            ]
            print_json({"agents": agents})
        for answer in answers:
            if answer.error is not None:
                tell_error(command, answer.error)
            elif answer.body is not None and not as_json:
                told = answer.body
                typer.echo(f"{answer.url}: {told['state']}, version {told['version']}")
    raise typer.Exit(_worst(answers))
