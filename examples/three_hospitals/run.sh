#!/usr/bin/env bash
# Run a federation of a coordinator and three hospitals on this machine, with TLS and keys, as on four hosts.
#   examples/three_hospitals/run.sh [FOLDER]     # FOLDER (default: runs/three_hospitals) gets a folder per site
# Only PORT (default: 9092) is opened, on 127.0.0.1. Ctrl-C stops all processes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
fedamole=$(command -v fedamole) || fedamole=$here/../../.venv/bin/fedamole
[ -x "$fedamole" ] || { echo "fedamole is not installed: set up .venv with \`make demo\`" >&2; exit 1; }
mkdir -p "${1:-runs/three_hospitals}"
sites=$(cd "${1:-runs/three_hospitals}" && pwd)
port=${PORT:-9092}
hospitals="cancer_centre eye_hospital genetics_clinic"
certs=$(mktemp -d "${TMPDIR:-/tmp}/three-hospitals-XXXXXX")
running=""

stop() {
  trap - EXIT INT TERM
  [ -z "$running" ] || kill $running 2>/dev/null || true
  wait
  rm -rf "$certs"
}
trap stop EXIT
trap 'exit 130' INT TERM

# The coordinator makes the certificates; certs/clients/NAME is the folder for the hospital NAME.
"$fedamole" certs --folder "$certs" --host 127.0.0.1 \
  --client cancer_centre --client eye_hospital --client genetics_clinic > /dev/null

mkdir -p "$sites/coordinator"
(cd "$sites/coordinator" && exec "$fedamole" server "$here/config.toml" --certs "$certs" --port "$port") &
server=$!
running=$server

for hospital in $hospitals; do
  columns=""
  # This hospital's file has other column names.
  [ "$hospital" != genetics_clinic ] || columns="--column instruction=question --column response=answer"
  mkdir -p "$sites/$hospital"
  (
    cd "$sites/$hospital"
    exec "$fedamole" client --server "127.0.0.1:$port" --name "$hospital" --certs "$certs/clients/$hospital" \
      --data "$here/data/$hospital.jsonl" --policy "$here/policy.toml" --threads 1 $columns
  ) > "$sites/$hospital/client.log" 2>&1 &
  running="$running $!"
done

wait "$server" || { echo "the run failed; the hospitals' output is in $sites/*/client.log" >&2; exit 1; }

for hospital in $hospitals; do
  echo
  echo "the personal model of $hospital:"
  ls -d "$(ls -td "$sites/$hospital"/runs/three_hospitals-"$hospital"* | head -n 1)/clients/$hospital/adapter"/*
done
