"""docs/quickstart.md does what it says, on real vLLM."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.torch_host import free_port

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- run(?:: (?P<how>[^>]*?))? -->\n```sh\n(?P<script>.*?)```", re.DOTALL)


def _blocks():
    text = (ROOT / "docs" / "quickstart.md").read_text()
    return [(m["how"] or "", m["script"]) for m in BLOCK.finditer(text)]


def test_every_block_that_can_run_is_marked():
    text = (ROOT / "docs" / "quickstart.md").read_text()
    assert len(_blocks()) == text.count("<!-- run") == 8


@pytest.mark.vllm
@pytest.mark.nixl
@pytest.mark.timeout(400)
def test_quickstart_runs_as_written(tmp_path):
    ports = {"8000": str(free_port()), "9100": str(free_port())}
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "WEIGHTSYNC_ENGINE_SECRET_FILE": str(tmp_path / "secret"),
    }
    (tmp_path / "secret").write_text("s" * 32)
    background, output = [], ""
    try:
        for k, (how, block) in enumerate(_blocks()):
            script = block
            for old, new in ports.items():
                script = re.sub(rf"(127\.0\.0\.1:|--port ){old}\b", rf"\g<1>{new}", script)
            if "weightsync-agent" in script:
                script = script.rstrip() + f" --port {ports['9100']}\n"
            command = ["bash", "-euo", "pipefail", "-c", script]
            if how == "background":
                with (tmp_path / f"background{k}.log").open("w") as log:
                    background.append(
                        subprocess.Popen(
                            command, cwd=tmp_path, env=env, stdout=log, stderr=log,
                            start_new_session=True,
                        )
                    )  # fmt: skip
                continue
            tries = int(how.removeprefix("retry=") or 1)
            for left in reversed(range(tries)):
                done = subprocess.run(
                    command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180,
                    check=False,
                )  # fmt: skip
                if done.returncode == 0 or not left:
                    break
                time.sleep(1)
            logs = "".join(p.read_text()[-1500:] for p in tmp_path.glob("*.log"))
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}\n{logs}"
            output += done.stdout
    finally:
        for process in background:
            os.killpg(process.pid, signal.SIGTERM)
        for process in background:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=10)
    assert "version 3:" in output
    assert '"state":"ready","version":3' in output
    assert '"epoch":2' in output
    assert '"token_ids":[' in output
