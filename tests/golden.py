"""Make the inputs of the golden trajectories; `golden.json` holds the cases and their figures."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from helpers import write_config

from data.shards import write_shard

CASES = json.loads(Path(__file__).with_name("golden.json").read_text())
LAYERS, NO_ATTENTION = 16, 7


def source_shapes(value_embeddings, d, vocab_size):
    """The name and shape of each source's parameter."""
    for k, entry in enumerate(value_embeddings):
        entry = entry if isinstance(entry, dict) else {}
        kind, width = entry.get("source", "token"), 128 * entry.get("heads", d // 128)
        if kind == "embedding":
            yield f"value_embeds.{k}.proj_w", (width, d)
        else:
            default_rows = vocab_size if kind == "token" else 5 * -(-vocab_size // 128) * 128
            yield f"value_embeds.{k}.weight", (entry.get("rows", default_rows), width)


def golden_weights(value_embeddings, d, vocab_size, gate=False):
    """Every parameter in fp32: the standard normal numbers of RandomState(crc32(name)), scaled by its kind."""
    layers = [entry["layers"] if isinstance(entry, dict) else entry for entry in value_embeddings]
    sources_by_layer = [[k for k, of_source in enumerate(layers) if i in of_source] for i in range(LAYERS)]
    extra = sum(max(0, len(used) - 1) for used in sources_by_layer)
    initial_scalars = [1.0] * LAYERS + [1.0, 0.0] * LAYERS + [0.5, 0.5] * LAYERS + [0.5] * extra

    def normal(name, *shape):
        state = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        return torch.from_numpy(state.standard_normal(shape).astype(np.float32))

    weights = {
        "embed.weight": normal("embed.weight", vocab_size, d),
        "lm_head_w": np.float32(0.05) * normal("lm_head_w", -(-vocab_size // 128) * 128, d),
        "scalars": torch.tensor(initial_scalars) + np.float32(0.05) * normal("scalars", len(initial_scalars)),
    }
    shapes = dict(source_shapes(value_embeddings, d, vocab_size))
    for i, used in enumerate(sources_by_layer):
        shapes |= {f"blocks.{i}.mlp.fc_w": (4 * d, d), f"blocks.{i}.mlp.proj_w": (d, 4 * d)}
        if i != NO_ATTENTION:
            shapes[f"blocks.{i}.attn.qkvo_w"] = (4, d, d)
        if gate and used:
            shapes[f"blocks.{i}.attn.ve_gate_w"] = (d // 128, 16)
    for name, shape in shapes.items():
        scale = 1 if name.endswith(".weight") else 0.5 * shape[-1] ** -0.5
        weights[name] = np.float32(scale) * normal(name, *shape)
    return weights


def golden_tokens(n, seed, vocab_size):
    """Tokens of which about half follow from the one before; the rest Zipfian; documents of about 300 tokens."""
    state = np.random.RandomState(seed)
    end_of_text = vocab_size - 1
    weight = 1 / np.arange(1, end_of_text + 1)
    tokens = state.choice(end_of_text, size=n, p=weight / weight.sum())
    follows = state.rand(n) < 0.5
    for i in np.flatnonzero(follows[1:]) + 1:
        tokens[i] = (7 * tokens[i - 1] + 25) % end_of_text
    start = 0
    while start < n:
        tokens[start] = end_of_text
        start += int(state.exponential(300)) + 2
    return tokens


def write_golden_case(name, folder):
    """Shards, checkpoint and config of a case, in `folder`; returns the config's path."""
    case = CASES[name]
    d, vocab_size = case["config"]["model_dim"], case["config"]["vocab_size"]
    for file, n, seed in (("t_train_000001", 40_000, 1), ("t_train_000002", 60_000, 2), ("t_val_000000", 20_000, 3)):
        write_shard(folder / f"{file}.bin", golden_tokens(n, seed, vocab_size))
    gate = case["config"].get("value_embedding_gate", False)
    torch.save({"model": golden_weights(case["value_embeddings"], d, vocab_size, gate)}, folder / "init.pt")
    return write_config(
        folder / f"{name}.toml", **case["config"], value_embeddings=case["value_embeddings"],
        init_from=f"{folder}/init.pt", train_files=f"{folder}/t_train_*.bin", val_files=f"{folder}/t_val_*.bin",
        log_dir=f"{folder}/logs")
