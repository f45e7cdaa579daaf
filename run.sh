#!/usr/bin/env bash
# ./run.sh [-n RUNS] [CONFIG.toml ...] [--KEY VALUE ...] [--check] [--notify COMMAND]
#     train each config RUNS times (1). Finished runs are skipped and interrupted ones go on, so the same command again
#     does what is left. Without a config: configs/baseline.toml, and without a GPU --scale tiny with it.
#     --check: check configs and data only. --notify: after each run and at the end run COMMAND with one more argument,
#     the line with the result.
# ./run.sh status [FOLDER]
#     what the queue does, and which runs with logs below FOLDER (logs) failed or diverged
# ./run.sh test [PYTEST OPTION ...]
#     run the tests

[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh run.sh
set -euo pipefail
unset CDPATH WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE # the first redirects cd; the others are torchrun's to set
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
venv=$here/.venv/bin/python

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

# Whether the Python $1 is one of 3.10 to 3.14 and has the module $2.
is_usable() {
    "$1" -c "import sys, $2; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))" 2>/dev/null
}

# Sets `python` to .venv's or the active one, whichever first has the requirements files $@; fails if neither has.
find_python() {
    python=$venv
    "$python" "$here/configs/packages.py" "$@" >/dev/null 2>&1 && return
    python=$(command -v python3 || command -v python) || { lacking="there is no python3" && return 1; }
    lacking=$("$python" "$here/configs/packages.py" "$@" 2>/dev/null) && return
    lacking="$python is passed over for .venv: ${lacking:-it does not run}"
    return 1
}

# Sets `python` to one that has the requirements files $@, which are installed in .venv if need be.
get_python() {
    find_python "$@" && return
    echo "run.sh: $lacking"
    if ! is_usable "$venv" pip; then
        for python in python3.14 python3.13 python3.12 python3.11 python3.10 python3 ""; do
            is_usable "${python:-false}" ensurepip && break
        done
        [ -n "$python" ] || fail "no Python 3.10 to 3.14 with its venv module; on Debian or Ubuntu:" \
            "sudo apt install python3 python3-venv"
        echo "run.sh: making $here/.venv with $("$python" --version)"
        "$python" -m venv --clear "$here/.venv" || fail "could not make $here/.venv, as the lines above say"
    fi
    python=$venv
    echo "run.sh: installing ${*#"$here/"} in $here/.venv"
    "$python" -m pip install --quiet "${@/#/--requirement=}" || fail "could not install them, as the lines above say"
}

case ${1-} in
status)
    for python in "$venv" python3 python python3.{14..10}; do
        ! is_usable "$python" json || exec "$python" "$here/logs/status.py" "${@:2}"
    done
    fail "no Python 3.10 to 3.14; on Debian or Ubuntu: sudo apt install python3"
    ;;
test)
    cd "$here"
    get_python requirements.txt tests/requirements.txt logs/requirements.txt
    workers=0 # tests side by side would not fit a GPU's memory
    if ! command -v nvidia-smi >/dev/null; then
        workers=2
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each worker and each rank
    fi
    exec "$python" -m pytest --numprocesses "$workers" --dist worksteal "${@:2}"
    ;;
-h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$here/run.sh"
    find_python "$here/requirements.txt" || exit 0 # the list of keys needs PyTorch
    ;;
*) get_python "$here/requirements.txt" ;;
esac
exec "$python" "$here/train_gpt_medium.py" --queue "$@"
