"""A whole push with certificates on both sides: control over mTLS, workers by the side door."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.certificates import Authority
from tests.support.cli import invoke
from tests.support.stack import QUICK, TOKEN, Daemon, new_agent, wait_until
from weightsync.errors import AgentUnreachableError
from weightsync_client import Publisher
from weightsync_client.control import Fleet
from weightsync_client.tls import tls_context

pytestmark = pytest.mark.nixl


class TlsAgent:
    """An agent that hears trainers with a certificate only."""

    def __init__(self, engine: Daemon, folder: Path) -> None:
        authority = Authority(folder)
        cert, key = authority.issue("agent", "127.0.0.1")
        self.ca, self.trainer = authority.pem, authority.issue("trainer")
        self.token = folder / "token"
        self.token.write_text(TOKEN)
        self.daemon = new_agent(
            engine.url, folder / "agent.log", self.token,
            "--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(self.ca),
        )  # fmt: skip
        self.url = self.daemon.url.replace("http", "https", 1)

    def state(self) -> str:
        verify = tls_context(self.ca, self.trainer)
        with Fleet([self.url], token=TOKEN, deadlines=QUICK, verify=verify) as fleet:
            try:
                return str(fleet.agents[0].get("/status", timeout_s=5)["state"])
            except AgentUnreachableError:
                return "not there"


@pytest.fixture(scope="module")
def agent(engine: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsAgent]:
    engine.wait_alive()
    made = TlsAgent(engine, tmp_path_factory.mktemp("tls"))
    made.daemon.start()
    try:
        wait_until(lambda: made.state() == "ready", "the agent is ready", 30)
        yield made
    finally:
        made.daemon.stop()


@pytest.fixture
def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "model.safetensors")
    return {name: tensor * 1.25 for name, tensor in tensors.items()}


def test_a_push_goes_over_mtls_and_the_command_line_verifies_it(
    agent, weights, checkpoint, tmp_path
):
    with Publisher(
        [agent.url], token=TOKEN, verify=agent.ca, cert=agent.trainer, deadlines=QUICK,
        progress="off",
    ) as publisher:  # fmt: skip
        report = publisher.push(weights)
        assert publisher.push(weights).version == report.version + 1
    assert agent.state() == "ready"

    folder = tmp_path / "pushed"
    folder.mkdir()
    for config in checkpoint.glob("*.json"):
        (folder / config.name).write_bytes(config.read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = "--ca-file", agent.ca, "--cert-file", agent.trainer[0], "--key-file", agent.trainer[1]
    asked = "verify", folder, "--agent", agent.url, "--token-file", agent.token
    done = invoke(*files, *asked)
    assert done.code == 0, done.out + done.err
    assert "equal" in done.out
    assert invoke(*files[:2], *asked).code == 4


def test_a_trainer_without_a_certificate_pushes_nothing(agent, weights, monkeypatch):
    for name in [n for n in os.environ if n.startswith("WEIGHTSYNC_")]:
        monkeypatch.delenv(name)
    with (
        Publisher(
            [agent.url], token=TOKEN, verify=agent.ca, deadlines=QUICK, progress="off"
        ) as publisher,
        pytest.raises(AgentUnreachableError),
    ):
        publisher.push(weights)
    assert agent.state() == "ready"
