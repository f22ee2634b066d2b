#!/usr/bin/env bash
# The weights cache: a checkpoint is downloaded once for the cluster, into a folder that every node sees, and where asked for
# copied once to a node's own disk. Prints the folder to give as `model`.
#   weights.sh EleutherAI/gpt-neox-20b            -> /shared/weights/gpt-neox-20b
#   TP_LOCAL=/mnt/nvme weights.sh NAME            -> /mnt/nvme/weights/NAME, from /shared: run on every node that reads it
# TP_SHARED names another shared folder. Safe to run on several nodes at once, and again after it was interrupted.
set -euo pipefail
name=${1:?weights.sh: give a name, as in EleutherAI/gpt-neox-20b}
shared=${TP_SHARED:-/shared}/weights
[ -d "$(dirname "$shared")" ] || { echo "weights.sh: no folder $(dirname "$shared") here; mount it, or set TP_SHARED" >&2; exit 2; }
mkdir -p "$shared"

once() {  # once FOLDER COMMAND...: runs COMMAND with a draft of FOLDER, which is renamed when it is whole
  local folder=$1; shift
  exec 9>"$folder.lock"; flock 9
  if [ ! -d "$folder" ]; then "$@" "$folder.part" >&2; mv "$folder.part" "$folder"; fi
  exec 9>&-
}
download() { hf download "$name" --include '*.safetensors' '*.json' '*.txt' --local-dir "$1"; }  # no pickled weights
copy() { mkdir -p "$1"; cp -rT "$shared/$(basename "$name")" "$1"; }

folder=$shared/$(basename "$name")
once "$folder" download
if [ -n "${TP_LOCAL:-}" ]; then
  mkdir -p "$TP_LOCAL/weights"
  folder=$TP_LOCAL/weights/$(basename "$name")
  once "$folder" copy
fi
echo "$folder"
