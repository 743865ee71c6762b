#!/bin/sh
# Make the virtual environment $1: PyTorch of the right kind, the pinned dependencies, this package in
# place with its native kernels. Without an NVIDIA GPU the CPU build of PyTorch saves gigabytes; it has an
# index of its own, which is tried first and given up quickly where it cannot be reached.
set -eu
venv=${1:?usage: setup.sh VENV}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: MM-Rec needs Python 3.11 or newer, and $python is older; try: make setup PYTHON=python3.12" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

torch=$(grep '^torch==' constraints.txt)
kernels=cpu
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then kernels=all; fi
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [ "$kernels" = all ]; then
        echo "GPU found: installing $torch with CUDA"
        pip install --quiet --constraint constraints.txt "$torch"
    else
        echo "no GPU found: installing the CPU build of $torch"
        pip install --quiet --timeout 10 --retries 0 --constraint constraints.txt \
            --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null || {
            echo "download.pytorch.org cannot be used: taking $torch from the package index, which may bring CUDA along"
            pip install --quiet --constraint constraints.txt "$torch"
        }
    fi
fi
# The CUDA kernels only where a GPU is: they take many minutes.
export MM_REC_BUILD="${MM_REC_BUILD:-$kernels}"
echo "installing the other packages and compiling the native kernels ($MM_REC_BUILD): some minutes"
pip install --quiet --constraint constraints.txt --editable '.[dev]'
"$venv/bin/python" -c 'import mm_rec.ops as ops; print(ops.status())'
