"""One trainer and three agents, each a host of its own: delay, loss, partition and heal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.conftest import OPTIONS
from tests.chaos.network import Network, network, why_not
from tests.support.stack import (
    TOKEN,
    Daemon,
    drawn_weights,
    environ,
    fresh_checksums,
    save,
    wait_until,
)

pytestmark = [
    pytest.mark.nixl,
    pytest.mark.chaos,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]

AGENTS = 3
#: of one frame, one way, and of how many frames; TCP makes good what is lost
DELAY_S, LOSS = 0.005, 0.01


@dataclass
class Fleet:
    """Three engines, each with its agent on a host of its own, and a trainer on a fourth."""

    network: Network
    checkpoint: Path
    folder: Path
    agents: list[Daemon]
    trainer: subprocess.Popen[str]
    seed: int = field(default=100)

    def get(self, agent: int, path: str) -> Any:
        answer = httpx.get(
            self.agents[agent].url + path,
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=10,
            trust_env=False,
        )
        return answer.json()

    def state(self, agent: int) -> str:
        return str(self.get(agent, "/status")["state"])

    def order(self, *, hold: str = "") -> dict[str, Any]:
        """Push new weights; what the trainer says next."""
        self.seed += 1
        folder = self.folder / f"given-{self.seed}"
        save(drawn_weights(self.checkpoint, self.seed), self.checkpoint, folder)
        return self.tell({"weights": str(folder / "model.safetensors"), "hold": hold})

    def tell(self, what: object) -> dict[str, Any]:
        assert self.trainer.stdin is not None
        self.trainer.stdin.write(json.dumps(what) + "\n")
        self.trainer.stdin.flush()
        return self.listen()

    def listen(self) -> dict[str, Any]:
        assert self.trainer.stdout is not None
        for line in self.trainer.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise AssertionError(f"the trainer ended with {self.trainer.wait(10)}")

    def wait_until_settled(self) -> None:
        for agent in range(AGENTS):
            wait_until(
                lambda a=agent: self.state(a) in ("ready", "torn"), f"agent {agent} has settled", 30
            )

    def assert_a_whole_push_works(self) -> None:
        """All three hold what was pushed, byte for byte."""
        self.wait_until_settled()
        done = self.order()
        assert "done" in done, done
        weights = drawn_weights(self.checkpoint, self.seed)
        fresh = fresh_checksums(weights, self.checkpoint, self.folder / f"saved-{self.seed}")
        for agent in range(AGENTS):
            held = self.get(agent, "/checksums")
            assert (held["version"], held["sha256"]) == (done["done"], fresh)
            assert self.state(agent) == "ready"


@pytest.fixture(scope="module")
def _fleet(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    started: list[Daemon] = []
    names = [f"ws-agent{a}" for a in range(AGENTS)]
    with network(["", "ws-trainer", *names]) as net, pytest.MonkeyPatch.context() as patch:
        # one kernel under all of them: without this UCX would find shared memory
        patch.setenv("UCX_TLS", "tcp,self")
        trainer_host, *hosts = net.hosts[1:]
        agents = []
        for host in hosts:
            engine = Daemon(
                "weightsync_server.engines.torch_host", ["--model", str(checkpoint)],
                folder / f"engine-{host.name}.log", alive="/health", prefix=host.exec,
            )  # fmt: skip
            agent = Daemon(
                "weightsync_server.agent.cli",
                ["--engine-url", engine.url, "--host", host.address, "--token-file", str(token),
                 "--engine-poll-s", "0.5", "--insecure-http",
                 "--journal", str(folder / f"{host.name}.journal"), *OPTIONS[2:]],
                folder / f"agent-{host.name}.log", alive="/healthz", host=host.address,
                prefix=host.exec,
            )  # fmt: skip
            for daemon in (engine, agent):
                started.append(daemon)
                daemon.start()
            agents.append(agent)
        script = Path(__file__).with_name("remote_trainer.py")
        with (folder / "trainer.log").open("wb") as log:
            trainer = subprocess.Popen(
                [*trainer_host.exec, sys.executable, str(script), TOKEN, *(a.url for a in agents)],
                env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        try:
            fleet = Fleet(net, checkpoint, folder, agents, trainer)
            for agent in agents:
                agent.wait_alive()
            for a in range(AGENTS):
                wait_until(lambda a=a: fleet.state(a) == "ready", f"agent {a} is ready", 90)
            assert fleet.listen() == {"ready": True}
            yield fleet
        finally:
            trainer.kill()
            trainer.wait(10)
            for stream in (trainer.stdin, trainer.stdout):
                if stream is not None:
                    stream.close()
            for daemon in reversed(started):
                daemon.stop()


@pytest.fixture
def fleet(_fleet: Fleet) -> Fleet:
    net = _fleet.network
    net.apart, net.delay_s, net.loss = set(), DELAY_S, LOSS
    _fleet.wait_until_settled()
    return _fleet


def test_a_push_to_three_hosts_through_delay_and_loss_is_whole(fleet: Fleet) -> None:
    before = fleet.network.lost
    fleet.assert_a_whole_push_works()
    assert fleet.network.lost > before, "nothing was lost, nothing was shown"


def test_a_host_that_cannot_be_reached_leaves_all_with_what_they_had(fleet: Fleet) -> None:
    fleet.assert_a_whole_push_works()
    held = [fleet.get(a, "/checksums") for a in range(AGENTS)]
    fleet.network.apart = {"ws-agent2"}
    said = fleet.order()
    assert said["error"] in {"AgentUnreachableError", "DeadlineError"}
    assert fleet.agents[2].url in said["message"]
    fleet.network.apart = set()
    fleet.wait_until_settled()
    assert [fleet.get(a, "/checksums") for a in range(AGENTS)] == held
    assert [fleet.state(a) for a in range(AGENTS)] == ["ready"] * AGENTS
    fleet.assert_a_whole_push_works()


@pytest.mark.parametrize("phase", ["pause", "write", "commit", "resume"])
def test_a_host_that_is_cut_off_in_a_push_never_serves_half_of_it(fleet: Fleet, phase: str) -> None:
    fleet.assert_a_whole_push_works()
    old = [fleet.get(a, "/checksums") for a in range(AGENTS)]
    assert fleet.order(hold=phase) == {"held": phase}
    fleet.network.apart = {"ws-agent1"}
    said = fleet.tell({})
    assert "error" in said, said
    fleet.network.apart = set()
    fleet.wait_until_settled()
    weights = drawn_weights(fleet.checkpoint, fleet.seed)
    new = fresh_checksums(weights, fleet.checkpoint, fleet.folder / f"cut-{phase}-{fleet.seed}")
    for agent in range(AGENTS):
        state = fleet.state(agent)
        if state == "ready":
            held = fleet.get(agent, "/checksums")
            assert held == old[agent] or held["sha256"] == new
        else:
            assert phase in ("write", "commit")
    fleet.assert_a_whole_push_works()


def test_all_hosts_apart_for_a_while_and_together_again(fleet: Fleet) -> None:
    fleet.assert_a_whole_push_works()
    fleet.network.apart = {f"ws-agent{a}" for a in range(AGENTS)}
    assert "error" in fleet.order()
    fleet.network.apart = set()
    fleet.assert_a_whole_push_works()
