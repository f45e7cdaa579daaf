"""Make the program importable, explain the markers, and hold the fixtures of several test files.

The process that only hands out tests to the workers loads this file too, and it imports no PyTorch.
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    for marker in ("slow: takes longer than two seconds, or is one of many alike; leave out with -m 'not slow'",
                   "gpu: needs a CUDA GPU; skipped elsewhere",
                   "campaign: shows something by many repetitions; only with -m campaign"):
        config.addinivalue_line("markers", marker)
    expression = config.option.markexpr
    if "campaign" not in expression:
        config.option.markexpr = f"({expression}) and not campaign" if expression else "not campaign"


def pytest_collection_modifyitems(items):
    import torch
    items.sort(key=lambda item: item.path.stem != "test_golden")  # they take a minute each, so none comes last
    for item in items if not torch.cuda.is_available() else []:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_step_timeout():
    """Stop the watchdog that a Trainer starts: it would end pytest minutes later."""
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Make a folder with shards of a vocabulary of 256: 3 x 20,000 training and 10,000 validation tokens."""
    from helpers import random_tokens

    from data.shards import write_shard
    folder = tmp_path_factory.mktemp("small_data")
    for number in (1, 2, 3):
        write_shard(folder / f"s_train_{number:06d}.bin", random_tokens(20_000, seed=number, vocab_size=256))
    write_shard(folder / "s_val_000000.bin", random_tokens(10_000, seed=0, vocab_size=256))
    return folder


@pytest.fixture
def small_config(small_data, tmp_path):
    """Write `small.toml`, a config of a small model for `small_data`, with keys changed; return its path."""

    from helpers import write_config

    def make(**changes):
        keys = dict(train_files=f"{small_data}/s_train_*.bin", val_files=f"{small_data}/s_val_*.bin",
                    log_dir=f"{tmp_path}/logs", vocab_size=256, num_heads=1, model_dim=128, train_seq_len=128,
                    val_seq_len=256, val_tokens=1024, sequences_per_step=4, num_iterations=4, val_loss_every=2,
                    warmup_steps=0)
        return write_config(tmp_path / "small.toml", **keys | changes)

    return make


@pytest.fixture(scope="session")
def process_group():
    """Start a process group of this process alone."""
    import torch.distributed as dist

    from logs import distributed
    distributed.start_process_group()
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def run_main(process_group):
    """Run the program's `main` in this process, as the only rank and on the CPU; return the exit status."""
    import torch
    import torch.distributed as dist

    import train_gpt_medium as train
    from logs import distributed

    def run(*arguments):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "start_process_group", lambda: None)
            patch.setattr(dist, "destroy_process_group", lambda: None)
            patch.setattr(distributed, "find_device", lambda: torch.device("cpu"))
            patch.setattr(os, "_exit", sys.exit)
            patch.setattr(torch._dynamo.callback_handler, "end_callbacks", [])  # they would keep the log open
            try:
                return train.main([str(argument) for argument in arguments])
            except SystemExit as end:
                return end.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    return run
