"""What several test files need: shards, configs, and the program run as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import train_gpt_medium as train

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "train_gpt_medium.py"

# The expression that users' tools find validation lines with.
VAL_LINE = re.compile(r"^step:(\d+)/(\d+) val_loss:(\d+\.\d{6}) train_time:(\d+)ms step_avg:(\d+\.\d{2})ms$", re.MULTILINE)
TRAIN_LINE = re.compile(r"^step:(\d+)/(\d+) train_time:(\d+)ms step_avg:(\d+\.\d{2})ms$", re.MULTILINE)


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A shard in the speedrun's format; a wrong magic, version or count makes a bad one."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def random_tokens(n, seed, vocab_size, document=200):
    """Random token ids in documents of random lengths, `document` tokens in the mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size - 1, n)
    tokens[rng.random(n) < 1 / document] = vocab_size - 1
    return tokens


def write_config(path, **keys):
    Path(path).write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in keys.items()))
    return Path(path)


def run_program(*arguments, ranks=None, env=(), cwd=ROOT, timeout=900):
    """The program in a process of its own, under torchrun where `ranks` says how many; returns the finished process."""
    torchrun = [] if ranks is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *torchrun, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | dict(env), capture_output=True, text=True, timeout=timeout)


def train_in_child(arguments, output):
    """The program's `main`, with both its outputs in a file; ends the process."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
    os.dup2(1, 2)
    os._exit(train.main(arguments))


def val_losses(text):
    """{step: validation loss} of a log or of standard output."""
    return {int(match[1]): float(match[3]) for match in VAL_LINE.finditer(text)}


def start_trainer(config, **overrides):
    """A trainer in this process, which must be in a process group."""
    overrides = {name: str(value) for name, value in {"seed": 0, "run_id": 0, **overrides}.items()}
    return train.Trainer(train.load_hyperparameters(config, overrides), train.Ranks.from_environment())


def relative_error(actual, reference):
    return ((actual.double() - reference.double()).norm() / reference.double().norm()).item()


def weights_and_states(trainer):
    """Copies of a trainer's weights and of its optimizers' states."""
    states = [value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values() if value is not None]
    return [tensor.clone() for tensor in (*trainer.raw_model.state_dict().values(), *states)]
