"""Before, between and beside pushes: agents that come and go, warm-ups, catching up, checks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, same_error, same_report, sharded
from reference import Agent, Region
from test_policies import Picky
from test_push import arrived
from test_push_failures import refuse
from thread_ranks import on_all

from weightsync.errors import (
    AgentUnreachableError,
    DeadlineError,
    EngineDetachedError,
    EngineError,
    EnginePausedError,
    InputError,
    LayoutError,
    ManifestError,
    NoSessionError,
    PeerLostError,
    RankFailedError,
    WeightSyncError,
)
from weightsync.manifest import Manifest
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync_client import Publisher

Make = Callable[..., Any]


def on_ranks(job: Job, call: Callable[[Publisher], Any]) -> list[Any]:
    return on_all([partial(call, publisher) for publisher in job.publishers])


def one(results: list[Any]) -> Any:
    """What all ranks returned alike."""
    assert not any(isinstance(r, BaseException) for r in results), results
    assert all(r == results[0] for r in results)
    return results[0]


def transposed(manifest: Manifest) -> list[Region]:
    return [Region(t.name, t.dtype, [t.name], transposed=True) for t in manifest]


# ------------------------------------------------------------------ who is there


def test_a_file_of_agents_is_read_again_for_each_push(
    make_agent: Make, make_job: Make, weights: Any, tmp_path: Path
) -> None:
    first, second = make_agent(), make_agent()
    path = tmp_path / "agents"
    path.write_text(f"# the fleet\n\n{first.url}  # rack 1\n")
    job = make_job(ranks=2, agents=f"file:{path}")
    assert [a.url for a in same_report(job.push(sharded(weights, 2))).agents] == [first.url]

    path.write_text(f"{first.url}\n{second.url}/\n{first.url}\n")
    report = same_report(job.push(sharded(weights, 2)))
    assert [a.url for a in report.agents] == [first.url, second.url]
    assert arrived(second, weights)
    assert first.calls.count("/init_transfer") == 1, "the newcomer's rendezvous is its own"
    assert report.nbytes == 2 * sum(t.nbytes for t in weights.values())

    path.write_text(second.url)
    report = same_report(job.push(sharded(weights, 2)))
    assert [(a.url, a.version) for a in report.agents] == [(second.url, 3)]
    assert first.state.version == 2
    assert second.calls.count("/init_transfer") == 1

    path.unlink()
    error = same_error(job.push(sharded(weights, 2)), InputError, 0)
    assert "cannot read the agents' file" in str(error)
    path.write_text("# nobody\n")
    error = same_error(job.push(sharded(weights, 2)), InputError, 0)
    assert "agents must be one or more different addresses" in str(error)


def test_a_function_names_the_agents_and_one_that_comes_back_takes_part(
    make_agent: Make, make_publisher: Make, model: Any
) -> None:
    agents = [make_agent(), make_agent()]
    there = [agents[0].url]
    publisher = make_publisher(lambda: list(there))
    publisher.push(model)
    there.append(agents[1].url)
    publisher.push(model)
    there.pop()
    publisher.push(model)
    there.append(agents[1].url)
    report = publisher.push(model)
    assert [a.version for a in report.agents] == [4, 4]
    assert [a.calls.count("/init_transfer") for a in agents] == [1, 2]
    there[:] = []
    with pytest.raises(InputError, match="one or more"):
        publisher.push(model)


def test_a_function_that_fails_says_so(make_publisher: Make, model: Any) -> None:
    publisher = make_publisher(lambda: 1 // 0)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        publisher.push(model)


def test_dns_names_every_address_of_a_service(
    agent: Agent, make_publisher: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(agent.url.rpartition(":")[2])
    asked: list[tuple[str, int]] = []

    def lookup(host: str, at: int, **_: Any) -> list[Any]:
        asked.append((host, at))
        found = ["127.0.0.1", "127.0.0.1", "127.0.0.2"] if len(asked) > 1 else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, at)) for ip in found]

    monkeypatch.setattr("weightsync_client.membership._lookup", lookup)
    publisher = make_publisher(f"dns:agents.train.svc:{port}", policy="available")
    assert asked == [], "names are looked up in the push"
    assert [a.url for a in publisher.push(model).agents] == [agent.url]
    report = publisher.push(model)
    assert [(a.url, a.ok) for a in report.agents] == [
        (agent.url, True), (f"http://127.0.0.2:{port}", False),
    ]  # fmt: skip
    assert asked == [("agents.train.svc", port)] * 2


@pytest.mark.parametrize("agents", ["dns:host", "dns::80", "dns:host:x", "dns:host:0", [], "ftp:x"])
def test_agents_that_are_none_are_refused_at_once(agents: Any) -> None:
    with pytest.raises(InputError):
        Publisher(agents)


def test_an_engine_that_is_restarted_has_a_rendezvous_by_itself(
    make_agent: Make, make_job: Make, weights: Any
) -> None:
    agents = [make_agent(), make_agent(n_workers=2)]
    job = make_job(*agents, ranks=2)
    same_report(job.push(sharded(weights, 2)))
    restarted = agents[1]
    restarted.state = type(restarted.state)(phase="ready", version=0, epoch=restarted.state.epoch)
    for worker in restarted.workers:
        worker.close()
    report = same_report(job.push(sharded(weights, 2)))
    assert report.rendezvous_s > 0
    assert [a.calls.count("/init_transfer") for a in agents] == [1, 2]
    assert arrived(restarted, weights, worker=1)
    assert same_report(job.push(sharded(weights, 2))).rendezvous_s == 0


def test_a_newcomer_with_another_layout_makes_a_rendezvous_of_all(
    make_agent: Make, make_job: Make
) -> None:
    weights = {"a": torch.randn(6, 4), "b": torch.randn(3, 5)}
    plain, other = make_agent(), make_agent(regions=transposed)
    there = [plain.url]
    job = make_job(ranks=2, agents=lambda: there)
    same_report(job.push(sharded(weights, 2)))
    there.append(other.url)
    report = same_report(job.push(sharded(weights, 2)))
    assert [a.ok for a in report.agents] == [True, True]
    assert plain.calls.count("/init_transfer") == 2
    assert arrived(plain, weights)
    assert arrived(other, {n: t.t().contiguous() for n, t in weights.items()})


@pytest.mark.parametrize("policy", ["all", "available"])
@pytest.mark.parametrize("path", ["/init_transfer", "/connect"])
def test_a_newcomer_that_fails_leaves_the_others_epoch_alone(
    path: str, policy: Any, make_agent: Make, make_job: Make, weights: Any
) -> None:
    old, new = make_agent(), make_agent()
    there = [old.url]
    job = make_job(ranks=2, agents=lambda: there, policy=policy)
    same_report(job.push(sharded(weights, 2)))
    there.append(new.url)
    new.before[path] = refuse(EngineError("not yet", hint="wait"))
    results = job.push(sharded(weights, 2))
    if policy == "all":
        same_error(results, EngineError, 0)
        assert old.state.version == 1
    else:
        assert [a.ok for a in same_report(results).agents] == [True, False]
    report = same_report(job.push(sharded(weights, 2)))
    assert [a.ok for a in report.agents] == [True, True]
    assert old.calls.count("/init_transfer") == 1
    assert arrived(new, weights)


@pytest.mark.parametrize("policy", ["all", "available"])
def test_trainer_and_agents_start_in_any_order(
    policy: Any, make_agent: Make, make_publisher: Make, model: Any
) -> None:
    early, late = make_agent(), make_agent()
    detached = type(late.state)(phase="detached")
    ready, late.state = late.state, detached
    there = [early.url]

    def appear() -> None:
        time.sleep(0.3)
        there.append(late.url)
        time.sleep(0.6)
        late.state = ready

    publisher = make_publisher(
        lambda: [early.url, *there[1:]] if len(there) > 1 else [], policy=policy,
        wait_for_agents_s=20,
    )  # fmt: skip
    threading.Thread(target=appear, daemon=True).start()
    report = publisher.push(model)
    assert [a.ok for a in report.agents] == [True, True]
    assert report.total_s < 15
    late.state = detached  # later on nobody is waited for
    started = time.monotonic()
    if policy == "all":
        with pytest.raises(EngineDetachedError):
            publisher.push(model)
    else:
        assert [a.ok for a in publisher.push(model).agents] == [True, False]
    assert time.monotonic() - started < 5


def test_agents_that_never_come_are_an_error_after_the_wait(make_publisher: Make) -> None:
    publisher = make_publisher("http://127.0.0.1:9", wait_for_agents_s=0.6)
    started = time.monotonic()
    with pytest.raises(AgentUnreachableError):
        publisher.push({"w": torch.ones(2)})
    assert 0.6 <= time.monotonic() - started < 5
    with pytest.raises(InputError, match="wait_for_agents_s"):
        Publisher(["http://127.0.0.1:9"], wait_for_agents_s=-1)


# ------------------------------------------------------------------ warm-up


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_warmup_writes_to_every_workers_scratch_and_to_nothing_else(
    ranks: int, make_agent: Make, make_job: Make, weights: Any
) -> None:
    agents = [make_agent(), make_agent(n_workers=2)]
    job = make_job(*agents, ranks=ranks, coalesce_bytes=0)
    shards = sharded(weights, ranks)
    report = one(
        on_all([partial(p.warmup, s) for p, s in zip(job.publishers, shards, strict=True)])
    )
    assert [(a.ok, a.state, a.version) for a in report.agents] == [(True, "ready", 0)] * 2
    assert report.nbytes == 3 * sum(t.nbytes for t in weights.values())
    assert report.rendezvous_s > 0
    assert len(report.slowest) == ranks
    assert all(p.seconds > 0 and p.nbytes == 4096 for p in report.slowest)
    for agent in agents:
        assert agent.calls == ["/status", "/init_transfer", "/connect"]
        for worker in agent.workers:
            assert not any(b.any() for b in worker.buffers.values()), "live memory is as it was"
            worker.seen += [m for ms in worker.transport.notifications().values() for m in ms]
            assert len(worker.seen) == 2 * ranks
            assert all(m.startswith(b"probe:1:") for m in worker.seen)
    report = same_report(job.push(shards))
    assert report.rendezvous_s == 0
    assert report.version == 1
    assert all(arrived(a, weights) for a in agents)


@pytest.mark.parametrize("policy", ["all", "available"])
def test_a_worker_that_a_rank_cannot_reach_shows_in_the_warmup(
    policy: Any, make_agent: Make, make_job: Make, weights: Any, fabric: Fabric
) -> None:
    good, bad = make_agent(), make_agent()
    broken = [True]

    def refuses(peer: str) -> bool:
        return broken[0] and peer == bad.workers[0].transport.name

    job = make_job(
        good, bad, ranks=2, policy=policy, transports={1: lambda: Picky(fabric, refuses)}
    )
    shards = sharded(weights, 2)
    calls = [partial(p.warmup, s) for p, s in zip(job.publishers, shards, strict=True)]
    if policy == "all":
        error = same_error(on_all(calls), PeerLostError, 1)
        assert error.context["phase"] == "probe"
        assert "warm-up" in error.__notes__[-1]
        assert "every engine has the weights that it had" in error.__notes__[-1]
    else:
        report = one(on_all(calls))
        assert [(a.ok, a.phase, a.code) for a in report.agents] == [
            (True, "", ""), (False, "probe", "peer_lost"),
        ]  # fmt: skip
    broken[0] = False
    report = same_report(job.push(shards))
    assert [a.ok for a in report.agents] == [True, True]
    assert arrived(bad, weights)


def test_a_warmup_tells_what_the_engine_refuses(agent: Agent, make_publisher: Make) -> None:
    publisher = make_publisher(agent)
    agent.before["/init_transfer"] = refuse(ManifestError("unknown tensor 'w'"))
    with pytest.raises(ManifestError, match="unknown tensor"):
        publisher.warmup({"w": torch.ones(2)})
    assert publisher.push({"w": torch.ones(2)}).version == 1


# ------------------------------------------------------------------ catching up


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_newcomer_catches_up_from_the_slots_and_the_others_are_not_asked(
    ranks: int, make_agent: Make, make_job: Make, weights: Any
) -> None:
    old, new = make_agent(n_workers=2), make_agent()
    job = make_job(ranks=ranks, agents=lambda: [old.url], zero_copy_bytes=0)
    same_report(job.push(sharded(weights, ranks)))
    sent = {name: t.clone() for name, t in weights.items()}
    for tensor in weights.values():
        tensor.add_(1)  # training goes on
    del old.calls[:]
    outcome = one(on_ranks(job, lambda p: p.catch_up(new.url)))
    assert (outcome.url, outcome.ok, outcome.state, outcome.version) == (new.url, True, "ready", 1)
    assert arrived(new, sent)
    assert new.generating
    assert old.calls == []
    calls = len(new.calls)
    assert one(on_ranks(job, lambda p: p.catch_up(new.url))).version == 1
    assert new.calls[calls:] == ["/status"], "it has the version"
    assert same_report(job.push(sharded(weights, ranks))).version == 2
    assert arrived(old, weights, worker=1)
    assert old.calls.count("/init_transfer") == 0


def test_a_dropped_agent_catches_up_even_when_it_is_torn(
    make_agent: Make, make_job: Make, weights: Any, fabric: Fabric
) -> None:
    good, bad = make_agent(), make_agent()
    broken = [True]
    job = make_job(
        good, bad, ranks=2, policy="available",
        transports={
            1: lambda: Picky(
                fabric, lambda peer: broken[0] and peer == bad.workers[0].transport.name
            )
        },
    )  # fmt: skip
    report = same_report(job.push(sharded(weights, 2)))
    assert [a.ok for a in report.agents] == [True, False]
    assert bad.state.phase == "torn"
    broken[0] = False
    del good.calls[:]
    outcome = one(on_ranks(job, lambda p: p.catch_up(bad.url)))
    assert (outcome.state, outcome.version) == ("ready", 1)
    assert arrived(bad, weights)
    assert good.calls == []
    assert same_report(job.push(sharded(weights, 2))).rendezvous_s == 0


def test_catching_up_is_refused_where_the_slots_do_not_hold_the_version(
    make_agent: Make, make_job: Make
) -> None:
    weights = {"w": torch.randn(64, 64), "v": torch.randn(4, 4)}
    old, new, other = make_agent(), make_agent(), make_agent(regions=transposed)

    def refused(kind: type[WeightSyncError], text: str, url: str = "", **options: Any) -> None:
        job = make_job(old, ranks=2, **options)
        if text != "hold no version":
            same_report(job.push(sharded(weights, 2)))
            weights["w"].add_(1)
        results = on_ranks(job, lambda p: p.catch_up(url or new.url))
        assert [type(r) for r in results] == [kind] * 2, results
        assert {str(r) for r in results} == {str(results[0])}
        assert text in str(results[0])
        assert "push" in results[0].hint
        assert same_report(job.push(sharded(weights, 2))).agents[0].ok

    refused(NoSessionError, "hold no version")
    refused(InputError, "rounds", max_slot_bytes=4096, zero_copy_bytes=0)
    refused(InputError, "have changed since version", zero_copy_bytes=4096, coalesce_bytes=0)
    refused(LayoutError, "what no worker of the last push wanted", other.url)
    assert "/pause" not in new.calls
    assert "/pause" not in other.calls


def test_catching_up_can_be_tried_again_until_the_agent_is_there(
    make_agent: Make, make_job: Make, weights: Any
) -> None:
    old, new = make_agent(), make_agent()
    job = make_job(old, ranks=2, zero_copy_bytes=0)
    same_report(job.push(sharded(weights, 2)))
    missing = "http://127.0.0.1:9"
    for result in on_ranks(job, lambda p: p.catch_up(missing)):
        assert type(result) is AgentUnreachableError
    new.before["/pause"] = refuse(EngineError("not yet", hint="wait"))
    for result in on_ranks(job, lambda p: p.catch_up(new.url)):
        assert type(result) is EngineError
    assert one(on_ranks(job, lambda p: p.catch_up(new.url))).version == 1
    assert arrived(new, weights)
    assert old.calls.count("/init_transfer") == 1


def test_a_failed_push_leaves_nothing_to_catch_up_with(
    make_agent: Make, make_publisher: Make, model: Any
) -> None:
    old, new = make_agent(), make_agent()
    publisher = make_publisher(old)
    publisher.push(model)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(WeightSyncError):
        publisher.push(model)
    with pytest.raises(NoSessionError, match="or the last one failed"):
        publisher.catch_up(new.url)


def test_ranks_that_catch_up_different_agents_are_told(
    make_agent: Make, make_job: Make, weights: Any
) -> None:
    job = make_job(make_agent(), ranks=2)
    same_report(job.push(sharded(weights, 2)))
    results = on_all(
        [
            partial(p.catch_up, f"http://127.0.0.1:{9 + rank}")
            for rank, p in enumerate(job.publishers)
        ]
    )
    assert [type(r) for r in results] == [InputError] * 2
    assert "different agents" in str(results[0])


# ------------------------------------------------------------------ between steps


def test_a_check_tells_all_ranks_which_agents_a_push_would_lose(
    make_agent: Make, make_job: Make, weights: Any, caplog: pytest.LogCaptureFixture
) -> None:
    agents = [make_agent() for _ in range(4)]
    job = make_job(*agents, ranks=2, policy="available")
    assert [a.state for a in one(on_ranks(job, lambda p: p.check()))] == ["ready"] * 4
    state = type(agents[0].state)
    agents[1].state = state(phase="detached")
    agents[2].pause({})
    agents[3].state = state(phase="torn", target=3)
    found = one(on_ranks(job, lambda p: p.check()))
    assert [(a.ok, a.code) for a in found] == [
        (True, ""), (False, "engine_detached"), (False, "engine_paused"), (True, ""),
    ]  # fmt: skip
    one(on_ranks(job, lambda p: p.check()))
    told = [r.getMessage() for r in caplog.records if "is lost" in r.getMessage()]
    assert len(told) == 2, "each is told once, not at every step"
    assert all(a.calls == ["/status"] * 3 or "/pause" in a.calls for a in agents)


def test_a_check_fails_where_the_next_push_would(
    make_agent: Make, make_job: Make, weights: Any
) -> None:
    agents = [make_agent(), make_agent()]
    job = make_job(*agents, ranks=2)
    same_report(job.push(sharded(weights, 2)))
    agents[1].pause({})
    error = same_error_of_check(on_ranks(job, lambda p: p.check()), EnginePausedError)
    assert agents[1].url in str(error)
    agents[1].resume({})
    one(on_ranks(job, lambda p: p.check()))
    assert same_report(job.push(sharded(weights, 2))).rendezvous_s == 0


@pytest.mark.parametrize("policy", ["all", "available"])
def test_a_check_lets_go_of_an_engine_that_is_gone(
    make_agent: Make, make_job: Make, weights: Any, policy: str
) -> None:
    agents = [make_agent(), make_agent()]
    job = make_job(*agents, ranks=2, policy=policy)
    same_report(job.push(sharded(weights, 2)))
    before, agents[1].state = agents[1].state, type(agents[1].state)(phase="detached")
    results = on_ranks(job, lambda p: p.check())
    if policy == "all":
        same_error_of_check(results, EngineDetachedError)
    for publisher in job.publishers:
        assert [*publisher._held.session.members] == [agents[0].url]
    agents[1].state = before
    report = same_report(job.push(sharded(weights, 2)))
    assert [a.ok for a in report.agents] == [True, True]
    assert report.rendezvous_s > 0


def test_a_push_that_finds_no_engine_lets_go_of_it(
    make_agent: Make, make_job: Make, weights: Any
) -> None:
    agent = make_agent()
    job = make_job(agent, ranks=2)
    same_report(job.push(sharded(weights, 2)))
    agent.state = replace(agent.state, phase="detached")  # its session is still open
    results = job.push(sharded(weights, 2))
    assert [type(r) for r in results] == [EngineDetachedError] * 2
    assert [p._held.session for p in job.publishers] == [None, None]


def same_error_of_check(results: list[Any], kind: type[WeightSyncError]) -> WeightSyncError:
    assert [type(r) for r in results] == [kind] * len(results), results
    assert {str(r) for r in results} == {str(results[0])}
    return results[0]


# ------------------------------------------------------------------ every way out, on all ranks


class Struck(InMemoryTransport):
    """One of its calls fails for some peers, once it is armed."""

    def __init__(self, fabric: Fabric, call: str, hits: Callable[[str], BaseException | None]):
        super().__init__(fabric, "struck")
        known = getattr(self, call)

        def struck(what: Any, *args: Any, **kwargs: Any) -> Any:
            peers = [what] if call == "prepare" else [getattr(w, "peer", "") for w in _listed(what)]
            for peer in peers:
                if (error := hits(peer)) is not None:
                    raise error
            return known(what, *args, **kwargs)

        setattr(self, call, struck)


def _listed(what: Any) -> list[Any]:
    return list(what) if isinstance(what, list | tuple) else [what]


@pytest.mark.parametrize("error", [PeerLostError("gone", hint="look"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["prepare", "post", "wait"])
@pytest.mark.parametrize("does", ["push", "warmup", "catch_up"])
def test_what_fails_on_one_rank_with_a_newcomer_ends_on_all_and_the_next_push_is_whole(
    does: str, call: str, error: BaseException, make_agent: Make, make_job: Make, weights: Any,
    fabric: Fabric,
) -> None:  # fmt: skip
    old, new = make_agent(), make_agent()
    there, armed = [old.url], [True]

    def hits(peer: str) -> BaseException | None:
        return error if armed[0] and peer == getattr(new.workers[0].transport, "name", "") else None

    job = make_job(
        ranks=2, agents=lambda: there, coalesce_bytes=0, zero_copy_bytes=0,
        transports={1: lambda: Struck(fabric, call, hits)},
    )  # fmt: skip
    shards = sharded(weights, 2)
    same_report(job.push(shards))
    there.append(new.url)
    if does == "catch_up":
        results = on_ranks(job, lambda p: p.catch_up(new.url))
    else:
        calls = [partial(getattr(p, does), s) for p, s in zip(job.publishers, shards, strict=True)]
        results = on_all(calls)
    assert type(results[1]) is type(error)
    own = isinstance(error, KeyboardInterrupt)
    assert type(results[0]) is (RankFailedError if own else PeerLostError)
    assert "rank 1: " in str(results[0])
    if call == "prepare" or does == "warmup":
        assert old.state.phase == new.state.phase == "ready", "nothing was written to an engine"
    if does == "catch_up":
        assert (old.state.phase, old.state.version) == ("ready", 1), "it is no party to it"

    armed[0] = False
    report = same_report(job.push(shards))
    assert [a.ok for a in report.agents] == [True, True]
    assert arrived(old, weights)
    assert arrived(new, weights)
    for agent in (old, new):
        assert agent.generating


def test_a_write_that_one_rank_gave_up_ends_the_epoch_of_all(
    make_agent: Make, make_job: Make, weights: Any, fabric: Fabric
) -> None:
    good, bad = make_agent(), make_agent()
    armed = [True]

    def hits(peer: str) -> BaseException | None:
        late = DeadlineError("not completed", hint="push again")
        return late if armed[0] and peer == bad.workers[0].transport.name else None

    job = make_job(
        good, bad, ranks=2, policy="available", coalesce_bytes=0, zero_copy_bytes=0,
        transports={1: lambda: Struck(fabric, "wait", hits)},
    )  # fmt: skip
    shards = sharded(weights, 2)
    report = same_report(job.push(shards))
    assert [(a.ok, a.code) for a in report.agents] == [(True, ""), (False, "deadline_exceeded")]
    assert arrived(good, weights)
    results = on_ranks(job, lambda p: p.catch_up(bad.url))
    assert [type(r) for r in results] == [NoSessionError] * 2, "it may still land (WS-8)"
    armed[0] = False
    report = same_report(job.push(shards))
    assert [a.ok for a in report.agents] == [True, True]
    assert [a.calls.count("/init_transfer") for a in (good, bad)] == [2, 2]
    assert arrived(bad, weights)
