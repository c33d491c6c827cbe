#!/usr/bin/env bash
# The kernels' and the transfer's tests over address- and thread-sanitizer builds of the native libraries, in a copy of
# the tree.
# Usage: tests/kernels/sanitize.sh PYTHON
set -euo pipefail
python=$(realpath --no-symlinks "$1")
root=$(cd "$(dirname "$0")/../.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
for part in kernels cache engine tests setup.py pyproject.toml README.md LICENSE; do cp -r "$root/$part" "$copy/"; done
cd "$copy"

run() { # name, library to preload, compiler flags, then the command in front of python
    echo "== $1 sanitizer =="
    FOREGATE_CXXFLAGS="-g -O1 -fno-omit-frame-pointer -fsanitize=$1" "$python" setup.py --quiet build_ext --inplace
    local preload
    preload=$(c++ -print-file-name="$2")
    env LD_PRELOAD="$preload" PYTHONPATH="$copy" OMP_NUM_THREADS=1 "${@:3}" "$python" -m pytest -q -x -p no:cacheprovider \
        tests/kernels/test_backends.py tests/kernels/test_experts.py tests/kernels/test_attention.py \
        tests/kernels/test_choose.py tests/cache/test_native_transfer.py -k "native and not portable"
}
run address libasan.so env ASAN_OPTIONS=detect_leaks=0
# libgomp is not instrumented, so torch keeps to one thread and only our own library is watched
run thread libtsan.so env TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" setarch -R
echo "both sanitizers are clean"
