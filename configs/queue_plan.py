"""What a queue's command line asks for: read, with its data fetched, and checked against the runs that are finished."""

import argparse
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from configs.keys import OneLineParser, error_context
from data.shards import MissingShardsError
from logs.log_file import BOOKKEEPING_KEYS, end_with_parent, is_finished, read_header
from logs.run_log import say

ROOT = Path(__file__).resolve().parent.parent
FREE_KEYS = BOOKKEEPING_KEYS | {"seed", "run_id"}  # runs of one experiment may differ in these


class Experiment(NamedTuple):
    """A config with its options, checked."""

    config: Path
    options: list[str]  # --KEY=VALUE, for the training script
    folder: Path  # of its logs
    ranks: int
    devices: int
    kind: str  # "GPUs" or "CPU cores"
    configuration: dict[str, Any]  # resolved, JSON values
    code: str  # program text, as in a log's header
    drawing: str  # of the map, with the numbers of parameters
    check_data: Callable[[], None]  # raises ValueError, or MissingShardsError with the command that gets them
    read: Callable[[], tuple[dict[str, Any], str]]  # configuration and code as they are now; raises ValueError

    def log(self, run_id: int) -> Path:
        return self.folder / f"{run_id:03d}.txt"


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The queue's own options, wherever they stand, and the other words. Raises ValueError for a mistake in them.

    Two of them come parsed: `run_ids`, a range, and `notify`, a list of words.
    """
    usage = "./run.sh [-n RUNS] [CONFIG.toml ...] [--KEY VALUE ...] [--check] [--notify COMMAND]"
    parser = OneLineParser(usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("-n", metavar="RUNS", default="1")
    parser.add_argument("--run_id")
    parser.add_argument("--notify", metavar="COMMAND", default="")
    parser.add_argument("--check", action="store_true")
    options, words = parser.parse_known_args(arguments)
    if stray := [word for word in words if options.notify and len(word) > 1 and word[0] == "-" and word[1] != "-"]:
        raise ValueError(f"--notify: {stray[0]}: quote COMMAND with all its words, as in --notify 'mail -s done me'")
    first = options.run_id or "0"
    if not (options.n.isdecimal() and 1 <= int(options.n) <= 999):
        raise ValueError(f"-n takes the number of runs, 1 to 999, not '{options.n}'")
    if not (first.isdecimal() and int(first) <= 999):
        raise ValueError(f"--run_id takes a number from 0 to 999, not '{first}'")
    if options.run_id and int(options.n) > 1:
        raise ValueError("-n and --run_id exclude each other; leave one out")
    options.run_ids = range(int(first), int(first) + int(options.n))
    with error_context("--notify"):
        options.notify = shlex.split(options.notify)
        if options.notify and not shutil.which(options.notify[0]):
            raise ValueError(f"{options.notify[0]}: no such command; quote COMMAND with all its words")
    return options, words


def arrange(words: list[str]) -> list[str]:
    """First the configs, as seen from the repository, then the options, as --KEY=VALUE; without words, the default."""
    configs, options, rest = [], [], iter(words)
    for word in rest:
        if word in ("-h", "--help"):
            return ["--help"]
        if word.startswith("--"):
            options.append(word if "=" in word else "=".join([word, *itertools.islice(rest, 1)]))
        else:
            configs.append(os.path.abspath(word) if Path.cwd() != ROOT and os.path.exists(word) else word)
    return [*(configs or default_config()), *options]


def default_config() -> list[str]:
    import torch  # takes seconds, and is needed here only

    if torch.cuda.is_available():
        say("run.sh: no config is named, so it is configs/baseline.toml")
        return ["configs/baseline.toml"]
    say("run.sh: no config is named and PyTorch has no GPU, so it is configs/baseline.toml --scale tiny")
    return ["configs/baseline.toml", "--scale=tiny"]


def command_for_data(experiment: Experiment) -> tuple[str, ...]:
    """The command that gets an experiment's shards, () if they are all there. Raises ValueError if none would help."""
    try:
        experiment.check_data()
    except MissingShardsError as error:
        if not error.command:
            raise
        return error.command
    return ()


def get_data(experiments: list[Experiment]) -> None:
    """Check the data of all, then run the commands that get what is missing, until no new one would help.

    Raises ValueError if a command fails, and MissingShardsError if one does not help or there is none.
    """
    tried: set[tuple[str, ...]] = set()
    while commands := [command for command in map(command_for_data, experiments) if command and command not in tried]:
        command = commands[0]
        tried.add(command)
        say(f"run.sh: python {shlex.join(command)}")
        fetcher = subprocess.run([sys.executable, *command], preexec_fn=lambda: end_with_parent(signal.SIGTERM))
        if fetcher.returncode:
            raise ValueError(f"python {shlex.join(command)} failed, as the lines above say")
    for experiment in experiments:
        experiment.check_data()


def changed(experiment: Experiment) -> str:
    """Why a run would not be one of this experiment any more, "" if it would."""
    try:
        is_same = experiment.read() == (experiment.configuration, experiment.code)
    except (ValueError, OSError) as error:
        return str(error)
    return "" if is_same else "its config or the program was edited after the queue began; start the queue again"


def check_experiments(experiments: list[Experiment], run_ids: range) -> None:
    """Raises ValueError if runs would share a log, repeat each other, or stand beside those of another experiment."""
    config_of: dict[Path, Path] = {}
    for experiment in experiments:
        config, folder, configuration = experiment.config, experiment.folder, experiment.configuration
        if folder in config_of:
            raise ValueError(f"{config}: its logs would go to {folder}, as those of {config_of[folder]} do; "
                             "rename one of the configs, or name it once")
        config_of[folder] = config
        if configuration["run_id"] is not None:
            raise ValueError(f"{config}: run_id: the queue numbers the runs; remove the key, or use --run_id N")
        if configuration["seed"] is not None and len(run_ids) > 1:
            raise ValueError(f"{config}: seed: with one seed all {len(run_ids)} runs would be equal; leave it out "
                             "(the seed of a run is its number), or leave -n out")
        for log in filter(is_finished, sorted(folder.glob("[0-9][0-9][0-9].txt"))):
            with error_context(str(config)):
                check_same(log, configuration, experiment.code)


def check_same(log: Path, configuration: dict[str, Any], code: str) -> None:
    """Raises ValueError if a log is one of another configuration or program text."""
    log_code, log_configuration = read_header(log)
    shown = [[json.dumps(values.get(key)) for values in (configuration, log_configuration)]
             + [key] for key in configuration | log_configuration if key not in FREE_KEYS]
    differences = [f"{key} is {now}, but was {then}" for now, then, key in shown if now != then]
    if code != log_code:
        differences.append("the program text is not the one")
    if differences:
        names = (log.parent.with_name(f"{log.parent.name}.{n}") for n in itertools.count(1))
        new = next(path for path in names if not path.exists())
        raise ValueError(f"{differences[0]} in the finished run {log}; give the config another name, "
                         f"or move the folder: mv {shlex.quote(str(log.parent))} {shlex.quote(str(new))}")
