"""Measure the cost of a checkpoint: python tests/benchmark_checkpoint.py CONFIG.toml [--KEY VALUE ...], or torchrun.

Trains for 20 steps with a checkpoint every 5. Prints medians; train_time does not count checkpoints.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt_medium as train  # noqa: E402
from logs import checkpoint  # noqa: E402


def measure(owner, name: str) -> list[tuple[float, float]]:
    """Make a function append its milliseconds, and the MB of the file that it writes, to the returned list."""
    function, measured = getattr(owner, name), []
    def replacement(*arguments):
        start = time.perf_counter()
        function(*arguments)
        size = arguments[0].stat().st_size / 1e6 if isinstance(arguments[0], Path) else 0.0
        measured.append((1000 * (time.perf_counter() - start), size))
    setattr(owner, name, replacement)
    return measured


if __name__ == "__main__":
    saves, writes = measure(checkpoint, "save"), measure(checkpoint, "write")
    steps = measure(train.Trainer, "train_step")
    folder = f"{tempfile.gettempdir()}/benchmark_checkpoint_{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    options = ["--num_iterations=20", "--checkpoint_every=5", "--val_loss_every=0", f"--log_dir={folder}"]
    status = train.main([*sys.argv[1:], *options])
    if writes:  # on rank 0
        shutil.rmtree(folder)
        (save, _), (write, size), (step, _) = (map(median, zip(*each)) for each in (saves, writes, steps[1:]))
        print(f"a checkpoint of {size:,.0f} MB stops training for {save:,.0f} ms, {write:,.0f} ms of them to write the "
              f"file; a step takes {step:,.0f} ms")
    sys.exit(status)
