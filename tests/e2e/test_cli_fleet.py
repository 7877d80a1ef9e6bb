"""``status``, ``pause`` and ``resume`` against a real agent."""

from __future__ import annotations

import pytest

from tests.support.cli import Run, invoke
from tests.support.stack import TOKEN, Stack
from tests.support.torch_host import free_port

pytestmark = pytest.mark.nixl


def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_status_tells_what_the_agent_does(stack: Stack, run: Run) -> None:
    done = run("status", stack.agent.url)
    assert (done.code, done.err) == (0, "")
    assert "ready" in done.out
    assert "25 direct" in " ".join(done.out.split())
    told = run("status", stack.agent.url, "--json")
    (agent,) = told.json["agents"]
    assert agent["url"] == stack.agent.url
    assert agent["error"] is None
    assert {"state", "version", "workers", "engines"} <= agent["status"].keys()


def test_one_agent_that_is_gone_hides_no_other(stack: Stack, run: Run) -> None:
    gone = nobody()
    done = run("status", gone, stack.agent.url, "--json")
    first, second = done.json["agents"]
    assert done.code == 4
    assert (first["status"], first["error"]["code"]) == (None, "agent_unreachable")
    assert second["status"]["state"] == "ready"
    table = run("status", gone, stack.agent.url)
    assert "agent_unreachable" in table.out
    assert "what to do: start weightsync-agent" in table.err


def test_status_exits_1_while_an_engine_does_not_serve(stack: Stack, run: Run) -> None:
    assert run("pause", stack.agent.url).code == 0
    done = run("status", stack.agent.url)
    assert done.code == 1
    assert "paused by hand" in " ".join(done.out.split())


def test_watching_goes_on_until_it_is_interrupted(
    stack: Stack, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("weightsync_client.commands.fleet.time.sleep", sleep)
    done = run("status", stack.agent.url, "--watch", "--interval", "0.5", "--json")
    assert (done.code, done.out.count("\n"), looks) == (130, 3, [0.5] * 3)
    looks.clear()
    shown = run("status", stack.agent.url, "--watch")
    assert shown.code == 130
    assert shown.out.count("1 ready") == 3, "a file or a pipe gets every look"


def test_pause_and_resume_stop_and_start_the_engine(stack: Stack, run: Run) -> None:
    paused = run("pause", stack.agent.url, "--mode", "wait", "--timeout", "20", "--json")
    (agent,) = paused.json["agents"]
    assert (paused.code, agent["state"], agent["error"]) == (0, "paused", None)
    assert stack.state == "paused"
    resumed = run("resume", stack.agent.url)
    assert resumed.out == f"{stack.agent.url}: ready, version {stack.status()['version']}\n"
    assert stack.state == "ready"


def test_a_step_that_one_agent_refuses_is_told_of_each(stack: Stack, run: Run) -> None:
    gone = nobody()
    done = run("pause", gone, stack.agent.url, "--json")
    first, second = done.json["agents"]
    assert (done.code, first["error"]["code"], second["state"]) == (
        4, "agent_unreachable", "paused",
    )  # fmt: skip
    assert gone in done.err


def test_the_token_comes_from_the_environment_or_a_file(stack: Stack, tmp_path) -> None:
    url = stack.agent.url
    assert invoke("status", url, env={"WEIGHTSYNC_TOKEN": TOKEN}).code == 0
    without = invoke("status", url, env={"WEIGHTSYNC_TOKEN": ""})
    assert without.code == 4
    assert "unauthorized" in without.out
    assert "what to do: send Authorization" in without.err
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        done = invoke("resume", url, "--token-file", tmp_path / name, "--json")
        assert (done.code, done.json["error"]["code"]) == (2, "invalid_input")


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["status", "localhost:9100"],
        ["status", "http://a:1", "http://a:1"],
        ["status", "http://a:1", "--interval", "0"],
        ["pause", "http://a:1", "--mode", "hard"],
        ["pause", "http://a:1", "--timeout", "-1"],
        ["resume"],
        ["push"],
        ["push", "somewhere"],
        ["verify", "somewhere"],
        ["explain", "--agent", "http://a:1"],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_2_and_say_why(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err
