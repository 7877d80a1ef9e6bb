"""The core can plan for any model on any machine: it loads neither tensors nor servers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

PURE = [
    "errors",
    "lines",
    "dtypes",
    "geometry",
    "manifest",
    "layout",
    "ownership",
    "slots",
    "survey",
    "targets",
    "families",
    "families.grids",
    "families.torch",
    "families.trainer",
    "forecast",
    "plan",
    "coverage",
    "protocol",
    "codec",
    "worker_messages",
    "topology",
    "transport.base",
    "transport.slow_path",
    "state",
]
HEAVY = ["torch", "nixl", "fastapi", "vllm", "transformers", "triton", "httpx"]


def test_the_core_imports_neither_torch_nor_nixl_nor_fastapi_nor_vllm() -> None:
    modules = [f"weightsync.{name}" for name in PURE]
    assert all(importlib.util.find_spec(module) is not None for module in modules)
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {modules!r}:",
            "    importlib.import_module(name)",
            f"    loaded = [m for m in {HEAVY!r} if m in sys.modules]",
            "    assert not loaded, f'{name} loads {loaded}'",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
