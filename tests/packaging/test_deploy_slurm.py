"""The Slurm script runs, with stand-ins for Slurm: who is started where, with which secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"
STANDINS = {
    "scontrol": "printf '%s\\n' node-{1..4}",
    # what trains ends; what serves goes on until it is told to end
    "srun": """
case "$*" in
  *torchrun*)
    printf '%s\\n' "$*" > "$OUT/trainer"
    env | grep ^WEIGHTSYNC > "$OUT/environment"
    cp "${WEIGHTSYNC_CA_FILE%/*}"/*.pem "$OUT"
    stat -c %a "${WEIGHTSYNC_CA_FILE%/*}"/* | sort -u > "$OUT/modes" ;;
  *vllm*) printf '%s\\n' "$*" > "$OUT/engines"; exec sleep 60 ;;
  *) printf '%s\\n' "$*" > "$OUT/agents"; exec sleep 60 ;;
esac""",
    "weightsync": "test -s $OUT/agents -a -s $OUT/engines",
}


@pytest.fixture
def job(tmp_path):
    """What a job of four nodes with these variables does."""
    stand_ins, out = tmp_path / "bin", tmp_path / "out"
    stand_ins.mkdir()
    out.mkdir()
    for name, body in STANDINS.items():
        (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stand_ins / name).chmod(0o755)

    def run(**variables: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        env = {
            "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path),
            "OUT": str(out), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-4]",
            "SLURM_GPUS_ON_NODE": "8", "MODEL": "some/model", "TRAIN": "train.py",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", SCRIPT], env=env | variables, cwd=tmp_path, capture_output=True, text=True,
            timeout=50, check=False,
        )  # fmt: skip
        return done, out

    return run


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_the_first_nodes_train_and_the_others_serve_with_secrets_of_the_job(job, tmp_path):
    done, out = job(TRAINERS="2")
    assert done.returncode == 0, done.stderr
    assert "--nodelist=node-1,node-2 " in (out / "trainer").read_text()
    for name in ("agents", "engines"):
        assert "--nodelist=node-3,node-4 " in (out / name).read_text()
    told = dict(line.split("=", 1) for line in (out / "environment").read_text().splitlines())
    assert told["WEIGHTSYNC_AGENTS"] == "https://node-3:9100,https://node-4:9100"
    assert len(told["WEIGHTSYNC_TOKEN"]) == 64
    assert (out / "modes").read_text().split() == ["600"]
    certificate = x509.load_pem_x509_certificate((out / "agent.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-3", "node-4"]
    certificate.verify_directly_issued_by(
        x509.load_pem_x509_certificate((out / "ca.pem").read_bytes())
    )
    assert list((tmp_path / ".weightsync").iterdir()) == [], "the secrets go with the job"


def test_a_job_without_a_node_to_serve_says_so(job):
    done, _ = job(TRAINERS="4")
    assert done.returncode == 2
    assert "none is left to serve" in done.stderr
