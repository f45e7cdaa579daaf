#!/usr/bin/env bash
# Set up what is missing, then train, or test:
#   ./run.sh [CONFIG.toml] [--KEY VALUE ...]    train a config; without one, baseline on GPUs and tiny on a CPU
#   ./run.sh test [PYTEST OPTION ...]           run the tests
set -euo pipefail
unset CDPATH WORLD_SIZE # the one redirects cd; the other is for torchrun to set
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

# Whether the Python $1 has the packages $2 ...; of PyTorch, a version that the code runs on.
has_packages() {
    "$1" - "${@:2}" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    versions = {name: version(name) for name in sys.argv[1:]}
except PackageNotFoundError:
    sys.exit(1)
sys.exit(not (2, 11) <= tuple(int(x) for x in versions["torch"].split(".")[:2]) <= (2, 13))
PYTHON
}

# Sets `python`: the active one where it has what is needed, else that of .venv, where it is installed.
# $1: the packages, the rest: the requirements files that install them.
find_python() {
    local packages=$1
    shift
    python=$(command -v python3 || command -v python) || fail "no python3 found; install Python 3.11 or later"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is $("$python" --version 2>&1); Python 3.11 or later is needed"
    # shellcheck disable=SC2086 # one word a package
    has_packages "$python" $packages && return
    # Anew where it is missing, half made, or of a Python that is gone or too old.
    if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "run.sh: making a virtual environment in $here/.venv"
        "$python" -m venv --clear .venv || fail "could not make a virtual environment in $here/.venv; install the venv module of $python (on Debian: apt install python3-venv) or remove what stands there"
    fi
    python=.venv/bin/python
    # shellcheck disable=SC2086
    has_packages "$python" $packages && return
    echo "run.sh: installing $*"
    "$python" -m pip install --quiet "${@/#/--requirement=}" || fail "could not install $*; the lines above say why"
}

if [ "${1-}" = test ]; then
    shift
    cd "$here"
    find_python "torch numpy huggingface_hub tqdm pytest scipy matplotlib" requirements.txt tests/requirements.txt
    exec "$python" -m pytest "$@"
fi

# A config is named as seen from where the user is; everything else is seen from the repository.
config=
if [[ -n ${1-} && $1 != --* ]]; then
    config=$1
    shift
    if [ "$PWD" != "$here" ] && [ -e "$config" ]; then
        config=$(cd "$(dirname "$config")" && pwd)/$(basename "$config")
    fi
fi
cd "$here"
find_python "torch numpy huggingface_hub tqdm" requirements.txt

if [ -z "$config" ]; then
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        config=configs/baseline.toml
        echo "run.sh: there are CUDA GPUs, so the config is $config"
    else
        config=configs/tiny.toml
        echo "run.sh: there is no CUDA GPU, so the config is $config"
    fi
fi

# Text that the machine has, as shards of bytes: a few seconds.
if [ -f "$config" ] && grep -q 'data/local_text/' "$config"; then
    if ! compgen -G 'data/local_text/local_train_*.bin' >/dev/null || ! compgen -G 'data/local_text/local_val_*.bin' >/dev/null; then
        "$python" data/local_text.py
    fi
fi

# What is wrong with the config or the data is said here, in one line; else this says how many ranks to start.
# Where FineWeb's shards are wanting, the line says how many the config needs, and they are fetched.
check=("$python" train_gpt_medium.py "$config" "$@" --check)
report=$("${check[@]}" 2>&1) || {
    status=$?
    shards=$(sed -n 's|.*; to fetch FineWeb: python data/cached_fineweb10B.py \([0-9]*\)$|\1|p' <<<"$report")
    if [ -z "$shards" ] || [[ " $* " == *" --check "* ]]; then
        echo "$report" >&2
        exit "$status"
    fi
    echo "run.sh: fetching FineWeb: the validation shard and $shards training shards"
    "$python" data/cached_fineweb10B.py "$shards"
    report=$("${check[@]}")
}
read -r ranks devices kind < <(sed -n 's/^ranks: \([0-9]*\) of \([0-9]*\) \([A-Za-z ]*\) here.*/\1 \2 \3/p' <<<"$report") || { echo "$report"; exit 0; }  # --help
if [[ " $* " == *" --check "* ]]; then
    echo "$report"
    exit 0
fi
if [ "$ranks" != "$devices" ]; then
    echo "run.sh: of $devices $kind $ranks can share the config's sequences evenly, so $ranks it is"
fi
if [ "$kind" = "CPU cores" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((devices / ranks))}"
fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" train_gpt_medium.py "$config" "$@"
