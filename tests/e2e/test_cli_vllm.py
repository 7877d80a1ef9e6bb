"""The commands against real vLLM: packed weights are staged, qkv is fused and cut over workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.cli import invoke
from tests.support.models import make_model
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Processes
from weightsync_client.demo.stack import Stack, shared_environ

pytestmark = [pytest.mark.nixl, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[2]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_push_verify_explain_and_doctor_of_two_workers_with_packed_weights(tmp_path, monkeypatch):
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    first = make_model("qwen3", tmp_path / "first", seed=1)
    second = make_model("qwen3", tmp_path / "second", seed=2)
    with Processes(tmp_path, shared_environ(os.environ)) as processes:
        stack = Stack("one", DemoOptions(packed=True, tp=2), processes, Deadline(400))
        stack.start(first, 128)
        (status,) = stack.wait_ready()
        assert sum(w["staged"] for w in status["workers"]) > 0
        agent = ("--agent", *stack.agent_urls)
        assert invoke("verify", first, *agent).code == 0  # as loaded
        pushed = invoke("push", second, *agent, "--json")
        assert pushed.code == 0, pushed.err
        sums = stack.checksums()
        equal = invoke("verify", second, *agent, "--json", "--max-slot-bytes", 2**20)
        assert equal.code == 0, equal.out + equal.err
        assert equal.json["equal"] is True
        other = invoke("verify", first, *agent, "--json")
        assert other.code == 1
        names = {n for d in other.json["agents"][0]["differs"] for n in d["checkpoint_tensors"]}
        assert names == set(load_file(second / "model.safetensors"))
        weights = load_file(second / "model.safetensors")
        weights[Q_PROJ][0, 0] += 1  # of the first worker alone
        save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
        (one,) = invoke("verify", second, *agent, "--json").json["agents"][0]["differs"]
        assert one["place"].endswith("tp0/ep0")
        assert one["kernel_tensor"] == "model.layers.0.self_attn.qkv_proj.weight"
        assert Q_PROJ in one["checkpoint_tensors"]
        assert stack.checksums() == sums  # nothing that serves was changed by any of it
        parts = invoke("explain", Q_PROJ, *agent, "--json").json["parts"]
        assert [p["box"] for p in parts] == [[[0, 128], [0, 256]], [[128, 256], [0, 256]]]
        assert {p["mode"] for p in parts} == {"staged"}
        doctor = invoke("doctor", *agent, "--engine-url", *stack.engine_urls, "--json")
        found = {f["id"]: f for f in doctor.json["findings"]}
        assert "staged" in found["agent.workers"]["what"]
        assert found["engine.middleware"]["severity"] == "ok"
        assert "engine.dev_mode" not in found
        stack.stop()
