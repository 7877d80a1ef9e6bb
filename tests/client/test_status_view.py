"""What ``weightsync status`` shows of a fleet."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from weightsync.errors import AgentUnreachableError
from weightsync_client.commands.status_view import Answer, trouble, watched

NOW = 1_800_000_000.0


def agent(state: str, version: int = 42, **more: Any) -> Answer:
    worker = {"direct": 3, "staged": 1, "refusals": []}
    body = {"state": state, "version": version, "workers": [worker] * 2, "last_push": None, **more}
    return Answer(f"http://node-{state}:9100", body)


def shown(*answers: Answer, width: int = 140) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(watched(answers, NOW))
    return console.file.getvalue()


def test_a_line_tells_of_the_whole_fleet_and_a_row_of_each_agent() -> None:
    done = {
        "version": 42, "outcome": "committed", "started_at": NOW - 130, "nbytes": 16_400_000_000,
        "seconds": {"paused": 0.0612, "write": 0.041},
        "phases": [{"phase": "resume", "start_s": 0.06, "seconds": 0.001}],
    }  # fmt: skip
    text = shown(agent("ready", last_push=done), agent("ready", version=41), agent("paused"))
    assert "2 ready, 1 paused · versions 41 to 42" in text
    assert "v42 committed 2 min ago · paused 61.2 ms · 400.0 GB/s" in text
    assert "● paused by hand" in text
    assert "2 (6 direct, 2 staged)" in text
    assert "none yet" in text


def test_a_push_that_runs_shows_its_phase_and_for_how_long() -> None:
    runs = {
        "version": 43, "outcome": "running", "started_at": NOW - 4.0, "seconds": {"pause": 0.5},
        "phases": [{"phase": "write", "start_s": 1.0, "seconds": None}],
    }  # fmt: skip
    text = shown(agent("receiving", target=43, last_push=runs, pause_owner="p"))
    assert "● receiving" in text
    assert "42 → 43" in text
    assert "v43 write for 3.00 s" in text


def test_trouble_is_told_with_what_to_do_and_markup_in_it_stays_text() -> None:
    error = {"code": "verify_failed", "detail": "[bold]1 of 25[/] writes", "hint": "push again"}
    torn = agent("torn", last_errors=[error])
    gone = Answer("http://gone:9100", error=AgentUnreachableError("nobody", hint="start it"))
    text = shown(torn, gone)
    assert "http://node-torn:9100: verify_failed: [bold]1 of 25[/] writes" in text
    assert text.count("what to do:") == 2
    assert "● agent_unreachable" in text
    assert trouble(agent("ready", last_errors=[error])) == ""


def test_a_torn_engines_ways_out_are_commands_and_only_those_that_it_has() -> None:
    error = {"code": "verify_failed", "detail": "1 of 25 writes", "hint": "push again"}
    none = trouble(agent("torn", last_errors=[error]))
    assert "weightsync push CHECKPOINT_DIR --agent http://node-torn:9100" in none
    assert "rollback" not in none
    assert "reload" not in none
    kept = agent("torn", last_errors=[error], rollback_to=41, workers=[{"checkpoint": True}])
    assert "or weightsync rollback http://node-torn:9100; or" in trouble(kept)
    assert trouble(kept).endswith("weightsync reload http://node-torn:9100")


def test_what_keeps_an_engine_that_stands_or_serves_from_being_pushed_to_is_told() -> None:
    text = shown(agent("paused", version=7))
    assert "takes no push" in text
    assert "what to do: weightsync resume http://node-paused:9100" in text
    assert trouble(agent("paused", pause_owner="p-1")) == ""
    full = trouble(agent("ready", journal={"path": "j", "trouble": "j cannot be written: full"}))
    assert full.startswith("it takes no push: j cannot be written: full\n  what to do: free")
    waits = agent("ready", version=0, syncing=True)
    assert "● ready, waits for a push" in shown(waits)
    assert "has the weights of its start" in trouble(waits)
    refused = {"refusals": [{"tensor": "a.weight", "reason": "other shape"}] * 3}
    assert "3 kernel tensors cannot be pushed, as a.weight: other shape" in trouble(
        agent("ready", workers=[refused])
    )


def test_it_fits_a_narrow_terminal() -> None:
    assert max(map(len, shown(agent("ready"), agent("torn"), width=50).splitlines())) <= 50
