"""Starting a run or resuming it: its log, its lock and its checkpoints.

`hp` is the training script's Hyperparameters.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from configs.keys import error_context
from data.batches import next_batch
from data.shards import Shard, open_shards
from logs import checkpoint
from logs.log_file import BOOKKEEPING_KEYS, checkpoint_path, here_and_now, log_path
from logs.machine import describe_device, describe_environment
from logs.ranks import Diverged
from logs.run_log import RunLog, open_log


class Run(NamedTuple):
    """A checked run. After `claim` it also has its locked log and, if it was interrupted, the checkpoint to resume."""

    config: Path
    hp: Any
    device: torch.device
    code: str  # the program's text
    log: RunLog
    state: dict[str, Any] | None = None


def must_equal(run: Run, shards: list[Shard], step: int) -> dict[str, Any]:
    """What a run that goes on at a step must have in common with the run that was interrupted there."""
    configuration = {name: value for name, value in asdict(run.hp).items() if name not in BOOKKEEPING_KEYS}
    place = next_batch(shards, run.hp, step)
    return configuration | {"program text": run.code, "device": run.device.type, "next batch": place}


def claim(run: Run) -> Run:
    """Open and lock the run's log; if the run was interrupted, cut it back to its checkpoint. Only rank 0 calls this.

    Raises ValueError if the run is finished, if another process is running it, or if it is not the run interrupted.
    """
    hp = run.hp
    with error_context(f"{run.config}: log_dir: cannot write a log, set log_dir to a folder that you can write to"):
        log = open_log(log_path(hp.log_dir, hp.scale, run.config, hp.run_id or 0), is_new=hp.run_id is None)
    run_id = int(log.path.stem)
    run = run._replace(hp=replace(hp, run_id=run_id, seed=run_id if hp.seed is None else hp.seed), log=log)
    with error_context(f"{run.config}: run_id"):
        log.lock()
        shards = open_shards(hp.train_files)
        path = checkpoint_path(log.path)
        state = checkpoint.read_interrupted(path, lambda step: must_equal(run, shards, step))
        log.cut(state["log_bytes"] if state else 0)
    return run._replace(state=state)


def begin_log(run: Run, description: str) -> tuple[int, float]:
    """Write the header, or the line of a run that goes on; returns the step and the training time (ms) to begin at."""
    device_line = describe_device(run.device)
    if run.state is None:
        run.log.write_header(run.code, asdict(run.hp), describe_environment(), description, device_line)
        return 0, 0.0
    step, time_ms = run.state["step"], run.state["train_time_ms"]
    run.log.line(f"resumed at step {step} after {time_ms:.0f}ms of training; {here_and_now()}; {device_line}")
    return step, time_ms


def save(run: Run, shards: list[Shard], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int,
         train_time_ms: float) -> None:
    """Write the checkpoint to resume from at `step`; if it cannot be written, log that and go on.

    Raises Diverged if a weight or an optimizer state is not finite, and leaves the checkpoint before.
    """
    if not checkpoint.is_finite_everywhere(model, optimizers):
        raise Diverged(f"diverged at step {step}: a weight or an optimizer state is not finite")
    state = checkpoint.copy_state(model, *optimizers)
    if run.log.path is not None:
        common = json.dumps(must_equal(run, shards, step))
        state |= dict(step=step, train_time_ms=train_time_ms, log_bytes=run.log.size(), must_equal=common)
        try:
            checkpoint.write(checkpoint_path(run.log.path), state)
        except OSError as error:
            run.log.line(f"no checkpoint of step {step}: {error}; an earlier one stays")
