"""Checkpoints: initial weights, final weights, and the state from which an interrupted run resumes."""

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from logs.distributed import Diverged, describe_device, describe_environment, gather
from logs.log_format import BOOKKEEPING_KEYS, differences, format_header
from logs.run_log import RunLog, checkpoint_path, here_and_now, open_log

COMPILED_PREFIX = "_orig_mod."  # the published script saved its compiled module, which puts this before each name


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, replacing the one at `path`. Raises OSError if it cannot be written.

    The file at `path` is always complete: the new one is written beside it and renamed when it is on the disk.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name must be on the disk too
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        unfinished.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: {reason}") from None


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, memory-mapped unless in PyTorch's old format. `weights_only` refuses a file that runs code."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights in the CPU's memory, copied only from a GPU, under the names of a published checkpoint."""
    return {COMPILED_PREFIX + name: w.cpu() for name, w in model.state_dict().items()}


def read_weights(path: str, model: nn.Module) -> dict[str, Tensor]:
    """Read initial weights from a checkpoint of this program or of the published script, by the model's names.

    Raises ValueError if the file is not a checkpoint, or if a weight is missing, unknown, misshapen or not finite.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; name an existing checkpoint")
    try:
        weights = {name.removeprefix(COMPILED_PREFIX): w for name, w in load(path)["model"].items()}
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({type(error).__name__}); "
                         "name a file from torch.save, of a dict with the weights under 'model'") from None
    expected = model.state_dict()
    fix = "name a checkpoint of a model with the same value embeddings, vocab_size and model_dim"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{path}: parameter {missing[0]} is missing ({len(missing)} in all); {fix}")
    if unknown := [name for name in weights if name not in expected]:
        raise ValueError(f"{path}: parameter {unknown[0]} is not in this model ({len(unknown)} in all); {fix}")
    for name, w in weights.items():
        shape = list(w.shape) if isinstance(w, Tensor) else type(w).__name__
        if shape != list(expected[name].shape):
            raise ValueError(f"{path}: parameter {name} is {shape} instead of {list(expected[name].shape)}; {fix}")
        if not (w.layout == torch.strided and w.device.type == "cpu" and w.is_floating_point() and is_finite([w])):
            raise ValueError(f"{path}: parameter {name} is not a plain tensor of finite numbers ({w.dtype}); "
                             "name another checkpoint")
    return weights


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all numbers of all floating-point tensors are finite; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]).all())


def is_finite_everywhere(model: nn.Module, optimizers: Iterable[Optimizer]) -> bool:
    """Return whether all weights and optimizer states of all ranks are finite, on every rank."""
    states = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
    return all(gather(is_finite([*model.parameters(), *states])))


