"""Shadow mode and rollback with real vLLM, whose packed weights are staged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.cli import invoke
from tests.support.models import make_model
from weightsync_client.demo.ask import make_prompts
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Processes
from weightsync_client.demo.stack import Stack, shared_environ

pytestmark = [pytest.mark.nixl, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_rollback_brings_back_what_vllm_served_before(tmp_path, monkeypatch, packed):
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    models = [make_model("qwen3", tmp_path / f"m{k}", seed=k) for k in range(3)]
    with Processes(tmp_path, shared_environ(os.environ)) as processes:
        stack = Stack("one", DemoOptions(packed=packed), processes, Deadline(400))
        stack.start(models[0], 128)
        (status,) = stack.wait_ready()
        assert (sum(w["staged"] for w in status["workers"]) > 0) == packed
        agent = ("--agent", *stack.agent_urls)
        prompts = make_prompts(512)
        held = [(stack.checksums(), stack.answers(prompts))]
        for model in models[1:]:
            pushed = invoke("push", model, *agent, "--mode", "shadow", "--json")
            assert pushed.code == 0, pushed.err
            assert invoke("verify", model, *agent).code == 0
            held.append((stack.checksums(), stack.answers(prompts)))
        assert len({str(h) for h in held}) == 3
        back = invoke("rollback", *stack.agent_urls, "--json")
        assert back.code == 0, back.err
        assert back.json["agents"][0]["version"] == 1
        assert (stack.checksums(), stack.answers(prompts)) == held[1]
        assert invoke("verify", models[1], *agent).code == 0
        assert invoke("rollback", *stack.agent_urls).code == 1
        # and on from there, to the checkpoint that it was started with
        again = invoke("push", models[0], *agent, "--mode", "shadow", "--json")
        assert again.code == 0, again.err
        assert again.json["version"] == 3
        assert (stack.checksums(), stack.answers(prompts)) == held[0]
        stack.stop()
