#!/usr/bin/env bash
# Collect this package and everything it needs as wheels in a new folder, with a list of their SHA-256 hashes. A machine
# without a network installs from that folder and refuses every file that was changed on the way:
#
#     scripts/make_wheelhouse.sh wheelhouse [EXTRAS]
#     pip install --no-index --find-links wheelhouse --require-hashes -r wheelhouse/requirements.txt
#
# Run it on a machine with the same operating system, processor and Python version. EXTRAS is a list of extras of
# pyproject.toml, "flower" by default. Versions are those of constraints.txt. Variables:
#     PYTHON       the Python to use; python3 by default
#     TORCH_INDEX  URL of the package index that has the wanted build of torch (CPU or a version of CUDA); where it is not
#                  set, torch comes from the same place as everything else
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: $0 FOLDER [EXTRAS]" >&2
  exit 2
fi
out=$1 extras=${2:-flower} python=${PYTHON:-python3}
if [ -e "$out" ]; then
  echo "$out exists already; choose a new folder, so that no wheel of an earlier version gets into the list" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
mkdir -p "$out"

# A copy is built, as a build leaves files beside the source.
cp -r "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/src" "$source"
rm -rf "$source"/src/*.egg-info

# torch comes first, and the exact build that was found is then the only one allowed.
"$python" -m pip wheel --no-deps --wheel-dir "$out" --constraint "$root/constraints.txt" \
  ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
torch=$(basename "$out"/torch-*.whl | cut -d- -f2)
echo "torch==$torch" > "$source/torch.txt"
"$python" -m pip wheel --wheel-dir "$out" --find-links "$out" --constraint "$root/constraints.txt" \
  --constraint "$source/torch.txt" "$source[$extras]"

"$python" - "$out" <<'PYTHON'
import hashlib
import sys
from pathlib import Path

folder = Path(sys.argv[1])
lines = []
for wheel in sorted(folder.glob("*.whl")):
    name, version = wheel.name.split("-")[:2]
    with wheel.open("rb") as file:
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}\n")
names = [line.split("==")[0] for line in lines]
if double := sorted({name for name in names if names.count(name) > 1}):
    sys.exit(f"{folder}: more than one wheel of {', '.join(double)}; remove the folder and try again")
(folder / "requirements.txt").write_text("".join(lines))
PYTHON
echo "$(wc -l < "$out/requirements.txt") wheels in $out; install them on the other machine:"
echo "pip install --no-index --find-links $out --require-hashes -r $out/requirements.txt"
