#!/usr/bin/env bash
# Makes .venv-integrations: other trainers' packages on top of .venv, which stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv-integrations list=requirements/integrations.txt
readonly stamp=$venv/.weightsync-setup
wanted=$( { pwd; cat "$list" .venv/.weightsync-setup 2>/dev/null || true; } | sha256sum)
[[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0

rm -rf "$venv"
.venv/bin/python -m venv "$venv"
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site .venv > "$(site $venv)/weightsync-beside.pth"
"$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps --requirement "$list"
echo "$wanted" > "$stamp"
