"""docs/security.md's ten lines make certificates that agent and trainer take."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.torch_host import free_port

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "security.md").read_text()
MAKE, SERVE, ASK = re.findall(r"<!-- run(?:: background)? -->\n```sh\n(.*?)```", DOC, re.DOTALL)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_an_agent_takes_the_certificates_as_written_and_hears_nobody_without(tmp_path):
    scripts = Path(sys.executable).parent
    port = str(free_port())
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    roots = (ROOT, ROOT / "server", ROOT / "client")
    env |= {"WEIGHTSYNC_ENGINE_SECRET": "s" * 32, "PYTHONPATH": os.pathsep.join(map(str, roots))}

    def shell(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script.replace("9100", port)],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    made = shell(MAKE)
    assert made.returncode == 0, made.stderr
    assert all(p.stat().st_mode & 0o077 == 0 for p in tmp_path.iterdir())
    words = SERVE.replace("9100", port).replace("8000", str(free_port())).replace("\\\n", " ")
    with (tmp_path / "agent.log").open("w") as log:
        agent = subprocess.Popen(words.split(), cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while "https://127.0.0.1" not in (tmp_path / "agent.log").read_text():
            assert agent.poll() is None, (tmp_path / "agent.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        asked = shell(ASK)
        assert asked.returncode == 1, asked.stderr  # it answers; there is no engine
        (told,) = json.loads(asked.stdout)["agents"]
        assert told["status"]["state"] == "detached"
        without = shell(re.sub(r"WEIGHTSYNC_(CERT|KEY)_FILE=\S+", "", ASK))
        assert without.returncode == 4
        assert "--cert-file" in without.stdout
    finally:
        agent.terminate()
        agent.wait(timeout=20)
