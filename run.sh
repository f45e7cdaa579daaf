#!/usr/bin/env bash
# Set up what is missing, then train, or test:
#   ./run.sh [-n RUNS] [CONFIG.toml ...] [--KEY VALUE ...]
#       train each config RUNS times (1), run_id 0 of all, then run_id 1 of all ...; finished runs are skipped, interrupted
#       ones go on, so that the same command again does what is left. Without a config: baseline on GPUs, tiny on a CPU.
#   ./run.sh test [PYTEST OPTION ...]
#       run the tests
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
if int(versions["huggingface_hub"].split(".")[0]) < 1:
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
    packages="torch numpy huggingface_hub tqdm pytest pytest-xdist scipy matplotlib"
    [ "$(uname)" != Linux ] || packages+=" triton"
    find_python "$packages" requirements.txt tests/requirements.txt
    if command -v nvidia-smi >/dev/null; then
        workers=0 # tests side by side would not fit a GPU's memory
    else
        workers=2
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each worker and each rank
    fi
    exec "$python" -m pytest --numprocesses "$workers" --dist worksteal "$@"
fi

runs=1
if [ "${1-}" = -n ]; then
    [[ ${2-} =~ ^[1-9][0-9]{0,2}$ ]] || fail "-n takes the number of runs, 1 to 999, not '${2-}'"
    runs=$((10#$2))
    shift 2
fi
# A config is named as seen from where the user is; everything else is seen from the repository.
configs=()
while [[ -n ${1-} && $1 != -* ]]; do
    config=$1
    if [ "$PWD" != "$here" ] && [ -e "$config" ]; then
        config=$(cd "$(dirname "$config")" && pwd)/$(basename "$config")
    fi
    configs+=("$config")
    shift
done
run_ids=($(seq 0 $((runs - 1))))
options=()
while [ $# != 0 ]; do
    case $1 in
    --run_id | --run_id=*)
        [ "$runs" = 1 ] || fail "-n and --run_id exclude each other; leave one out"
        [[ $1 == *=* ]] || { [ $# != 1 ] && shift; } || fail "--run_id takes a number from 0 to 999"
        run_ids=("${1#--run_id=}")
        ;;
    *) options+=("$1") ;;
    esac
    shift
done
set -- ${options[@]+"${options[@]}"}
[[ ${run_ids[0]} =~ ^[0-9]{1,3}$ ]] || fail "run_id: '${run_ids[0]}' is no number from 0 to 999"
cd "$here"
find_python "torch numpy huggingface_hub tqdm" requirements.txt

if [ ${#configs[@]} = 0 ]; then
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        configs=(configs/baseline.toml)
        echo "run.sh: there are CUDA GPUs, so the config is ${configs[0]}"
    else
        configs=(configs/tiny.toml)
        echo "run.sh: there is no CUDA GPU, so the config is ${configs[0]}"
    fi
fi

# Text that the machine has, as shards of bytes: a few seconds.
if grep -qs 'data/local_text/' "${configs[@]}"; then
    if ! compgen -G 'data/local_text/local_train_*.bin' >/dev/null || ! compgen -G 'data/local_text/local_val_*.bin' >/dev/null; then
        "$python" data/local_text.py
    fi
fi

# What is wrong with a config or the data is said here, in one line; else this says how many ranks to start and where logs go.
# Where FineWeb's shards are wanting, the line says how many the config needs, and they are fetched.
check=("$python" train_gpt_medium.py "${configs[@]}" "$@" --check)
while ! report=$("${check[@]}" 2>&1); do
    shards=$(sed -n 's|.*; to fetch FineWeb: python data/cached_fineweb10B.py \([0-9]*\)$|\1|p' <<<"$report")
    # Twice for the same number: what is wrong is nothing that fetching mends.
    if [ -z "$shards" ] || [ "$shards" = "${fetched-}" ] || [[ " $* " == *" --check "* ]]; then
        echo "$report" >&2
        exit 2
    fi
    echo "run.sh: fetching FineWeb: the validation shard and $shards training shards"
    "$python" data/cached_fineweb10B.py "$shards"
    fetched=$shards
done
read -r ranks devices kind < <(sed -n 's/^ranks: \([0-9]*\) of \([0-9]*\) \([A-Za-z ]*\) here.*/\1 \2 \3/p' <<<"$report") || { echo "$report"; exit 0; }  # --help
if [[ " $* " == *" --check "* ]]; then
    echo "$report"
    exit 0
fi
if [ "$ranks" != "$devices" ]; then
    echo "run.sh: of $devices $kind $ranks can share the sequences evenly, so $ranks it is"
fi
if [ "$kind" = "CPU cores" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((devices / ranks))}"
fi

# The queue: config and run_id of each run that is not finished.
folders=()
while read -r folder; do
    folders+=("$folder")
done < <(sed -n 's/^logs: //p' <<<"$report")
is_finished() {
    [ -f "$1" ] && tail -n 20 "$1" | grep -q '^peak memory [a-z]*: [0-9]* MiB'
}
left=() finished=()
for run_id in "${run_ids[@]}"; do
    for i in "${!configs[@]}"; do
        log=${folders[i]}/$(printf %03d "$((10#$run_id))").txt
        if is_finished "$log"; then
            finished+=("$log")
        else
            left+=("$i $run_id $log")
        fi
    done
done
if [ ${#left[@]} = 0 ]; then
    echo "run.sh: finished already: ${finished[*]}; for more runs raise -n (./run.sh -n $((runs + 1)) ...)"
    exit 0
fi

# When $1 more runs will be over, from the seconds that the runs of this queue took, or else those of the finished logs.
projected_end() {
    "$python" - "$1" "${seconds[*]-}" "${finished[@]-}" <<'PYTHON'
import datetime, re, sys
count, seconds, *logs = sys.argv[1:]
seconds = [float(s) for s in seconds.split()]
if not seconds:
    lines = (re.findall(rb"^step:\d+/\d+ val_loss:\S+ train_time:(\d+)ms", open(log, "rb").read(), re.M) for log in logs if log)
    seconds = [int(found[-1]) / 1000 for found in lines if found]
if seconds:
    end = datetime.datetime.now() + datetime.timedelta(seconds=int(count) * sum(seconds) / len(seconds))
    print(f"projected end {end:%Y-%m-%d %H:%M}")
else:
    print("projected end unknown before the first has ended")
PYTHON
}

# The run's launcher is in a process group of its own, so that Ctrl-C reaches it once, as the SIGTERM sent on here; its ranks
# end when this script is gone.
export RUN_SH_PID=$$
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds for a checkpoint after a signal
launcher= stopped=
stop() {
    [ -n "$stopped" ] || [ -z "$launcher" ] || kill -TERM "$launcher" 2>/dev/null
    stopped=$1
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
seconds=() failed=()
for n in "${!left[@]}"; do
    [ -z "$stopped" ] || break
    read -r i run_id log <<<"${left[n]}"
    echo "run.sh: run $((n + 1)) of ${#left[@]}: $log; $(projected_end $((${#left[@]} - n)))"
    began=$SECONDS
    set -m
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" train_gpt_medium.py "${configs[i]}" "$@" --run_id "$run_id" \
        2> >(tee "$errors" >&2) &
    launcher=$!
    set +m
    [ -z "$stopped" ] || kill -TERM "$launcher" 2>/dev/null || true # it came while the launcher was being started
    status=0
    wait "$launcher" || status=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal ended the waiting
        wait "$launcher" || status=$?
    done
    if [ "$status" = 0 ]; then
        seconds+=($((SECONDS - began)))
        finished+=("$log")
    else
        sleep 0.5 # for the last lines to pass through tee
        why=$(grep '^train_gpt_medium.py: ' "$errors" | head -n 1 | cut -d ' ' -f 2-) || true
        [ -n "$why" ] || why="$log: $(grep -o 'Signal [0-9]* (SIG[A-Z]*)' "$errors" | head -n 1 || true) exit status $status; its output is above"
        failed+=("$why")
    fi
done
if [ ${#failed[@]} != 0 ]; then
    echo "run.sh: ${#failed[@]} of ${#left[@]} runs failed; the same command tries them again:" >&2
    printf 'run.sh: failed: %s\n' "${failed[@]}" >&2
fi
if [ -n "$stopped" ]; then
    echo "run.sh: stopped; the same command does what is left" >&2
    exit "$stopped"
fi
[ ${#failed[@]} = 0 ] || exit 1
