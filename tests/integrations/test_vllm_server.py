"""A real vLLM that has the backend and no worker extension, and a trainer of vLLM's own API."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import httpx
import pytest

from tests.support.models import make_model, new_model
from tests.support.stack import TOKEN, Daemon, new_agent, wait_until
from tests.support.torch_host import ROOT
from weightsync_client import Deadlines

pytestmark = [pytest.mark.vllm, pytest.mark.nixl, pytest.mark.timeout(500)]


def installed_plugin(folder: Path) -> Path:
    """A folder for PYTHONPATH that has pyproject.toml's entry point, as an install would."""
    info = folder / "weightsync_under_test-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: weightsync-under-test\nVersion: 0\n"
    )
    group = "vllm.general_plugins"
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    lines = [f"{name} = {value}" for name, value in table.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    return folder


@pytest.fixture
def vllm_server(tmp_path, monkeypatch):
    paths = [str(installed_plugin(tmp_path / "site")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    model = make_model("qwen3", tmp_path / "model", seed=1)
    options = ["--model", str(model), "--host", "127.0.0.1", "--skip-tokenizer-init"]
    options += ["--dtype", "bfloat16", "--max-model-len", "128", "--enforce-eager"]
    options += ["--weight-transfer-config", '{"backend": "weightsync"}']
    options += ["--middleware", "weightsync_server.middleware.WeightsyncMiddleware"]
    server = Daemon(
        "vllm.entrypoints.openai.api_server", options, tmp_path / "vllm.log", alive="/health"
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def agent(vllm_server, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    agent = new_agent(vllm_server.url, tmp_path / "agent.log", token)
    agent.start()
    try:
        yield agent
    finally:
        agent.stop()


def get(url: str) -> dict[str, object]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.get(url, headers=headers, timeout=30, trust_env=False)
    return dict(answer.json())


def test_a_trainer_of_vllms_api_switches_by_name(vllm_server, agent, tmp_path):
    from vllm.distributed.weight_transfer import (
        HTTPVLLMWeightSyncClient,
        ModuleSource,
        WeightTransferTrainerFactory,
    )

    from weightsync_client.integrations.vllm import WeightsyncTrainerInitInfo

    vllm_server.wait_alive(300)
    wait_until(lambda: get(f"{agent.url}/status")["state"] == "ready", "the agent joined", 120)
    client = HTTPVLLMWeightSyncClient(vllm_server.url)
    options = {"token": TOKEN, "progress": "off", "deadlines": Deadlines()}
    info = WeightsyncTrainerInitInfo(rank=0, agents=[agent.url], options=options)
    model = new_model("qwen3", seed=2)
    before = get(f"{agent.url}/checksums")["sha256"]
    trainer = WeightTransferTrainerFactory.trainer_init(
        info, client=client, source=ModuleSource(model)
    )
    try:
        trainer.send_weights()
    finally:
        trainer.shutdown()
    after = get(f"{agent.url}/checksums")["sha256"]
    assert get(f"{vllm_server.url}/weight_info") == {"weight_version": "1"}
    assert get(f"{agent.url}/status")["version"] == 1
    assert after.keys() == before.keys()
    embed = "model.embed_tokens.weight"
    assert after[embed] != before[embed]
    # what no agent has signed moves nothing, and what was not pushed is not confirmed
    for path, body in (
        ("init_weight_transfer_engine", {"init_info": {"command": "{}", "proof": "0" * 64}}),
        ("init_weight_transfer_engine", {"init_info": {}}),
    ):
        answer = httpx.post(f"{vllm_server.url}/{path}", json=body, timeout=30, trust_env=False)
        assert answer.status_code == 500
    client.start_weight_update()
    with pytest.raises(Exception, match="500"):
        client.update_weights({"version": 2})
    assert get(f"{agent.url}/checksums")["sha256"] == after
