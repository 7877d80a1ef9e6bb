"""No interleaving of calls, losses, crashes and restarts tears an engine that serves, or blocks.

:mod:`tests.model.world` tells what the world is, :mod:`tests.model.explore` what must hold in it.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.model import agents, engines, world
from tests.model.explore import WITHIN, Explored, explore, heal, what_is_wrong, what_went_wrong
from tests.model.records import World, new_world
from tests.model.world import successors
from weightsync.state import Effect, Step, step
from weightsync.state_events import AbortAsked, Aborted


def assert_nothing_wrong(found: Explored) -> None:
    assert not found.wrong, "\n".join([found.wrong, *found.way])


@pytest.mark.parametrize(
    ("bounds", "pushes"),
    [
        ({"faults": 2}, 1),
        ({"faults": 1, "tries": 2}, 2),
        ({"faults": 1, "trainers": 2}, 2),
        ({"faults": 1, "agents": 2, "workers": 1}, 1),
        ({"faults": 1, "mode": "shadow"}, 1),
        ({"faults": 1, "mode": "shadow", "rollbacks": 1}, 1),
        ({"faults": 1, "ranks": 2}, 1),
        ({"faults": 1, "joined": True}, 1),
        ({"faults": 1, "joined": True, "mode": "shadow"}, 1),
        *(
            pytest.param(bounds, pushes, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
            for bounds, pushes in [
                ({"faults": 3}, 1),
                ({"faults": 2, "tries": 2}, 2),
                ({"faults": 2, "trainers": 2}, 2),
                ({"faults": 2, "agents": 2, "workers": 1}, 1),
                ({"faults": 2, "mode": "shadow"}, 1),
                ({"faults": 1, "trainers": 2, "mode": "shadow"}, 2),
                ({"faults": 1, "mode": "shadow", "rollbacks": 1, "tries": 2}, 2),
                ({"faults": 2, "mode": "shadow", "rollbacks": 1}, 1),
                # policy all: who has committed goes back when another cannot
                ({"faults": 1, "mode": "shadow", "agents": 2, "workers": 1}, 1),
                ({"faults": 2, "ranks": 2}, 1),
                ({"faults": 2, "joined": True}, 1),
                ({"faults": 1, "tries": 2, "joined": True}, 2),
                ({"faults": 1, "trainers": 2, "joined": True}, 2),
                ({"faults": 1, "joined": True, "mode": "shadow", "rollbacks": 1}, 1),
                ({"faults": 1, "ranks": 2, "trainers": 2, "workers": 1}, 2),
                ({"faults": 1, "ranks": 2, "mode": "shadow", "rollbacks": 1, "workers": 1}, 1),
            ]
        ),
    ],
    ids=str,
)
def test_no_world_that_can_be_reached_is_torn_and_serves_and_from_each_a_push_succeeds(
    bounds: dict[str, Any], pushes: int
) -> None:
    found = explore(new_world(**bounds))
    assert_nothing_wrong(found)
    assert found.pushes == pushes, "no whole push was among what was explored"
    assert found.torn > 100, "no engine was ever torn"
    assert found.healed_in <= WITHIN


# ------------------------------------------------------------------ what it would have noticed


def test_a_write_that_lands_after_its_registration_is_noticed() -> None:
    found = explore(new_world(tries=2, fenced=False))
    assert found.wrong == "engine 0 serves while it is torn"
    assert found.way[-1].startswith("a1's write to worker ")


def test_a_resume_that_the_engine_hears_in_a_later_push_is_noticed() -> None:
    found = explore(new_world(tries=2, ordered=False))
    assert found.wrong == "engine 0 serves while it is torn"
    assert found.way[-1] == "agent 0's late resume is heard"


def test_a_rollback_that_the_engine_hears_when_it_runs_again_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "IN_TURN", engines.IN_TURN - {Effect.ROLLBACK})
    found = explore(new_world(workers=1, faults=2, mode="shadow", rollbacks=1))
    assert found.wrong == "agent 0 tells another version than engine 0 has"
    assert found.way[-1] == "agent 0's late rollback is heard"


def test_a_commit_before_every_rank_has_written_is_refused_and_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hasty(worker, epoch, push, version):
        begun = worker.epoch == epoch and worker.push == (push, version)
        return begun and any(told == version for told, _ in worker.told)

    def early(w, write):  # all but the trainer that heals
        return w.trainers[0].name != "z" or not w.writes

    monkeypatch.setattr(world, "all_written", early)
    assert_nothing_wrong(explore(new_world(workers=1, ranks=2)))
    monkeypatch.setattr(engines, "_arrived", hasty)
    assert explore(new_world(workers=1, ranks=2)).wrong == "engine 0 serves while it is torn"


def test_an_agent_that_resumes_after_an_abort_whatever_the_workers_say_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def careless(state, event):
        after = step(state, event)
        aborted = isinstance(event, Aborted) and after.state.phase == "torn"
        return Step(after.state, (Effect.RESUME,)) if aborted else after

    monkeypatch.setattr(agents, "step", careless)
    found = explore(new_world())
    assert "torn" in found.wrong
    assert found.way[-1] == "agent 0: resume"


def test_an_agent_that_never_gives_a_dead_trainers_push_up_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def patient(state, event):
        return Step(state) if isinstance(event, AbortAsked) else step(state, event)

    monkeypatch.setattr(agents, "step", patient)
    assert explore(new_world()).wrong == "no whole push can follow"


# ------------------------------------------------------------------ further than all of them


class ManyFaults(RuleBasedStateMachine):
    """One way through a larger world, in which a fault may come at every step."""

    @initialize(
        agents=st.integers(1, 2),
        workers=st.integers(1, 2),
        mode=st.sampled_from(["direct", "shadow"]),
        ranks=st.integers(1, 2),
    )
    def begin(self, agents: int, workers: int, mode: str, ranks: int) -> None:
        self.world = new_world(
            trainers=2, agents=agents, workers=workers, ranks=ranks, tries=3, faults=12,
            mode=mode, rollbacks=3,
        )  # fmt: skip

    @rule(data=st.data())
    def anything_happens(self, data: st.DataObject) -> None:
        ways = [w for name, w in successors(self.world) if not name.startswith("FAULT")]
        self.move(data, ways)

    @rule(data=st.data())
    def a_fault_happens(self, data: st.DataObject) -> None:
        ways = [w for name, w in successors(self.world) if name.startswith("FAULT")]
        self.move(data, ways)

    def move(self, data: st.DataObject, ways: list[World]) -> None:
        if ways:
            before, self.world = self.world, data.draw(st.sampled_from(ways))
            assert not what_went_wrong(before, self.world)

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "world"):
            assert not what_is_wrong(self.world)
            assert heal(self.world)[0] <= WITHIN


ManyFaults.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_no_way_through_many_faults_ends_torn_or_blocked = ManyFaults.TestCase
