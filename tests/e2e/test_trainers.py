"""The examples of docs/trainers.md: real trainers under torchrun, agent, engine, every byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.models import make_model
from tests.support.stack import TOKEN, Daemon, Stack, environ, new_engine
from tests.support.torch_host import ROOT

pytestmark = [pytest.mark.nixl, pytest.mark.timeout(240)]
EXAMPLES = ROOT / "docs" / "examples"


def run_example(name: str, ranks: int, stack: Stack, saved: Path) -> str:
    """Run it to its end; its output."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    options = ["--model", str(stack.checkpoint), "--agent", stack.agent.url, "--save", str(saved)]
    done = subprocess.run(
        [*launcher, str(EXAMPLES / name), *options],
        env=environ() | {"WEIGHTSYNC_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def assert_engine_has(saved: Path, stack: Stack) -> None:
    """What the engine holds is what a plain push of the saved weights leaves there."""
    after = stack.held()
    stack.push(load_file(stack.checkpoint / "model.safetensors"))
    assert stack.held().sha256 != after.sha256
    stack.push(load_file(saved / "model.safetensors"))
    again = stack.held()
    assert again.sha256 == after.sha256
    assert again.answer == after.answer


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("fsdp2.py", 2),
        pytest.param("plain.py", 1, marks=pytest.mark.slow),
        pytest.param("hsdp.py", 4, marks=pytest.mark.slow),
        pytest.param("tensor_parallel.py", 2, marks=pytest.mark.slow),
    ],
)
def test_the_engine_has_what_the_example_trained(
    name: str, ranks: int, stack: Stack, tmp_path: Path
) -> None:
    before = stack.status()["version"]
    printed = run_example(name, ranks, stack, tmp_path)
    assert f"v{before + 2}  " in printed
    assert stack.status()["version"] == before + 2
    assert_engine_has(tmp_path, stack)


@pytest.fixture
def moe_stack(tmp_path: Path) -> Iterator[Stack]:
    checkpoint = make_model("qwen3_moe", tmp_path / "model", seed=0)
    engine: Daemon = new_engine(checkpoint, tmp_path / "engine.log")
    engine.start()
    try:
        engine.wait_alive()
        stack = Stack(checkpoint, tmp_path, engine)
        try:
            stack.heal()
            yield stack
        finally:
            stack.close()
    finally:
        engine.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_parallel.py", "own_modules.py"])
def test_fused_experts_that_are_sharded_become_the_checkpoints_experts(
    name: str, moe_stack: Stack, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    run_example(name, 2, moe_stack, saved)
    assert_engine_has(saved, moe_stack)
