"""A real vLLM that has the backend and no worker extension, and an agent beside it."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.integrations import doc
from tests.support.models import make_model
from tests.support.stack import TOKEN, Daemon, new_agent, wait_until
from tests.support.torch_host import ROOT


@dataclass(frozen=True)
class VllmStack:
    """Both run; ``token`` is a file."""

    checkpoint: Path
    server: Daemon
    agent: Daemon
    token: Path

    def get(self, path: str, of: str = "agent") -> dict[str, Any]:
        """An answer of the agent or of the server."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        url = getattr(self, of).url + path
        return dict(httpx.get(url, headers=headers, timeout=30, trust_env=False).json())


@contextmanager
def running(folder: Path, monkeypatch: Any, *, dev_mode: bool) -> Iterator[VllmStack]:
    """Both, from the moment that the agent has joined."""
    paths = [str(_installed_plugin(folder / "site")), os.environ.get("PYTHONPATH", "")]
    for name, value in {
        "PYTHONPATH": os.pathsep.join(paths), "VLLM_SERVER_DEV_MODE": str(int(dev_mode)),
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    checkpoint = make_model("qwen3", folder / "model", seed=1)
    options = ["--model", str(checkpoint), "--host", "127.0.0.1", "--skip-tokenizer-init"]
    options += ["--dtype", "bfloat16", "--max-model-len", "128", "--enforce-eager"]
    module = "vllm.entrypoints.openai.api_server"
    server = Daemon(module, [*options, *_of_the_page()], folder / "vllm.log", alive="/health")
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    agent = new_agent(server.url, folder / "agent.log", token)
    stack = VllmStack(checkpoint, server, agent, token)
    try:
        server.start()
        agent.start()
        server.wait_alive(300)
        agent.wait_alive()
        wait_until(lambda: stack.get("/status")["state"] == "ready", "the agent joined", 120)
        yield stack
    finally:
        agent.stop()
        server.stop()


def _installed_plugin(folder: Path) -> Path:
    """A folder for PYTHONPATH that has pyproject.toml's entry point, as an install would."""
    info = folder / "weightsync_under_test-0.dist-info"
    info.mkdir(parents=True)
    metadata = ["Metadata-Version: 2.1", "Name: weightsync-under-test", "Version: 0", ""]
    (info / "METADATA").write_text("\n".join(metadata))
    group = "vllm.general_plugins"
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    lines = [f"{name} = {value}" for name, value in table.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    return folder


def _of_the_page() -> list[str]:
    """The options of the page's command."""
    command = doc.block("vLLM's own weight-transfer API", "sh").split("weightsync-agent")[0]
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", "MODEL"]
    return words[3:]
