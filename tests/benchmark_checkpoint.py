"""What a checkpoint costs: python tests/benchmark_checkpoint.py [CONFIG.toml]

Trains CONFIG (default: configs/tiny.toml) for 40 steps on this process alone, with a checkpoint every 10, and prints how long
the training stands still for one (the clock does not run then), how long its file is being written beside the next
steps, its size, and the median step while a file is written and while none is.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt_medium as train  # noqa: E402

STEPS, EVERY = 40, 10


def main(config: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    overrides = {"num_iterations": str(STEPS), "seed": "0", "run_id": "0", "checkpoint_every": str(EVERY)}
    trainer = train.Trainer(train.load_hyperparameters(Path(config), overrides), train.Ranks.from_environment())
    batches = train.train_batches(trainer.hp, 0, 1, trainer.device)
    still, written, beside, alone = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = train.Checkpoints(trainer, train.RunLog(Path(folder) / "000.txt"), "")
        write = checkpoints.write

        def timed_write(checkpoint):
            began = time.perf_counter()
            write(checkpoint)
            written.append(time.perf_counter() - began)

        checkpoints.write = timed_write
        for step in range(STEPS):
            began = time.perf_counter()
            is_writing = checkpoints.writer is not None and checkpoints.writer.is_alive()
            trainer.train_step(step, *next(batches))
            if step:  # the first one warms everything
                (beside if is_writing else alone).append(time.perf_counter() - began)
            if checkpoints.is_due(step + 1):
                began = time.perf_counter()
                checkpoints.save(step + 1, 0.0)
                still.append(time.perf_counter() - began)
        checkpoints.wait()
        size = checkpoints.path.stat().st_size
    print(f"{config}: {size / 1e6:,.0f} MB; training stands still for {statistics.median(still) * 1000:,.0f} ms; "
          f"written in {statistics.median(written) * 1000:,.0f} ms beside the steps")
    shown = f"{statistics.median(beside) * 1000:,.1f} ms ({len(beside)} steps)" if beside else "no step long enough"
    print(f"median step: {statistics.median(alone) * 1000:,.1f} ms, while a file is written {shown}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "configs/tiny.toml")
