"""The doctor's probe from GPU to GPU; with expandable segments it shows what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightsync_client.doctor.probe import probe

pytestmark = [pytest.mark.gpu, pytest.mark.nixl]
ROOT = Path(__file__).parents[2]


def environ(**more: str) -> dict[str, str]:
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **more}


def test_a_write_from_gpu_to_gpu_is_measured_and_well():
    write, transports = probe(environ(), gpu=True)
    assert write.severity == "ok", write
    assert "of VRAM from process to process" in write.what
    assert "cuda" in transports.what


def test_expandable_segments_show_in_the_rate():
    write, *_ = probe(environ(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"), gpu=True)
    assert write.severity != "ok", write