def states_of(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the states that an optimizer has on this rank, by the parameter's name; nothing is copied."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def collect_state(model: nn.Module, replicated: Optimizer, sharded: Optimizer) -> dict[str, Any]:
    """Collect weights and all ranks' optimizer states in rank 0's CPU memory; return {} on the other ranks.

    Every rank has the states of `replicated`; each of `sharded` is on one rank, which sends it tensor by tensor. What
    is in rank 0's CPU memory already is not copied.
    """
    rank, states = dist.get_rank(), states_of(model, sharded)
    forms = [(name, key, tensor.to("meta")) for name, state in states.items() for key, tensor in state.items()]
    for source, forms_of_source in enumerate(gather(forms)[1:], start=1):
        for name, key, form in forms_of_source if rank in (0, source) else ():
            if rank == 0:
                states.setdefault(name, {})[key] = torch.empty_like(form, device="cpu")
            content = states[name][key].cpu().reshape(-1).view(torch.uint8)  # gloo knows no uint16, Muon's mantissas
            dist.send(content, 0) if rank else dist.recv(content, source)
    if rank:
        return {}
    states |= states_of(model, replicated)
    states = {name: {key: tensor.cpu() for key, tensor in state.items()} for name, state in states.items()}
    return dict(model=weights_of(model), optimizer_states=states)


@torch.no_grad()
def restore(state: dict[str, Any], model: nn.Module, replicated: Optimizer, sharded: Optimizer) -> None:
    """Undo `collect_state`, on every rank; `sharded` takes the states of the parameters that it owns on this rank."""
    optimizer_of = {p: replicated for group in replicated.param_groups for p in group["params"]}
    optimizer_of |= dict.fromkeys(sharded.owned, sharded)
    for name, p in model.named_parameters():
        p.copy_(state["model"][COMPILED_PREFIX + name])
        if p in optimizer_of:
            tensors = state["optimizer_states"][name].items()
            optimizer_of[p].state[p] = {key: tensor.to(p.device, copy=True) for key, tensor in tensors}


def save(log: RunLog, identity: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer], step: int,
         train_time_ms: float) -> None:
    """Write the checkpoint from which the run can resume at `step`; if that fails, log a line and keep an earlier one.

    Every rank calls it. Raises Diverged if a number is not finite.
    """
    if not is_finite_everywhere(model, optimizers):
        raise Diverged(step, "a weight or an optimizer state is not finite")
    state = collect_state(model, *optimizers)
    if log.path is not None:
        state |= dict(step=step, train_time_ms=train_time_ms, log_bytes=log.size(), identity=json.dumps(identity))
        try:
            write(checkpoint_path(log.path), state)
        except OSError as error:
            log.line(f"no checkpoint at step {step}: {error}; any earlier checkpoint stays")


def read_resumable(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint of an interrupted run; return None if there is no file.

    Raises ValueError if the file is damaged, or if its identity is another one; the message names each difference.
    """
    if not os.path.lexists(path):
        return None
    fix = "move it and its log away to start the run over, or use another run_id"
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
        state = load(path)
        then, *_ = json.loads(state["identity"]), state["step"], state["train_time_ms"], state["log_bytes"]
        changes = differences(then, identity, BOOKKEEPING_KEYS)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint to resume from ({type(error).__name__}: {error}); {fix}") from None
    if changes:
        raise ValueError(f"{path}: the interrupted run is not this one: {', '.join(changes)}; set that back, or {fix}")
    return state


def open_run(path: Path, is_new: bool, identity: dict[str, Any]) -> tuple[RunLog, dict[str, Any], dict | None]:
    """Lock a log on rank 0, truncated to its checkpoint; return it, the identity with run_id and seed, the checkpoint.

    Raises ValueError if the log cannot be written, or if the run is finished, is running or is not the one interrupted.
    """
    if dist.get_rank() > 0:
        return RunLog(None), identity, None
    try:
        log = open_log(path, is_new)
    except OSError as error:
        raise ValueError(f"log_dir: {error}; set log_dir to another folder that you can write to") from None
    log.lock()
    run_id = int(log.path.stem)
    identity = identity | dict(run_id=run_id, seed=run_id if identity["seed"] is None else identity["seed"])
    state = read_resumable(checkpoint_path(log.path), identity)
    log.truncate(state["log_bytes"] if state else 0)
    return log, identity, state


def begin_log(log: RunLog, identity: dict[str, Any], state: dict[str, Any] | None, drawing: str,
              device: torch.device) -> tuple[int, float]:
    """Write the header, or a resumed run's line; return the step and the training time (ms) to begin at."""
    if state is None:
        configuration = {name: value for name, value in identity.items() if name != "code"}
        log.write(format_header(identity["code"], configuration, describe_environment(), drawing,
                                  describe_device(device), f"started: {here_and_now()}"))
        return 0, 0.0
    step, time_ms = state["step"], state["train_time_ms"]
    log.line(f"resumed at step {step} after {time_ms:.0f}ms of training; {here_and_now()}; {describe_device(device)}")
    return step, time_ms
