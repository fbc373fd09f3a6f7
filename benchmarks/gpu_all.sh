#!/usr/bin/env bash
# Everything that waits for one Hopper GPU, as a section of docs/benchmarks_gpu.md.
#
#     bash benchmarks/gpu_all.sh [OUTPUT.md] [PART...]     # parts: see below; default: all of them
#     DRY_RUN=1 bash benchmarks/gpu_all.sh                 # anywhere: what would run, shapes checked
#
# Every part is a command that is ended after ten minutes, so that it also fits where none may take longer:
#     for part in tests fp8 photos text decode; do bash benchmarks/gpu_all.sh gpu.md $part; done
# A part appends to OUTPUT.md (default: gpu.md): the date, the commit, the machine, the command and the table it printed.
#
# The environment, with a network: see "On a GPU machine" in README.md, with [gpu,dev].
# Without one, on a machine that has torch for CUDA 13 and nvcc: bring the wheels of megatron-core, transformers, pydantic,
# nvidia-dali-cuda130, nvidia-nvimgcodec-cu13, av, transformer_engine, transformer_engine_cu13 and onnxscript, and the source of
# transformer_engine_torch (see TE_SOURCE below), install the wheels with `pip install --no-index --no-deps`, then
#     NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=16 pip install --no-index --no-deps --no-build-isolation TE_SOURCE.tar.gz
# which compiles the bindings for the torch that is there. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${1:-gpu.md}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests fp8 photos text decode)
limit=${LIMIT_S:-590}

commands() {
    case $1 in
        tests) echo "$python -m pytest -q -m gpu tests/data/test_images.py tests/data/test_video_frames.py tests/gpu/test_te_layers.py tests/gpu/test_hot_path.py" ;;
        fp8) echo "$python -m pytest -q -m gpu tests/gpu/test_fp8_on_device.py" ;;
        photos) echo "$python benchmarks/gpu_mfu.py --rows-of pictures ${DRY_RUN:+--dry-run}" ;;
        text) echo "$python benchmarks/gpu_mfu.py --rows-of text ${DRY_RUN:+--dry-run}" ;;
        decode) echo "$python benchmarks/gpu_decode.py ${DRY_RUN:+--dry-run}" ;;
        *) echo "gpu_all.sh: no part '$1'; there are tests fp8 photos text decode" >&2; return 2 ;;
    esac
}

machine() {
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no NVIDIA GPU"
}

versions() {
    "$python" - <<'PY'
from importlib import metadata

names = ("torch", "transformer_engine", "megatron-core", "nvidia-dali-cuda130")
found = []
for name in names:
    try:
        found.append(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        found.append(f"{name} not installed")
print(", ".join(found))
PY
}

status=0
for part in "${parts[@]}"; do
    command=$(commands "$part") || exit 2
    log=$(mktemp)
    echo "== $part: $command" >&2
    ended=0
    PYTHONPATH=. timeout "$limit" $command >"$log" 2> >(tee "$log.err" >&2) || ended=$?
    [ "$ended" -eq 0 ] || status=1
    {
        echo
        echo "## $part, $(date -u +%d\ %B\ %Y), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
        echo
        echo "\`$command\`, ended with $ended, on $(machine); $(versions)."
        echo
        cat "$log"
        grep '^missed: ' "$log.err" || true
    } >>"$output"
    rm -f "$log" "$log.err"
done
echo "gpu_all.sh: written to $output" >&2
exit "$status"
