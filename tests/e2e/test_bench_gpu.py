"""``weightsync bench gpu``, its cases run on the CPU: tiny models and the embedded engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weightsync_client.cli import app

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "weightsync_client", "bench", "gpu", "--device", "cpu"]


@pytest.mark.nixl
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_case_is_measured_and_written_into_the_folder(tmp_path: Path) -> None:
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*COMMAND, "--rounds", "2", "--warmup", "1", "--out", str(tmp_path), "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert json.loads((tmp_path / "bench-gpu.json").read_text()) == said
    assert "| push |" in (tmp_path / "bench-gpu.md").read_text()
    assert said["failed"] == {"vllm_nccl": "NCCL needs a GPU for each process"}
    pushes = {"push", "expandable_push", "moe_push", "cpu_trainer_cpu_thread"}
    pushes |= {"shadow_push", "shadow_paused", "shadow_prepare"}
    pushes |= {"fp8_push", "fp8_local_copy", "split_push", "slots_push"}
    assert pushes | {"raw_nixl_write", "gloo_broadcast"} <= said["seconds"].keys()
    assert all(len(series["values"]) == 2 for series in said["seconds"].values())
    assert said["ratios"]["write_vs_raw_nixl"] > 0
    assert said["ratios"]["write_vs_device_copy"] is None
    assert said["ratios"]["fp8_fill_vs_local_copy"] > 0
    assert said["ratios"]["split_write_vs_write"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "dance"], "cases"),
        (["--rounds", "1"], "rounds=1"),
        (["--device", "tpu"], "device=tpu"),
    ],
)
def test_a_bad_argument_ends_with_2(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", "gpu", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr


def test_without_a_gpu_nothing_is_started_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", "gpu"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there is no CUDA device here" in done.stderr
    assert list(tmp_path.iterdir()) == []
