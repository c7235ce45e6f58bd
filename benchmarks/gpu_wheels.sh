#!/usr/bin/env bash
# Collects the packages that a machine with torch, transformers and a GPU, but without network access, lacks for
# benchmarks/gpu_check.py, in the versions of constraints.txt:
#
#   benchmarks/gpu_wheels.sh FOLDER [PYTHON_VERSION]      on a machine that reaches a package index
#   pip install --no-index --no-deps --target SITE FOLDER/*.whl
#   PYTHONPATH=SITE python benchmarks/gpu_check.py --device cuda --out "$OUT"
#
# Wheels of bitsandbytes hold a library for each CUDA version; only those for CUDA 13.0 and for the CPU are kept. The
# folder must stay under 64 MiB, which is what such a machine may take.
set -euo pipefail

LIMIT=$((64 * 1024 * 1024))
PACKAGES=(
  bitsandbytes trl transformers peft datasets dill multiprocess xxhash
  huggingface_hub httpx2 httpcore2 truststore
  boto3 botocore s3transfer jmespath awscrt obstore
  pydantic pydantic_core annotated-types typing-inspection
)

folder=${1:?usage: benchmarks/gpu_wheels.sh FOLDER [PYTHON_VERSION]}
version=${2:-3.12}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)

pins=()
for package in "${PACKAGES[@]}"; do
  pin=$(grep -iE "^${package}==" "$here/constraints.txt") ||
    { echo "constraints.txt has no version of $package: remove it from this script or pin it" >&2; exit 1; }
  pins+=("$pin")
done

platforms=()
for glibc in 17 24 27 28 31 34; do # pip takes these literally: no newer glibc means an older one
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
mkdir -p "$folder"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$version" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
  --dest "$folder" "${pins[@]}"

"$python" - "$folder" <<'PYTHON'
import pathlib
import re
import sys
import zipfile

KEPT = re.compile(r"libbitsandbytes_(cuda130|cpu)\.so$")
(wheel,) = pathlib.Path(sys.argv[1]).glob("bitsandbytes-*.whl")
smaller = wheel.with_suffix(".part")
with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
    dropped = {n for n in source.namelist() if "/libbitsandbytes_" in n and not KEPT.search(n)}
    for name in source.namelist():
        content = source.read(name)
        if name.endswith(".dist-info/RECORD"):
            lines = content.decode().splitlines(keepends=True)
            content = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
        if name not in dropped:
            target.writestr(name, content)
smaller.rename(wheel)
PYTHON

size=$(du -cb "$folder"/*.whl | tail -1 | cut -f1)
wheels=("$folder"/*.whl)
echo "${#wheels[@]} wheels, $((size / 1024 / 1024)) MiB in $folder"
if ((size > LIMIT)); then
  echo "more than 64 MiB: remove packages that the machine has" >&2
  exit 1
fi
