# Sourced by examples/quickstart.sh and tests/run.sh: makes or reuses the virtual environment .venv inside the checkout.
# Afterwards `python` is the environment's, and GLMV_ROOT is the checkout. Works from any folder.
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, ...) are respected.

GLMV_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

glmv_find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "setup: Python 3.11 is needed and was not found; install it, or name it: PYTHON=/path/to/python3.11" >&2
    return 1
}

glmv_install() {
    local venv="$GLMV_ROOT/.venv" constraints="$GLMV_ROOT/constraints.txt" python
    pin() { grep "^$1==" "$constraints"; }
    if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
        python="$(glmv_find_python)" || return 1
        "$python" -m venv --clear "$venv" || {
            echo "setup: '$python -m venv' failed; on Debian and Ubuntu install python3.11-venv" >&2
            return 1
        }
    fi
    echo "setup: installing the pinned packages into .venv (once; some minutes)"
    # torch first and by its exact version: left open, pip may choose one that brings gigabytes of CUDA libraries.
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" "$(pin torch)" || return 1
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" -e "$GLMV_ROOT[dev]" || return 1
    # Beside the environment, not in it: its compiled part does not load next to a CPU torch, and transformers imports it
    # wherever it finds it. Only the parity tests of the image processors look here (tests/conftest.py).
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --upgrade \
        --target "$venv/parity" "$(pin torchvision)" || return 1
}

glmv_setup() {
    local stamp="$GLMV_ROOT/.venv/installed" start=$SECONDS wanted
    wanted="$GLMV_ROOT $(cat "$GLMV_ROOT/constraints.txt" "$GLMV_ROOT/setup.py" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        glmv_install || return 1
        echo "$wanted" >"$stamp" # last: an interrupted installation is taken up again
        echo "setup: done in $((SECONDS - start)) s"
    fi
    export VIRTUAL_ENV="$GLMV_ROOT/.venv" PATH="$GLMV_ROOT/.venv/bin:$PATH"
    unset PYTHONHOME
}

glmv_setup || exit 1
