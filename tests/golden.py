"""Make the inputs of the golden trajectories; `golden.json` holds the cases and their figures."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from helpers import model_on_meta, write_config

import train_gpt_medium as train
from data.shards import write_shard

CASES = json.loads(Path(__file__).with_name("golden.json").read_text())
ALL_KEYS = dict(  # every kind of source, wide and narrow
    value_embeddings=[[0, 13], {"layers": [1, 14, 0], "source": "bigram", "rows": 301, "heads": 1},
                      {"layers": [2, 14], "source": "embedding"}, {"layers": [15], "source": "embedding", "heads": 1}],
    value_embeddings_only=[14, 15], value_embedding_gate=True, num_heads=2, model_dim=256)


def golden_weights(value_embeddings, d, vocab_size, gate=False):
    """Every parameter in fp32: the standard normal numbers of RandomState(crc32(name)), scaled by its kind.

    So another name or shape changes the figures.
    """
    model = model_on_meta(train.Hyperparameters(
        value_embeddings=value_embeddings, num_heads=d // 128, model_dim=d, vocab_size=vocab_size,
        value_embedding_gate=gate))
    weights = {}
    for name, p in model.named_parameters():
        state = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        normal = torch.from_numpy(state.standard_normal(p.shape).astype(np.float32))
        if name == "scalars":
            initial = torch.tensor([1.0] * 16 + [1.0, 0.0] * 16 + [0.5] * (len(p) - 48))
            weights[name] = initial + np.float32(0.05) * normal
        elif name == "lm_head_w":
            weights[name] = np.float32(0.05) * normal
        else:
            weights[name] = np.float32(1 if name.endswith(".weight") else 0.5 * p.size(-1) ** -0.5) * normal
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
    """Write a case's shards, checkpoint and config to `folder`; return the config's path."""
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
