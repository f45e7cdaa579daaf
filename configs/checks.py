"""Checks of a run before it starts: keys that must fit each other, and the data. Also draws its map.

`hp` is the training script's Hyperparameters, checked key by key before.
"""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.keys import error_context
from data.shards import check_stream, fineweb_shards_needed
from logs.log_file import plural
from logs.weights import read_weights

HEAD_DIM = 128


def expand_path(value: str) -> str:
    """A check for keys that name files: not empty, with ~ expanded."""
    if not value:
        raise ValueError("is empty; name a path, or leave the key out for its default")
    return os.path.expanduser(value)


def fitting_ranks(hp: Any) -> list[int]:
    """The numbers of ranks that can share a step's sequences and the validation's evenly."""
    shares = math.gcd(hp.sequences_per_step, hp.val_tokens // hp.val_seq_len)
    return [n for n in range(1, min(shares, 1024) + 1) if shares % n == 0]


def check_keys_together(hp: Any, world_size: int) -> None:
    """Raises ValueError if keys do not fit each other or the number of ranks."""
    if hp.model_dim != HEAD_DIM * hp.num_heads:
        raise ValueError(f"model_dim: {hp.model_dim} is not 128 * num_heads; "
                         f"use {HEAD_DIM * hp.num_heads} with num_heads {hp.num_heads}")
    if hp.val_tokens % hp.val_seq_len:
        raise ValueError(f"val_tokens: {hp.val_tokens} is not divisible by val_seq_len {hp.val_seq_len}; "
                         f"use {-(-hp.val_tokens // hp.val_seq_len) * hp.val_seq_len}")
    ranks = " or ".join(map(str, fitting_ranks(hp)))
    for name, count in (("sequences_per_step", hp.sequences_per_step), ("val_tokens", hp.val_tokens // hp.val_seq_len)):
        if count % world_size:
            raise ValueError(f"{name}: {count} sequences cannot be divided among {world_size} ranks; "
                             f"start {ranks} ranks (torchrun --nproc_per_node), or change the key")
    if hp.run_id is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError("run_id: torchrun restarts only a run with a number; give --run_id or --max-restarts=0")


def check_data(hp: Any, config: Path) -> None:
    """Raises ValueError or MissingShardsError if the shards are not there, are damaged or hold too few tokens."""
    step_tokens = hp.sequences_per_step * hp.train_seq_len
    fineweb_shards = fineweb_shards_needed(hp.num_iterations, step_tokens)
    for files, batch_tokens, needed, purpose in (
        ("train_files", step_tokens, hp.num_iterations, f"num_iterations = {hp.num_iterations}"),
        ("val_files", hp.val_seq_len, hp.val_tokens // hp.val_seq_len, f"val_tokens = {hp.val_tokens}"),
    ):
        with error_context(f"{config}: {files}"):
            check_stream(getattr(hp, files), hp.vocab_size, batch_tokens, needed, purpose, fineweb_shards)


def check_log_dir(folder: Path) -> None:
    """Raises ValueError if no logs can be written below a folder, which need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"log_dir: cannot write logs below {there}; set log_dir to a folder that you can write to")


def check_run(hp: Any, config: Path, world_size: int, make_model: Callable[[Any], nn.Module]) -> None:
    """Raises ValueError for the first thing but data that would stop this run: it names the file, the key and the fix.

    `make_model(hp)` is the model, for the names and shapes of its parameters.
    """
    with error_context(str(config)):
        check_keys_together(hp, world_size)
        check_log_dir(Path(hp.log_dir))
        with error_context("init_from"):
            if hp.init_from:
                read_weights(hp.init_from, make_model(hp))


def draw_map(tables_of_layers: list[list[int]], notes: dict[int, str]) -> str:
    """The layers from first to last, a column for each table: o if a layer uses it, | between its uses.

    Args: for each layer the tables that it uses; what is to be noted at a layer.
    """
    tables = range(1 + max((max(used, default=-1) for used in tables_of_layers), default=-1))
    uses = [[layer for layer, used in enumerate(tables_of_layers) if k in used] for k in tables]
    lines = [f"value embeddings: {plural(len(uses), 'table')}"]
    for layer, used in enumerate(tables_of_layers):
        cells = ["o" if layer in table else "|" if table[0] < layer < table[-1] else " " for table in uses]
        note = f"table{'s' * (len(used) > 1)} {', '.join(map(str, used))}" if used else notes.get(layer, "")
        lines.append(f"  layer {layer:2d}  {' '.join(cells)}  {note}".rstrip())
    return "\n".join(lines)


def count_parameters(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """How many parameters each group of the optimizers has."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group["params"]]
    counts = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    return "\n".join([f"parameters: {sum(counts.values()):,}", *(f"{n:>15,}  {name}" for name, n in counts.items())])
