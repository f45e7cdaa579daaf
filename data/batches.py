"""Batches for the model: which tokens of the shards each rank reads, as tensors on its device.

`hp` is the training script's Hyperparameters.
"""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.shards import Shard, batch_positions, read_ahead


def to_inputs_and_targets(tokens: np.ndarray, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs (n, seq_len) int32 and targets (n, seq_len) int64 on the device, from n*seq_len + 1 token ids."""
    ids = torch.from_numpy(tokens.astype(np.int32))
    if device.type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    return ids[:-1].view(-1, seq_len), ids[1:].long().view(-1, seq_len)


def train_positions(shards: list[Shard], hp: Any, first_step: int) -> Iterator[tuple[Shard, int]]:
    """(shard, position in it) of the training batch of each step from `first_step` on."""
    positions = batch_positions([shard.num_tokens for shard in shards], hp.sequences_per_step * hp.train_seq_len)
    return ((shards[i], position) for i, position in itertools.islice(positions, first_step, hp.num_iterations))


def next_batch(shards: list[Shard], hp: Any, step: int) -> list[str | int]:
    """The shard's name and the position in it of the batch of a step; [] at the end of the run."""
    return next(([os.path.basename(shard.path), position] for shard, position in train_positions(shards, hp, step)), [])


def train_batches(shards: list[Shard], hp: Any, rank: int, world_size: int, device: torch.device,
                  first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each batch from `first_step` on, (sequences_per_step / world_size, train_seq_len)."""
    tokens = hp.sequences_per_step // world_size * hp.train_seq_len
    arrays = read_ahead(shard.read(position + rank * tokens, tokens + 1)
                        for shard, position in train_positions(shards, hp, first_step))
    return (to_inputs_and_targets(array, hp.train_seq_len, device) for array in arrays)


def val_sequences(shards: list[Shard], hp: Any, rank: int, world_size: int,
                  device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, inputs, targets) of this rank's validation sequences, (val_seq_len,) each.

    The stream is cut sequence by sequence, so that every world size validates on the same sequences. (The reference
    cuts it by one sequence a rank; the two differ only if a shard ends within val_tokens.)
    """
    positions = batch_positions([shard.num_tokens for shard in shards], hp.val_seq_len)
    for number, (i, position) in enumerate(itertools.islice(positions, hp.val_tokens // hp.val_seq_len)):
        if number % world_size == rank:
            tokens = shards[i].read(position, hp.val_seq_len + 1)
            inputs, targets = to_inputs_and_targets(tokens, hp.val_seq_len, device)
            yield number, inputs[0], targets[0]
