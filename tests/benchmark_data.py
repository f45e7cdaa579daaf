"""How fast the training data reaches a rank, and how long a step ever waits for it: python tests/benchmark_data.py [FOLDER]

Makes full-size shards in FOLDER (default: a temporary one, 600 MB) and reads them as rank 0 of 8 and as the only rank:
- as fast as they come: tokens a second of this rank;
- at ten times the pace of 8 H100s, which train on 2.2M tokens a second: the longest that a batch was waited for, at a
  switch of shards and elsewhere.
Each with the files in the page cache and without (the kernel is asked to drop them first).
"""

import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import write_shard  # noqa: E402

import train_gpt_medium as train  # noqa: E402

SHARDS, SHARD_TOKENS = 3, 100_000_000
H100S_TOKENS_PER_SECOND = 2.2e6
SPEED_UP = 10


def make_shards(folder: Path) -> list[Path]:
    paths = [folder / f"bench_train_{number:06d}.bin" for number in range(1, SHARDS + 1)]
    for seed, path in enumerate(paths):
        write_shard(path, np.random.default_rng(seed).integers(0, 50_257, SHARD_TOKENS, dtype=np.uint16))
    return paths


def forget(paths: list[Path]) -> None:
    """Ask the kernel to drop the files from its page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@dataclass
class Waits:
    """Seconds until each batch was there, from when it was asked for."""

    start: float  # before the first: the clock of the training does not see it
    at_switch: list[float]
    elsewhere: list[float]
    tokens_per_second: float  # of this rank


def read_all(hp: train.Hyperparameters, world_size: int, device: torch.device, pace: float | None) -> Waits:
    """Read the stream as rank 0; with a pace, no batch is asked for earlier than `pace` seconds after the one before."""
    positions = list(train.batch_positions([SHARD_TOKENS] * SHARDS, hp.sequences_per_step * hp.train_seq_len))
    begin = time.perf_counter()
    batches = train.train_batches(hp, 0, world_size, device)
    waits, tokens = Waits(time.perf_counter() - begin, [], [], 0.0), 0
    begin = due = time.perf_counter()
    for number, (shard, _) in enumerate(positions):
        if pace is not None:
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter()) + pace
        asked_at = time.perf_counter()
        inputs, _ = next(batches)
        waited = time.perf_counter() - asked_at
        switched = number > 0 and positions[number - 1][0] != shard
        (waits.at_switch if switched else waits.elsewhere).append(waited)
        tokens += inputs.numel()
    waits.tokens_per_second = tokens / (time.perf_counter() - begin)
    return waits


def benchmark(folder: Path) -> None:
    paths = make_shards(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hp = train.Hyperparameters(train_files=f"{folder}/bench_train_*.bin", num_iterations=10**6)
    pace = hp.sequences_per_step * hp.train_seq_len / H100S_TOKENS_PER_SECOND / SPEED_UP
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {device}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"a rank of 8 needs {H100S_TOKENS_PER_SECOND / 8:,.0f} tokens a second; paced: {pace * 1000:.1f} ms a batch")
    print("| ranks | page cache | tokens a second | before the first batch | longest wait at a switch, paced | elsewhere, paced |")
    print("|---|---|---|---|---|---|")
    for world_size in (8, 1):
        for cached in (True, False):
            waits = []
            for each_pace in (None, pace):
                if not cached:
                    forget(paths)
                waits.append(read_all(hp, world_size, device, each_pace))
            fast, paced = waits
            print(f"| {world_size} | {'warm' if cached else 'cold'} | {fast.tokens_per_second / 1e6:,.1f}M | {paced.start * 1000:,.0f} ms "
                  f"| {max(paced.at_switch) * 1000:.2f} ms | {max(paced.elsewhere) * 1000:.2f} ms |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        benchmark(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            benchmark(Path(temporary))
