"""The Ray example with Ray itself: two actors on this machine, agent, engine, every byte."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.support.stack import TOKEN, Stack, environ
from tests.support.torch_host import ROOT

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.nixl,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("ray")


def test_the_engine_has_what_two_actors_trained(stack: Stack, tmp_path):
    before = stack.status()["version"]
    options = ["--model", str(stack.checkpoint), "--agent", stack.agent.url]
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/examples/ray_push.py"), *options, "--save", tmp_path],
        env=environ() | {"WEIGHTSYNC_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert f"v{before + 2}  " in done.stdout
    stack.assert_holds(load_file(tmp_path / "model.safetensors"), before + 2)
