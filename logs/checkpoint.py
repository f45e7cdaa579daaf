"""Checkpoints: final weights, and all that an interrupted run needs to go on.

Nothing here unpickles anything but tensors, numbers and strings: a checkpoint cannot run code.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from logs.weights import COMPILED_PREFIX, is_finite


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint. Raises OSError if it cannot be written.

    The file at `path` is always complete: a new one is written beside it and renamed once it is on the disk.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the renaming must be on the disk too
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.__context__ or error}") from None


def remove(path: Path) -> None:
    for name in (path.name, f"{path.name}.unfinished"):  # a crash can leave the second
        path.with_name(name).unlink(missing_ok=True)


def is_finite_everywhere(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether all weights and optimizer states of all ranks are finite."""
    states = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
    is_bad = torch.tensor(int(not is_finite([*model.parameters(), *states])))
    dist.all_reduce(is_bad)
    return not is_bad.item()


def copy_state(model: nn.Module, replicated: torch.optim.Optimizer, sharded: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer states, those of all ranks, copied to rank 0's memory; {} on the other ranks.

    Args: an optimizer with the same states on every rank, and one whose states are each on one rank.
    """

    def copy(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:  # by the parameter's name
        return {name: {key: tensor.to("cpu", copy=True) for key, tensor in optimizer.state[p].items()}
                for name, p in model.named_parameters() if p in optimizer.state}

    packed = io.BytesIO()
    torch.save(copy(sharded), packed)  # a plain pickle of uint16 tensors, the mantissas, cannot be read
    of_ranks = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(packed.getvalue(), of_ranks)
    if of_ranks is None:
        return {}
    states = copy(replicated)
    for of_rank in of_ranks:
        states |= torch.load(io.BytesIO(of_rank), weights_only=True)
    return dict(model=copy_weights(model), optimizer_states=states)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights in the CPU's memory, under the names of a published checkpoint."""
    return {COMPILED_PREFIX + name: w.to("cpu", copy=True) for name, w in model.state_dict().items()}


@torch.no_grad()
def restore(state: dict[str, Any], model: nn.Module, replicated: torch.optim.Optimizer,
            sharded: torch.optim.Optimizer) -> None:
    """The inverse of `copy_state`, on every rank; of `sharded` it takes the states of the parameters in `owned`."""
    owner = {p: replicated for group in replicated.param_groups for p in group["params"]}
    owner |= dict.fromkeys(sharded.owned, sharded)
    for name, p in model.named_parameters():
        p.copy_(state["model"][COMPILED_PREFIX + name])
        if p in owner:
            tensors = state["optimizer_states"][name].items()
            owner[p].state[p] = {key: tensor.to(p.device, copy=True) for key, tensor in tensors}


def read_interrupted(path: Path, must_equal: Callable[[int], dict[str, Any]]) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run, its tensors mapped and not read; None if there is none.

    `must_equal(step)` is what the run, interrupted at that step, must have in common with this one.

    Raises ValueError if the file is damaged, or if something differs: the message names what.
    """
    if not os.path.lexists(path):
        return None
    fix = "move it and its log away to start this run from the beginning, or use another run_id"
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
        state = load(path)
        theirs, step = json.loads(state["must_equal"]), int(state["step"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a checkpoint that a run can go on from ({reason}); {fix}") from None
    ours = json.loads(json.dumps(must_equal(step)))
    if changed := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
        shown = ", ".join(describe_change(name, theirs.get(name), ours.get(name)) for name in changed)
        raise ValueError(f"{path}: this is not the run that was interrupted: {shown}; set that back, or {fix}")
    return state


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def describe_change(name: str, was: Any, now: Any) -> str:
    """A difference in words; the program text is too long to be shown."""
    shown = [json.dumps(value) for value in (was, now)]
    return f"{name} was {shown[0]} and is {shown[1]}" if max(map(len, shown)) < 200 else f"{name} has changed"
