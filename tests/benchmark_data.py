"""How fast training data reaches a rank, and how long a step ever waits for it: python tests/benchmark_data.py [FOLDER]

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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import batch_positions, open_shards, read_ahead, write_shard

SHARDS, SHARD_TOKENS = 3, 100_000_000
STEP_TOKENS = 8 * 65536
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


def read_all(pattern: str, world_size: int, pace: float | None) -> tuple[float, list[float], list[float]]:
    """Read the stream as rank 0; with a pace, no batch is asked for earlier than `pace` seconds after the one before.

    Returns tokens a second, and the seconds until a batch was there from when it was asked for, at switches of shards
    and elsewhere.
    """
    shards, count = open_shards(pattern), STEP_TOKENS // world_size
    positions = list(batch_positions([shard.num_tokens for shard in shards], STEP_TOKENS))
    begin = due = time.perf_counter()
    batches = read_ahead(shards[shard].read(position, count + 1).astype(np.int32) for shard, position in positions)
    waits: tuple[list[float], list[float]] = ([], [])
    previous = 0
    for shard, _ in positions:
        if pace is not None:
            time.sleep(max(0.0, due - time.perf_counter()))
            due = max(due, time.perf_counter()) + pace
        asked_at = time.perf_counter()
        next(batches)
        waits[shard == previous].append(time.perf_counter() - asked_at)
        previous = shard
    return len(positions) * count / (time.perf_counter() - begin), *waits


def benchmark(folder: Path) -> None:
    paths = make_shards(folder)
    pattern, pace = f"{folder}/bench_train_*.bin", STEP_TOKENS / H100S_TOKENS_PER_SECOND / SPEED_UP
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    print(f"a rank of 8 needs {H100S_TOKENS_PER_SECOND / 8:,.0f} tokens a second; paced: {pace * 1000:.1f} ms a batch")
    print("| ranks | page cache | tokens a second | longest wait at a switch, paced | elsewhere, paced |")
    print("|---|---|---|---|---|")
    for world_size in (8, 1):
        for cached in (True, False):
            results = []
            for each_pace in (None, pace):
                if not cached:
                    forget(paths)
                results.append(read_all(pattern, world_size, each_pace))
            (rate, *_), (_, at_switch, elsewhere) = results
            print(f"| {world_size} | {'warm' if cached else 'cold'} | {rate / 1e6:,.1f}M "
                  f"| {max(at_switch) * 1000:.2f} ms | {max(elsewhere) * 1000:.2f} ms |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        benchmark(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            benchmark(Path(temporary))
