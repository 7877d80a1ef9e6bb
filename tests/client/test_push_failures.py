from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference import Agent, HangUpError
from torch import nn

from weightsync.errors import (
    AgentUnreachableError,
    AuthError,
    DeadlineError,
    EngineError,
    IdentityError,
    PeerLostError,
    StaleEpochError,
    VerifyError,
)
from weightsync.process import this_process
from weightsync.transport.inmemory import Fabric, Faults, InMemoryTransport
from weightsync_client import Deadlines, Publisher

Make = Callable[..., Publisher]


def refuse(error: Exception, times: int = 1) -> Callable[[], None]:
    left = [times]

    def hook() -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return hook


def inject_at_pause(agent: Agent, faults: Faults) -> None:
    """Sending to the worker fails from the pause on, after everything was prepared."""
    fabric = agent.fabric
    agent.before["/pause"] = lambda: fabric.inject(agent.workers[0].transport.name, faults)


def test_a_peer_lost_in_the_write_aborts_and_the_next_push_repairs(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    publisher = make_publisher(agent)
    inject_at_pause(agent, Faults(dead=True, torn_nbytes=8))
    with pytest.raises(PeerLostError) as caught:
        publisher.push(model)
    assert agent.calls[-2:] == ["/begin_update", "/abort_update"]
    (word,) = agent.released
    assert word.push_id == agent.bodies["/abort_update"]["push_id"]
    assert word.released == this_process()
    assert "write: PeerLostError" in agent.bodies["/abort_update"]["reason"]
    assert agent.state.phase == "torn"
    assert not agent.generating
    facts = caught.value.context
    assert facts["phase"] == "write"
    assert facts["version"] == 1
    assert facts["agents"] == [f"{agent.url}: may be torn"]
    assert facts["elapsed_s"] > 0
    assert "call push again" in caught.value.__notes__[-1]

    del agent.before["/pause"]
    report = publisher.push(model)
    assert report.version == 2
    assert agent.state.phase == "ready"
    assert agent.calls.count("/init_transfer") == 2


def test_a_long_write_tells_the_agents_now_and_then_that_the_push_lives(
    agent: Agent, make_publisher: Make, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_client.transaction._BEAT_S", 0.05)
    inject_at_pause(agent, Faults(delay_s=0.6))
    report = make_publisher(agent).push(model)
    # the reference agent refuses a repeated begin: the push does not depend on the answers
    assert 3 <= agent.calls.count("/begin_update") <= 13
    assert "/begin_update" not in agent.calls[agent.calls.index("/resume") :]
    assert (report.version, agent.state.phase) == (1, "ready")


def test_bytes_that_arrive_wrong_are_the_agents_verify_error(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    inject_at_pause(agent, Faults(torn_nbytes=8))
    with pytest.raises(VerifyError, match="digests of rank 0 differ") as caught:
        make_publisher(agent).push(model)
    assert caught.value.context["phase"] == "commit"
    assert agent.state.phase == "torn"
    assert "/resume" not in agent.calls


def test_a_write_that_never_completes_ends_at_its_deadline(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    inject_at_pause(agent, Faults(lose_write=True))
    quick = Deadlines(write_s=0.2, floor_bytes_per_s=1e9)
    started = time.perf_counter()
    with pytest.raises(DeadlineError, match="worker-"):
        make_publisher(agent, deadlines=quick).push(model)
    assert time.perf_counter() - started < 5
    assert agent.calls[-1] == "/abort_update"
    assert agent.state.phase == "torn"


def test_a_trainer_that_stood_still_after_begin_asks_before_it_writes(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.after["/begin_update"] = lambda: time.sleep(1.1)
    make_publisher(agent).push(model)
    begin = agent.calls.index("/begin_update")
    assert agent.calls[begin:] == ["/begin_update", "/status", "/commit_update", "/resume"]


def test_a_trainer_that_was_given_up_writes_nothing(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    def give_up() -> None:
        begun = agent.bodies["/begin_update"]
        agent.abort_update({"session": begun["session"], "push_id": begun["push_id"]})
        time.sleep(1.1)

    agent.after["/begin_update"] = give_up
    inject_at_pause(agent, Faults(dead=True, torn_nbytes=8))  # a write would be another error
    with pytest.raises(StaleEpochError, match="has given push") as caught:
        make_publisher(agent).push(model)
    assert caught.value.context["phase"] == "write"
    assert "/commit_update" not in agent.calls


def test_ctrl_c_in_the_write_aborts_and_is_raised(
    agent: Agent, fabric: Fabric, make_publisher: Make, model: nn.Module
) -> None:
    class Interrupted(InMemoryTransport):
        def wait(self, writes: object, *, timeout_s: float) -> None:
            raise KeyboardInterrupt

    publisher = make_publisher(agent, transport=lambda: Interrupted(fabric))
    with pytest.raises(KeyboardInterrupt) as caught:
        publisher.push(model)
    assert agent.calls[-1] == "/abort_update"
    assert agent.state.phase == "torn"
    assert "phase write" in caught.value.__notes__[-1]
    assert len(fabric.ends) == 1, "the trainer's transport is closed: nothing is in flight"


def test_a_refused_begin_leaves_the_engine_generating_its_old_weights(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    publisher = make_publisher(agent)
    publisher.push(model)
    before = agent.workers[0].buffers["0.weight"].clone()
    agent.before["/begin_update"] = refuse(IdentityError("it moved", hint="attach"))
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(IdentityError, match="it moved"):
        publisher.push(model)
    assert agent.generating
    assert agent.state.phase == "ready"
    assert torch.equal(agent.workers[0].buffers["0.weight"], before)


def test_a_pause_without_answer_is_aborted_so_that_the_engine_goes_on(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    agent, other = make_agent(), make_agent()
    agent.after["/pause"] = lambda: time.sleep(1.0)
    with pytest.raises(DeadlineError, match="POST /pause") as caught:
        make_publisher(agent, other, deadlines=Deadlines(pause_s=0.2, grace_s=0.1)).push(model)
    assert agent.generating
    assert agent.state.phase == "ready"
    assert "nothing was written" in caught.value.__notes__[-1]


def test_the_one_agent_that_does_not_answer_to_pause_and_begin_is_told_to_abort(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.after["/pause"] = lambda: time.sleep(1.0)
    deadlines = Deadlines(pause_s=0.1, begin_s=0.1, grace_s=0.1)
    with pytest.raises(DeadlineError, match="POST /begin_update") as caught:
        make_publisher(agent, deadlines=deadlines).push(model)
    assert caught.value.context["phase"] == "pause"
    assert agent.generating
    assert agent.state.phase == "ready"


@pytest.mark.parametrize("step", ["pause", "begin"])
def test_what_fails_of_pause_and_begin_is_the_phase_that_the_error_names(
    agent: Agent, make_publisher: Make, model: nn.Module, step: str
) -> None:
    publisher = make_publisher(agent)
    publisher.push(model)
    path = {"pause": "/pause", "begin": "/begin_update"}[step]
    agent.before[path] = refuse(EngineError("no", hint="look"))
    with pytest.raises(EngineError) as caught:
        publisher.push(model)
    assert caught.value.context["phase"] == step
    assert agent.generating
    assert publisher.push(model).version == {"pause": 2, "begin": 3}[step]
    # nothing had begun where the pause failed, so its rendezvous is still good
    assert agent.calls.count("/init_transfer") == {"pause": 1, "begin": 2}[step]


def test_a_resume_that_fails_with_the_commit_is_asked_for_again(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.before["/resume"] = refuse(EngineError("not now", hint="look"))
    assert make_publisher(agent).push(model).version == 1
    assert agent.generating
    assert agent.calls[-2:] == ["/resume", "/resume"]


def test_a_resume_with_the_commit_has_its_own_time_beside_the_commits(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.before["/resume"] = lambda: time.sleep(1.0)
    deadlines = Deadlines(commit_s=0.2, resume_s=5.0, grace_s=0.1)
    make_publisher(agent, deadlines=deadlines).push(model)
    assert agent.calls.count("/resume") == 1
    assert agent.generating


def test_a_session_that_ended_is_renewed_without_a_needless_pause(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    publisher = make_publisher(agent)
    publisher.push(model)
    agent.state = replace(agent.state, session=None, connected=False, epoch=7)
    del agent.calls[:]
    publisher.push(model)
    assert agent.calls[:4] == ["/status", "/init_transfer", "/connect", "/pause"]
    assert agent.state.epoch == 8


def test_an_epoch_that_ends_between_status_and_begin_is_tried_once_more(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    publisher = make_publisher(agent)
    agent.before["/begin_update"] = refuse(StaleEpochError("over", hint="again"))
    report = publisher.push(model)
    assert agent.calls.count("/init_transfer") == 2
    assert agent.calls.count("/abort_update") == 1
    assert agent.state.phase == "ready"
    assert agent.state.version == report.version

    agent.before["/begin_update"] = refuse(StaleEpochError("over", hint="again"), times=2)
    with pytest.raises(StaleEpochError):
        publisher.push(model)
    assert agent.generating


def test_a_stale_epoch_after_the_bytes_moved_is_not_tried_again(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.before["/commit_update"] = refuse(StaleEpochError("over", hint="again"))
    with pytest.raises(StaleEpochError):
        make_publisher(agent).push(model)
    assert agent.calls.count("/begin_update") == 1
    assert agent.calls[-1] == "/abort_update"


@pytest.mark.parametrize("path", ["/pause", "/begin_update", "/commit_update", "/resume"])
def test_a_connection_that_ends_before_the_answer_is_repeated_once(
    path: str, agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.before[path] = refuse(HangUpError("x"))
    assert make_publisher(agent).push(model).version == 1
    assert agent.calls.count(path) == 2


def test_an_agent_that_hangs_up_twice_is_named(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.before["/init_transfer"] = refuse(HangUpError("x"), times=2)
    with pytest.raises(AgentUnreachableError, match=rf"{agent.url} closed the connection"):
        make_publisher(agent).push(model)


def test_a_failed_resume_says_that_the_weights_are_there(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.before["/resume"] = refuse(EngineError("no answer", hint="look"), times=2)
    with pytest.raises(EngineError) as caught:
        make_publisher(agent).push(model)
    assert caught.value.context["agents"] == [f"{agent.url}: has version 1"]
    # the way back tries the resume once more, for the engine is whole
    assert agent.generating


def test_two_agents_fail_together_when_one_writer_path_breaks(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    good, bad = make_agent(), make_agent()
    inject_at_pause(bad, Faults(dead=True))
    with pytest.raises(PeerLostError):
        make_publisher(good, bad).push(model)
    assert good.state.phase == bad.state.phase == "torn"
    assert good.calls[-1] == bad.calls[-1] == "/abort_update"


def test_two_agents_one_paused_by_hand_the_other_goes_on(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    free, held = make_agent(), make_agent()
    held.pause({})
    with pytest.raises(Exception, match="paused by hand"):
        make_publisher(free, held).push(model)
    assert free.generating
    assert held.state.phase == "paused"
    assert "/abort_update" not in held.calls


def test_an_agent_that_committed_resumes_when_another_one_fails(
    make_agent: Callable[..., Agent], make_publisher: Make, model: nn.Module
) -> None:
    good, bad = make_agent(), make_agent()
    inject_at_pause(bad, Faults(torn_nbytes=4))
    with pytest.raises(VerifyError) as caught:
        make_publisher(good, bad).push(model)
    assert good.state.phase == "ready"
    assert good.state.version == 1
    assert bad.state.phase == "torn"
    assert f"{good.url}: has version 1" in caught.value.context["agents"]


def test_an_agent_that_is_not_there_is_a_clear_error(
    make_publisher: Make, model: nn.Module
) -> None:
    with pytest.raises(AgentUnreachableError, match=r"127\.0\.0\.1:9 does not answer") as caught:
        make_publisher("http://127.0.0.1:9").push(model)
    assert "weightsync-agent" in caught.value.hint


def test_something_else_that_listens_is_a_clear_error(
    agent: Agent, make_publisher: Make, model: nn.Module
) -> None:
    agent.answer = lambda *_: (404, {"detail": "Not Found"})
    with pytest.raises(AgentUnreachableError, match="404") as caught:
        make_publisher(agent).push(model)
    assert "is it a weightsync-agent" in caught.value.hint


def test_the_token_is_sent_from_argument_or_environment(
    make_agent: Callable[..., Agent],
    make_publisher: Make,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = make_agent(token="secret")
    with pytest.raises(AuthError):
        make_publisher(agent).push(model)
    assert make_publisher(agent, token="secret").push(model).version == 1
    monkeypatch.setenv("WEIGHTSYNC_TOKEN", "secret")
    assert make_publisher(agent).push(model).version == 2


def test_a_process_that_never_closes_its_publisher_ends_cleanly(agent: Agent) -> None:
    """The transport is in the other process, so the push fails: at exit everything is released."""
    script = textwrap.dedent(
        f"""
        import torch
        from weightsync.transport.inmemory import Fabric, InMemoryTransport
        from weightsync_client import Publisher
        fabric = Fabric()
        publisher = Publisher([{agent.url!r}], transport=lambda: InMemoryTransport(fabric))
        try:
            publisher.push({{"w": torch.ones(3)}})
        except Exception as error:
            print(type(error).__name__)
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == "TransportError"
    assert "Traceback" not in done.stderr
