"""What several test files need: configs, trainers, and the program run as a user runs it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined
import train_gpt_medium as train
from configs.config import load

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "train_gpt_medium.py"

# The expressions that users' tools find the lines with.
TIMES = r"train_time:(\d+)ms step_avg:(\d+\.\d{2})ms$"
VAL_LINE = re.compile(rf"^step:(\d+)/(\d+) val_loss:(\d+\.\d{{6}}) {TIMES}", re.MULTILINE)
TRAIN_LINE = re.compile(rf"^step:(\d+)/(\d+) {TIMES}", re.MULTILINE)


def random_tokens(n, seed, vocab_size, document=200):
    """Random token ids in documents of random lengths, `document` tokens in the mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size - 1, n)
    tokens[rng.random(n) < 1 / document] = vocab_size - 1
    return tokens


def toml(value):
    """A JSON value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(entry)}" for name, entry in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list | tuple) else json.dumps(value)


def write_config(path, **keys):
    Path(path).write_text("\n".join(f"{name} = {toml(value)}" for name, value in keys.items()))
    return Path(path)


def run_program(*arguments, ranks=None, env=(), cwd=ROOT, timeout=900):
    """The program in a new process, under torchrun where `ranks` is given; returns the finished process."""
    torchrun = [] if ranks is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *torchrun, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | dict(env), capture_output=True, text=True, timeout=timeout)


def val_losses(text):
    """{step: validation loss} of a log or of standard output."""
    return {int(match[1]): float(match[3]) for match in VAL_LINE.finditer(text)}


def start_trainer(config, device="cpu", **overrides):
    """A trainer in this process, which must be in a process group."""
    texts = {name: str(value) for name, value in {"seed": 0, "run_id": 0, **overrides}.items()}
    return train.Trainer(load(train.Hyperparameters, config, texts), torch.device(device))


def model_on_meta(hp):
    """The model without memory behind its parameters."""
    with torch.device("meta"):
        return train.GPT(replace(hp, train_seq_len=128, val_seq_len=128))


def relative_error(actual, reference):
    return ((actual.double() - reference.double()).norm() / reference.double().norm()).item()


def weights_and_states(trainer):
    """Copies of a trainer's weights, each with its optimizer's states, in the order of their names."""
    tensors = []
    for _, p in sorted(trainer.model.named_parameters()):
        states = [optimizer.state[p] for optimizer in trainer.optimizers if p in optimizer.state]
        tensors += [p.detach(), *(tensor for state in states for _, tensor in sorted(state.items()))]
    return [tensor.clone() for tensor in tensors]
