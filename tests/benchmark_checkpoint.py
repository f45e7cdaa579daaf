"""What a checkpoint costs: python tests/benchmark_checkpoint.py CONFIG.toml [--KEY VALUE ...], or by torchrun.

Trains for 20 steps with a checkpoint every 5, and prints the checkpoint's size, how long training stands still for one
(the clock does not run then), how much of that goes into the file, and how long a step takes.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt_medium as train  # noqa: E402
from logs import checkpoint  # noqa: E402

RUN = ["--num_iterations", "20", "--checkpoint_every", "5", "--val_loss_every", "0"]


def timed(owner, name: str, seconds: list[float], sizes: list[int] | None = None) -> None:
    """Have a function add to a list how long it took and, if it writes a file, to another the file's bytes."""
    function = getattr(owner, name)

    def replacement(*arguments):
        began = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - began)
        if sizes is not None:
            sizes.append(arguments[0].stat().st_size)

    setattr(owner, name, replacement)


def main(arguments: list[str]) -> int:
    still, written, sizes, steps = [], [], [], []
    timed(train, "save", still)
    timed(checkpoint, "write", written, sizes)
    timed(train.Trainer, "train_step", steps)
    with tempfile.TemporaryDirectory() as folder:
        status = train.main([*arguments, *RUN, "--log_dir", folder])
    if status == 0 and os.environ.get("RANK", "0") == "0":
        still_ms, written_ms, step_ms = (1000 * statistics.median(seconds) for seconds in (still, written, steps[1:]))
        print(f"{len(still)} checkpoints of {sizes[0] / 1e6:,.0f} MB: training stands still for {still_ms:,.0f} ms, of "
              f"which {written_ms:,.0f} ms write the file; a step takes {step_ms:,.0f} ms (medians)")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
