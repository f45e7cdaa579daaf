"""Batches for the model: each rank's part of the stream as tensors on its device, and checks before a run."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data.cached_fineweb10B import FINEWEB_FOLDER, absent_shards, shard_number
from data.local_text import BYTE_PAIRS_FOLDER, LOCAL_TEXT_FOLDER
from data.shards import MissingShardsError, Shard, locate_batches, num_batches, open_shards


def to_inputs_and_targets(tokens: np.ndarray, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Turn n*seq_len + 1 token ids into inputs (n, seq_len) int32 and targets (n, seq_len) int64 on the device."""
    ids = torch.from_numpy(tokens.astype(np.int32))
    if device.type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    return ids[:-1].view(-1, seq_len), ids[1:].long().view(-1, seq_len)


def prefetch(arrays: Iterator[np.ndarray], depth: int = 64) -> Iterator[np.ndarray]:
    """Start a thread that takes up to `depth` arrays ahead; return an iterator over them and their exception."""
    executor = ThreadPoolExecutor(max_workers=1)
    futures = deque(executor.submit(next, arrays, None) for _ in range(depth))

    def take() -> Iterator[np.ndarray]:
        while (array := futures.popleft().result()) is not None:
            futures.append(executor.submit(next, arrays, None))
            yield array
    return take()


def train_batches(shards: list[Shard], sequences_per_step: int, seq_len: int, first_step: int, num_iterations: int,
                  rank: int, world_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Return this rank's part of each batch from `first_step` on, (sequences_per_step / world_size, seq_len)."""
    tokens = sequences_per_step // world_size * seq_len
    places = locate_batches(shards, sequences_per_step * seq_len, first_step, num_iterations)
    arrays = prefetch(shard.read(position + rank * tokens, tokens + 1) for shard, position in places)
    return (to_inputs_and_targets(array, seq_len, device) for array in arrays)


def val_sequences(shards: list[Shard], seq_len: int, num_sequences: int, rank: int, world_size: int,
                  device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (number, inputs, targets) of this rank's sequences, (seq_len,) each. All ranks together read them all."""
    for number, (shard, position) in enumerate(locate_batches(shards, seq_len, 0, num_sequences)):
        if number % world_size == rank:
            inputs, targets = to_inputs_and_targets(shard.read(position, seq_len + 1), seq_len, device)
            yield number, inputs[0], targets[0]


def check_stream(pattern: str, vocab_size: int, end_of_text: int, batch_tokens: int, num_needed: int, purpose: str,
                 fineweb_shards: int | None) -> list[Shard]:
    """Return a stream's shards if they hold the batches that `purpose` needs and pass `check_tokens`.

    Raises MissingShardsError for missing and damaged shards, ValueError for other faults. For FineWeb, its command
    fetches at least `fineweb_shards` training shards; None means that all of them are too few.
    """
    try:
        shards = open_shards(pattern, vocab_size, batch_tokens, num_needed)
        for shard in shards:
            check_tokens(shard, end_of_text)
        lengths, names = [shard.num_tokens for shard in shards], {shard.path.name for shard in shards}
        if (found := num_batches(lengths, batch_tokens)) < num_needed:
            error = MissingShardsError if absent_shards(pattern, fineweb_shards or 0, names) else ValueError
            raise error(f"too few tokens: {purpose} needs {num_needed * batch_tokens:,} ({num_needed:,} x "
                        f"{batch_tokens:,}), {pattern} has {sum(lengths):,} (shards: {len(shards)}), enough for "
                        f"{found:,}; no batch spans two shards: ask for less or add shards")
        for name in absent_shards(pattern, max(map(shard_number, names)), names):
            raise MissingShardsError(f"{pattern}: {name} is missing though later shards are there, so the run would "
                                     "read other tokens; name the shards in the pattern, or fetch the missing ones",
                                     name)
        return shards
    except MissingShardsError as error:
        command = fetch_command(pattern, error.path, fineweb_shards, end_of_text + 1)
        raise MissingShardsError(str(error), error.path, command) from None


def check_tokens(shard: Shard, end_of_text: int) -> None:
    """Read a shard, or samples of a large one. Raises ValueError if no document starts there, or as `read` does."""
    num_samples, count = (1, shard.num_tokens) if shard.num_tokens <= 2**23 else (64, 2**14)
    starts = np.linspace(0, shard.num_tokens - count, num_samples).astype(int)
    if not any([end_of_text in shard.read(int(start), count) for start in starts]):  # a list, to read all
        raise ValueError(f"{shard.path}: no document starts: none of {num_samples * count:,} tokens is {end_of_text}; "
                         "set end_of_text to the id that starts documents, 50256 in GPT-2's shards, or make the data "
                         "with this vocabulary")


def fetch_command(pattern: str, path: str, fineweb_shards: int | None, vocab_size: int) -> list[str]:
    """Return the arguments of the Python command that gets a pattern's shards and `path`, or [] if there is none."""
    folder = os.path.realpath(os.path.dirname(pattern))
    if folder == os.path.realpath(FINEWEB_FOLDER) and fineweb_shards is not None:
        return ["data/cached_fineweb10B.py", str(max(fineweb_shards, shard_number(path)))]
    for own, words in ((LOCAL_TEXT_FOLDER, []), (BYTE_PAIRS_FOLDER, ["--vocab_size", str(vocab_size)])):
        if folder == os.path.realpath(own) and not any(own.glob("local_*.bin")):  # never replace the user's own text
            return ["data/local_text.py", *words]
    return []
