#!/usr/bin/env bash
# Builds Transformer Engine's torch extension on a machine without a GPU or a CUDA toolkit, once, and prints the path of
# the wheel. It is kept outside the clone, in ${XDG_CACHE_HOME:-~/.cache}/megatron-spin, under the versions that it is
# built for.
# Usage: scripts/transformer_engine_wheel.sh PYTHON
#   PYTHON: an interpreter with everything in requirements-latest.lock: torch's CUDA build, Transformer Engine's
#           libraries, and the headers of CUDA that the wheels of NVIDIA's libraries bring
#   MAX_JOBS: how many compilers run at a time (2)
set -euo pipefail

[[ $# == 1 ]] || { echo "usage: ${0##*/} PYTHON" >&2; exit 2; }
python=$(command -v "$1") || { echo "error: $1 is not there: give the python of an environment" >&2; exit 2; }

version=$("$python" -c 'from importlib.metadata import version; print(version("transformer-engine"))')
built_for=$("$python" -c 'import sys, torch; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}")')
[[ $built_for == *+cu* ]] || { echo "error: torch is no CUDA build ($built_for): install one" >&2; exit 2; }
kept=${XDG_CACHE_HOME:-$HOME/.cache}/megatron-spin/transformer_engine_torch-$version-$built_for

if ! compgen -G "$kept/*.whl" >/dev/null; then
  echo "builds transformer_engine_torch $version for $built_for: 15 minutes of a core; log: $kept.log" >&2
  mkdir -p "$kept"
  partial=$(mktemp -d "$kept.XXXX")
  trap 'rm -rf "$partial"' EXIT
  libraries=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])')
  includes=$(printf ':%s' "$libraries"/*/include)
  PATH=$(dirname "$python"):$PATH \
    MAX_JOBS=${MAX_JOBS:-2} NVTE_BUILD_THREADS_PER_JOB=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
    CUDA_HOME=$libraries/cu13 CPLUS_INCLUDE_PATH=${includes#:} \
    "$python" -m pip wheel --verbose --no-deps --no-build-isolation --no-binary transformer_engine_torch \
    --wheel-dir "$partial" "transformer_engine_torch==$version" >"$kept.log" 2>&1 || {
    tail -n 15 "$kept.log" >&2
    echo "error: the build failed (above; whole log in $kept.log): it needs g++ 11 or newer" >&2
    exit 2
  }
  mv "$partial"/*.whl "$kept"
fi
echo "$kept"/*.whl
