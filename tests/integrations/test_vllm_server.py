"""A real vLLM with the backend, and a trainer of vLLM's own API."""

from __future__ import annotations

import httpx
import pytest

from tests.integrations.vllm_stack import running
from tests.support.cli import invoke
from tests.support.models import new_model
from tests.support.stack import TOKEN

pytestmark = [pytest.mark.vllm, pytest.mark.nixl, pytest.mark.timeout(500)]


@pytest.fixture
def stack(tmp_path, monkeypatch):
    with running(tmp_path, monkeypatch, dev_mode=True) as stack:
        yield stack


def test_a_trainer_of_vllms_api_switches_by_name(stack, tmp_path):
    from vllm.distributed.weight_transfer import (
        HTTPVLLMWeightSyncClient,
        ModuleSource,
        WeightTransferTrainerFactory,
    )

    from weightsync_client.integrations.vllm import WeightsyncTrainerInitInfo

    client = HTTPVLLMWeightSyncClient(stack.server.url)
    options = {"token": TOKEN, "progress": "off"}
    info = WeightsyncTrainerInitInfo(rank=0, agents=[stack.agent.url], options=options)
    model = new_model("qwen3", seed=2)
    trainer = WeightTransferTrainerFactory.trainer_init(
        info, client=client, source=ModuleSource(model)
    )
    # as trainers of vLLM's API do; the agent pauses by itself, and resumes
    paused = httpx.post(f"{stack.server.url}/pause?mode=abort", timeout=30, trust_env=False)
    assert paused.status_code == 200
    try:
        trainer.send_weights()
    finally:
        trainer.shutdown()
    assert stack.get("/is_paused", of="server") == {"is_paused": False}
    assert stack.get("/weight_info", of="server") == {"weight_version": "1"}
    assert stack.get("/status")["version"] == 1
    model.save_pretrained(tmp_path / "pushed")
    agent = ("--agent", stack.agent.url, "--token-file", stack.token)
    same = invoke("verify", tmp_path / "pushed", *agent)
    assert same.code == 0, same.out + same.err
    assert invoke("verify", stack.checkpoint, *agent).code == 1
    # what no agent has signed moves nothing, and what was not pushed is not confirmed
    sums = stack.get("/checksums")
    for init_info in ({"command": "{}", "proof": "0" * 64}, {}):
        url = f"{stack.server.url}/init_weight_transfer_engine"
        body = {"init_info": init_info}
        assert httpx.post(url, json=body, timeout=30, trust_env=False).status_code == 500
    client.start_weight_update()
    with pytest.raises(Exception, match="500"):
        client.update_weights({"version": 2})
    assert stack.get("/checksums") == sums
