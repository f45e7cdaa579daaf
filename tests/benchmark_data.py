"""Time how fast training data reaches a rank, and how long a step waits for it: python tests/benchmark_data.py [FOLDER]

Makes full-size shards in FOLDER (default: a temporary one, 600 MB) and reads them as rank 0 of 8 and as the only rank:
as fast as possible, and at ten times the pace of 8 H100s (2.2M tokens per second), where it prints the longest wait for
a batch, at a switch of shards and elsewhere. Each with and without the files in the page cache (which it drops first).
"""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.loader import prefetch
from data.shards import locate_batches, num_batches, open_shards, write_shard

SHARDS, SHARD_TOKENS, STEP_TOKENS, VOCAB_SIZE = 3, 100_000_000, 8 * 65536, 50_257
H100S_TOKENS_PER_SECOND, SPEED_UP = 2.2e6, 10


def read_all(pattern, world_size, pace, is_cached):
    """Read the stream as rank 0, asking for a batch at most every `pace` seconds.

    Returns tokens per second, and the longest waits for a batch in ms, at switches of shards and elsewhere.
    """
    shards, count = open_shards(pattern, VOCAB_SIZE), STEP_TOKENS // world_size
    for shard in [] if is_cached else shards:
        os.fsync(shard.file.fileno())
        os.posix_fadvise(shard.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    positions = list(locate_batches(shards, STEP_TOKENS, 0, num_batches([s.num_tokens for s in shards], STEP_TOKENS)))
    begin = due = time.perf_counter()
    batches = prefetch(shard.read(position, count + 1).astype(np.int32) for shard, position in positions)
    waits = ([], [])
    for (shard, _), (previous, _) in zip(positions, positions[:1] + positions):
        time.sleep(max(0.0, due - time.perf_counter()) if pace else 0)
        asked_at = time.perf_counter()
        due = max(due, asked_at) + pace
        next(batches)
        waits[shard == previous].append(1000 * (time.perf_counter() - asked_at))
    return len(positions) * count / (time.perf_counter() - begin), *map(max, waits)


def benchmark(folder):
    for seed in range(SHARDS):
        tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, SHARD_TOKENS, dtype=np.uint16)
        write_shard(f"{folder}/bench_train_{seed:06d}.bin", tokens)
    pace = STEP_TOKENS / H100S_TOKENS_PER_SECOND / SPEED_UP
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n"
          f"a rank of 8 needs {H100S_TOKENS_PER_SECOND / 8:,.0f} tokens a second; paced: {pace * 1000:.1f} ms a batch\n"
          "| ranks | page cache | tokens a second | longest wait at a switch, paced | elsewhere, paced |\n"
          "|---|---|---|---|---|")
    for world_size, cache in ((8, "warm"), (8, "cold"), (1, "warm"), (1, "cold")):
        (rate, *_), (_, at_switch, elsewhere) = (
            read_all(f"{folder}/bench_train_*.bin", world_size, each_pace, cache == "warm") for each_pace in (0, pace))
        print(f"| {world_size} | {cache} | {rate / 1e6:,.1f}M | {at_switch:.2f} ms | {elsewhere:.2f} ms |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        benchmark(sys.argv[1] if len(sys.argv) > 1 else temporary)
