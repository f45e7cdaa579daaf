"""Measure the cost of a checkpoint: python tests/benchmark_checkpoint.py CONFIG.toml [--KEY VALUE ...], or torchrun.

Trains nothing: gives every parameter its optimizer states and saves them three times. Prints rank 0's medians. Set
MALLOC_MMAP_THRESHOLD_=65536, or else a second save reuses the memory of the first and hides its growth.
"""

import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import train_gpt_medium as train  # noqa: E402
from configs.config import load, parse_command_line  # noqa: E402
from logs import checkpoint, distributed, run_log  # noqa: E402


def memory(name: str) -> float:
    """Return VmRSS or VmHWM, its maximum since the last call of `save`, of this process in MB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def save(trainer: train.Trainer, log: run_log.RunLog) -> tuple[float, float, float]:
    """Return the seconds of a checkpoint, those of this process's CPU, and the MB by which the process grows."""
    distributed.synchronize(trainer.device)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before, start, start_cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    checkpoint.save(log, {}, trainer.model, trainer.optimizers, 1, 0.0)
    return time.perf_counter() - start, time.process_time() - start_cpu, memory("VmHWM") - before


def main() -> None:
    distributed.start_process_group()
    (config,), overrides, _ = parse_command_line(train.Hyperparameters, sys.argv[1:], __doc__)
    hp = load(train.Hyperparameters, config, {"seed": "0"} | overrides)
    trainer = train.Trainer(hp, distributed.find_device())
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizers[1].update = lambda *_: None  # Newton-Schulz takes minutes on a CPU
    for optimizer in trainer.optimizers:
        optimizer.step()
    trainer.model.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        log = run_log.RunLog(Path(folder) / "000.txt" if trainer.rank == 0 else None)
        seconds, of_cpu, growth = map(median, zip(*(save(trainer, log) for _ in range(3))))
        if log.path:
            size = run_log.checkpoint_path(log.path).stat().st_size / 1e6
            ranks = run_log.plural(trainer.world_size, "rank")
            print(f"{ranks}: a checkpoint of {size:,.0f} MB takes {seconds:,.2f} s, {of_cpu:,.2f} s of rank 0's CPU; "
                  f"rank 0 grows by {growth:,.0f} MB")


if __name__ == "__main__":
    main()
