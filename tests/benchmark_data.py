"""Time how fast training data reaches rank 0 of 8, and how long a step waits: python tests/benchmark_data.py [FOLDER]

Makes full-size shards (600 MB) in a temporary folder, below FOLDER if given. Reads them outside and in the page cache,
as fast as possible and at ten times the pace of 8 H100s (2.2M tokens per second).
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.loader import prefetch
from data.shards import locate_batches, num_batches, open_shards, write_shard

SHARDS, SHARD_TOKENS, SEQ_LEN, RANKS = 3, 100_000_000, 65536, 8
STEPS_PER_SHARD = num_batches([SHARD_TOKENS], RANKS * SEQ_LEN)


def time_waits(shards, pace):
    """Read all batches as rank 0, one every `pace` seconds at most; return how long each took to arrive, in ms."""
    places = locate_batches(shards, RANKS * SEQ_LEN, 0, SHARDS * STEPS_PER_SHARD)
    batches, waits = prefetch(shard.read(position, SEQ_LEN + 1).astype(np.int32) for shard, position in places), []
    for _ in range(SHARDS * STEPS_PER_SHARD):
        asked_at = time.perf_counter()
        next(batches)
        waits.append(1000 * (time.perf_counter() - asked_at))
        time.sleep(max(0.0, pace - waits[-1] / 1000))
    return waits


with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
    for number in range(SHARDS):
        tokens = np.random.default_rng(number).integers(0, 50_257, SHARD_TOKENS, dtype=np.uint16)
        write_shard(f"{folder}/bench_train_{number}.bin", tokens)
    shards = open_shards(f"{folder}/bench_train_*.bin")
    for cache, pace in (("outside", 0), ("in", 0), ("outside", 1 / 42), ("in", 1 / 42)):
        for shard in shards if cache == "outside" else []:
            os.fsync(shard.file.fileno())
            os.posix_fadvise(shard.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        waits = time_waits(shards, pace)
        elsewhere = [wait for step, wait in enumerate(waits) if step % STEPS_PER_SHARD]
        print(f"{cache} the page cache, {'paced' if pace else 'as fast as possible'}: "
              f"{SEQ_LEN * len(waits) / sum(waits) / 1000:,.0f}M tokens per second of waiting; longest wait "
              f"{max(waits[STEPS_PER_SHARD::STEPS_PER_SHARD]):.2f} ms at a switch, {max(elsewhere):.2f} ms elsewhere")
