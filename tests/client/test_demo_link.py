"""The demo and its training job: every rank is told, rank 0 tells, a dead rank is named."""

from __future__ import annotations

import os
import sys

import pytest

from weightsync.errors import DeadlineError, EngineError, RankFailedError
from weightsync_client.demo import link
from weightsync_client.demo.processes import Deadline, Processes

#: repeats what it is told
ECHO = """
import json, os, sys
rank = os.environ["RANK"]
for line in sys.stdin:
    out = sys.stdout if rank == "0" else sys.stderr
    print(json.dumps({"event": line.strip(), "ranks": os.environ["WORLD_SIZE"]}), file=out)
"""
DIES = "raise SystemExit('no room for this rank')"
SLEEPS = "import time; time.sleep(60)"
FAILS = """
import json
from weightsync.errors import RankFailedError
print(json.dumps({"event": "failed", "problem": RankFailedError("rank 1 is gone").to_problem()}))
"""


class Scripted(Processes):
    """Starts a script in place of each rank."""

    scripts: tuple[str, ...] = ()

    def start(self, name, command, environ=None, *, talks=False):
        script = self.scripts[int(environ["RANK"])]
        return super().start(name, [sys.executable, "-c", script], environ, talks=talks)


@pytest.fixture
def job(tmp_path):
    with Scripted(tmp_path, os.environ) as processes:

        def start(*scripts):
            processes.scripts = scripts
            agents = ["http://127.0.0.1:1"]
            return link.TrainerLink(
                processes, None, tmp_path, agents, "cpu", len(scripts), Deadline(30)
            )

        yield start


def test_every_rank_is_told_and_rank_0_tells(job, tmp_path):
    trainer = job(ECHO, ECHO)
    trainer.tell("push")
    trainer.tell("save")
    assert [e["event"] for e in trainer.until("save")] == ["push", "save"]
    trainer.finish()
    told = (tmp_path / "trainer-rank-1.log").read_text().split()
    assert [word for word in told if word.startswith(('"push', '"save'))] == ['"push",', '"save",']


def test_a_rank_that_dies_is_named_when_rank_0_says_nothing(job, monkeypatch):
    monkeypatch.setattr(link, "_TELL_S", 0.3)
    with pytest.raises(EngineError, match="trainer rank 1 ended unexpectedly") as caught:
        job(SLEEPS, DIES).wait("made")
    assert "no room for this rank" in caught.value.message


def test_what_rank_0_says_of_a_dead_rank_comes_first(job):
    with pytest.raises(RankFailedError, match="rank 1 is gone"):
        job(FAILS, DIES).wait("made")


def test_a_job_that_does_not_end_is_told(job, monkeypatch):
    monkeypatch.setattr(link, "_EXIT_S", 0.3)
    with pytest.raises(DeadlineError, match="trainer rank 1 did not end"):
        job(ECHO, SLEEPS).finish()
