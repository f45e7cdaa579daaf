"""Weights that a run starts from: a checkpoint of this program or of the published script."""

import os
import zipfile
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COMPILED_PREFIX = "_orig_mod."  # the published script saved its compiled module, whose names begin so


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all floating-point tensors are finite; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]).all())


def read_weights(path: str, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a checkpoint, by the model's names. Raises ValueError if the file or a weight does not fit."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        weights = {name.removeprefix(COMPILED_PREFIX): w for name, w in checkpoint["model"].items()}
    except Exception as error:
        fix = "name a torch.save of a dict with the weights under 'model'"
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({type(error).__name__}); {fix}") from None
    expected = model.state_dict()
    fix = "it must come from a model of the same value embeddings, vocab_size and model_dim"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{path}: parameter {missing[0]} is missing ({len(missing)} in all); {fix}")
    if extra := [name for name in weights if name not in expected]:
        raise ValueError(f"{path}: parameter {extra[0]} is not in this model ({len(extra)} in all); {fix}")
    for name, w in weights.items():
        if not isinstance(w, Tensor) or w.shape != expected[name].shape:
            found = list(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"{path}: parameter {name} is {found} instead of {list(expected[name].shape)}; {fix}")
        if not (w.layout == torch.strided and w.device.type == "cpu" and w.is_floating_point() and is_finite([w])):
            raise ValueError(f"{path}: parameter {name} is not a plain tensor of finite numbers ({w.dtype}); "
                             "take another checkpoint")
    return weights
