#!/usr/bin/env bash
# ./run.sh [-n RUNS] [CONFIG.toml ...] [--KEY VALUE ...] [--check | --smoke] [--notify COMMAND]
#     Train each config RUNS times (1). Finished runs are skipped and interrupted ones resume: rerun the command to do
#     what remains. Without a config: configs/baseline.toml, and without a GPU --scale tiny with it.
#     --check: only check configs and data. --smoke: train a few steps on synthetic tokens, and report speed, memory,
#     loss and the length of a full run. --notify: after each run and at the end, run COMMAND and the result.
# ./run.sh status [FOLDER]: show what the queue does, and which runs with logs below FOLDER (logs) failed or diverged
# ./run.sh compare PATH ... [OPTION ...]: compare the logs below each PATH (./run.sh compare --help)
# ./run.sh test [PYTEST OPTION ...]: run the tests
# These use $PYTHON if it is set, else .venv if it exists, else python3 if it has the packages, else a new .venv.

[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # sh run.sh
set -euo pipefail
unset CDPATH WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE PYTHON_EXEC ${!PET_@} ${!TORCHELASTIC_@} # cd's, torchrun's
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
venv=$here/.venv python=${PYTHON:-python3}
use_venv() { python=$venv/bin/python && unset PYTHONPATH PYTHONHOME; } # these can lead to another Python's packages
[ -n "${PYTHON-}" ] || [ ! -x "$venv/bin/python" ] || use_venv
training="tomllib|tomli torch numpy tqdm huggingface_hub" comparing="tomllib|tomli numpy scipy matplotlib"
has() { # Whether the Python $1 has the modules $2..., of a|b one. It imports none, because PyTorch takes seconds.
    "$1" -c 'import sys; from importlib.util import find_spec as find; from importlib.metadata import version
lacks = ["Python 3.10"] * (sys.version_info < (3, 10)) or [m for m in sys.argv[1:] if not any(map(find, m.split("|")))]
if not lacks and "torch" in sys.argv and not (2, 11) <= tuple(map(int, version("torch").split(".")[:2])) <= (2, 13):
    lacks = ["PyTorch 2.11 to 2.13"]
sys.exit(f"run.sh: {sys.executable} lacks {lacks[0]}" if lacks else 0)' "${@:2}"
}
fail() { echo "run.sh: $*" >&2 && exit 2; }
get_python() { # Sets `python` to one that has the modules $1. In .venv, installs what it lacks of the files $2... once.
    [ -z "${PYTHON-}" ] || { why=$(has "$PYTHON" $1 2>&1) || fail "${why#run.sh: }; correct or unset PYTHON"; return; }
    [ -d "$venv" ] || ! has python3 $1 || return 0
    use_venv && pip=("$python" -m pip)
    [ -e "$python" ] || [ -L "$python" ] || { has python3 ensurepip && python3 -m venv "$venv"; } ||
        fail "cannot make $venv; install Python 3.10 or newer, on Ubuntu: sudo apt install python3 python3-venv"
    for file in "${@:2}"; do # its copy in .venv says that it is installed there
        ! cmp -s "$here/$file" "$venv/$file" || continue
        echo "run.sh: installing $file in $venv"
        "$python" -c "import pip" 2>/dev/null || { hash uv && pip=(uv pip); } 2>/dev/null || "$python" -m ensurepip || :
        sed "$(! has "$python" torch 2>/dev/null || echo '/^torch==/d')" "$here/$file" | # keep a suitable PyTorch
            VIRTUAL_ENV=$venv "${pip[@]}" install --quiet --requirement /dev/stdin || has "$python" $1 ||
            fail "cannot install $file; see the lines above"
        mkdir -p "$(dirname "$venv/$file")" && cp "$here/$file" "$venv/$file"
    done
    why=$(has "$python" $1 2>&1) || fail "${why#run.sh: }; install it there, or move $venv away and rerun"
}

case ${1-} in
status) exec "$python" "$here/logs/status.py" "${@:2}" ;;
compare) get_python "$comparing" logs/requirements.txt; exec "$python" "$here/logs/compare.py" "${@:2}" ;;
test) get_python "$training $comparing pytest xdist ruff" {,logs/,tests/}requirements.txt
    workers=0 # tests side by side would not fit a GPU's memory
    command -v nvidia-smi >/dev/null || { workers=2; export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; }
    cd "$here" && exec "$python" -m pytest --numprocesses "$workers" --dist worksteal "${@:2}" ;;
-h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$here/run.sh"; has "$python" $training 2>/dev/null || exit 0 ;;
*) get_python "$training" requirements.txt ;;
esac
exec "$python" "$here/configs/run_queue.py" "$@"
