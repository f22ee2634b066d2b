#!/usr/bin/env bash
# Installs ~/tp-decoders with the versions of constraints.txt into ~/venv and puts that on the PATH of remote shells. Run by
# `ray up` on every node; does nothing where the same tree was installed before.
#   install.sh [EXTRA PIP ARGUMENTS]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${TP_VENV:-$HOME/venv}

pick_python() {
  for name in ${TP_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"; return
    fi
  done
  echo "install.sh: no Python 3.11 or later with venv here; install python3.11 and python3.11-venv, or set TP_PYTHON" >&2
  return 1
}

profile() {  # remote commands of `ray exec`, `ray submit` and `ray down` use bare `ray`, `python`, `tp-decoders`
  local line="export PATH=$venv/bin:\$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"
  for file in "$HOME/.bashrc" "$HOME/.profile"; do
    grep -qxF "$line" "$file" 2>/dev/null || { echo "$line"; cat "$file" 2>/dev/null || true; } > "$file.new"
    if [ -s "$file.new" ]; then mv "$file.new" "$file"; else rm -f "$file.new"; fi
  done
}

wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum; echo "$*")
profile
if [ "$(cat "$venv/.tp-decoders" 2>/dev/null)" = "$wanted" ]; then echo "install.sh: up to date"; exit 0; fi
python=$(pick_python)
test -x "$venv/bin/python" || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "$@" -c "$root/constraints.txt" -e "$root[train]"
"$venv/bin/python" -c 'import torch, ray; print("install.sh: torch", torch.__version__, "ray", ray.__version__)'
echo "$wanted" > "$venv/.tp-decoders"
