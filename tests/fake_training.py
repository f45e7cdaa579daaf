"""A queue whose runs take milliseconds: `python tests/fake_training.py FOLDER ARGUMENTS OF THE QUEUE ...`.

A config is JSON: keys of the configuration, `how` its runs end, and a command to `fetch` data, which is there once
FOLDER/shard is. Logs are below FOLDER/logs; each run adds a line of JSON to FOLDER/started. The same file is the
launcher of the runs.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULE = "=" * 100
CODE = "# train_gpt_medium.py\nprint('training')\n"
ENDED = f"ended: 2026-11-24 18:00:02 on host-{os.getpid()}: "  # of another time or place in each run
ENDS = {
    "fail": f"{ENDED}No space left on device",
    "diverge": f"diverged at step 2: the validation loss is nan\n{ENDED}diverged",
    "finish": "step:4/4 val_loss:2.919300 train_time:8000ms step_avg:2000.00ms\npeak memory resident: 9 MiB\n"
              f"{ENDED}finished",
}
DEFAULTS = {"description": "", "value_embeddings": [[0, 13]], "num_iterations": 4, "seed": None, "run_id": None}


def resolve(config, options):
    """The configuration, and how a run ends."""
    values = DEFAULTS | json.loads(Path(config).read_text())
    for name, text in (option[2:].split("=", 1) for option in options):
        values[name] = json.loads(text)
    return values, values.pop("how", "finish")


def read_experiment(config, options):
    """The configuration, and the program text."""
    values, _ = resolve(config, options)
    values.pop("fetch", None)
    return values, CODE


def launch(folder, _, program, config, *options):
    """What the run's launcher and ranks do, up to their end."""
    values, how = resolve(config, options)
    values.pop("fetch", None)
    log = folder / "logs" / Path(config).stem / f"{values['run_id']:03d}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    names = ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    write(folder / "started", json.dumps({"log": str(log), "pid": os.getpid()} | {n: os.environ.get(n) for n in names}))
    if how == "refuse":
        print(f"a warning\n{program}: {log}: its checkpoint is damaged", file=sys.stderr)
        sys.exit(1)
    configuration = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    write(log, f"{CODE}\n{RULE}\n{configuration}\n{RULE}\nstarted: 2026-11-24 18:00:01 on here\n{RULE}")
    write(log, "step:0/4 val_loss:10.825840 train_time:0ms step_avg:0.01ms")
    write(log, "step:1/4 train_time:2000ms step_avg:2000.00ms")
    if how == "wait":
        wait_for_sigterm(folder, log)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        write(log, ENDS[how])
        print("the last line of a run")
    sys.exit(how != "finish")


def wait_for_sigterm(folder, log):
    """Stop with a checkpoint a moment after SIGTERM; each SIGTERM is a line of FOLDER/signals."""
    stopped = []

    def note(number, _):
        stopped.append(number)
        write(folder / "signals", signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    write(folder / "waiting", "")
    while not stopped or (folder / "keep").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    write(log, f"{ENDED}stopped, with a checkpoint")


def write(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


def queue(folder, *arguments):
    sys.path.insert(0, str(ROOT))
    from configs import launch, queue_plan, run_queue
    from data.shards import MissingShardsError
    from logs import status

    def plan(words):
        if words == ["--help"]:
            print("the keys")
            sys.exit()
        experiments = []

        def check_data(command):
            if command is not None and not (folder / "shard").exists():
                raise MissingShardsError("no shards", command=tuple(command))

        for config in (Path(word) for word in words if not word.startswith("--")):
            options = [word for word in words if word.startswith("--")]
            read = partial(read_experiment, config, options)
            (configuration, code), fetch = read(), resolve(config, options)[0].get("fetch")
            experiments.append(queue_plan.Experiment(
                config, options, folder / "logs" / config.stem, 2, 8, "CPU cores", configuration, code,
                f"description of {config.stem}", partial(check_data, fetch), read))
        return experiments

    status.FOLDER = folder
    launch.TORCHRUN = [sys.executable, "-S", __file__, "launch", str(folder)]
    return run_queue.main(list(arguments), plan)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch(Path(sys.argv[2]), *sys.argv[3:])
    sys.exit(queue(Path(sys.argv[1]), *sys.argv[2:]))
