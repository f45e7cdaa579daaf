"""Data: the stream's order, shard switches, dropped tails and the ranks' slices, against a plain reading of the rule."""

import numpy as np
import pytest
import torch

import train_gpt_medium as train
from helpers import write_shard

CPU = torch.device("cpu")


def plain_stream(shards, batch_tokens):
    """The rule, word by word: yields each batch's tokens and the one after them."""
    shards = iter(shards)
    shard, pos = next(shards), 0
    while True:
        while pos + batch_tokens + 1 >= len(shard):
            shard, pos = next(shards, None), 0
            if shard is None:
                return
        yield shard[pos : pos + batch_tokens + 1]
        pos += batch_tokens


@pytest.fixture
def numbered_shards(tmp_path):
    """Three shards whose tokens count on from shard to shard, the second too short for any batch of the tests."""
    shards = np.split(np.arange(9_000, dtype=np.uint16), [4_097, 4_400])
    for i, shard in enumerate(shards):
        write_shard(tmp_path / f"n_train_{i}.bin", shard)
        write_shard(tmp_path / f"n_val_{i}.bin", shard)
    return shards


def hyperparameters(folder, **keys):
    return train.Hyperparameters(**dict(
        train_files=f"{folder}/n_train_*.bin", val_files=f"{folder}/n_val_*.bin", train_seq_len=256, val_seq_len=512, val_tokens=6 * 512,
        sequences_per_step=2, vocab_size=9_000, num_iterations=16,
    ) | keys)


@pytest.mark.parametrize("world_size, sequences_per_step", [(1, 2), (2, 2), (1, 3), (3, 3), (2, 6), (3, 6)])
def test_ranks_together_read_the_plain_stream(tmp_path, numbered_shards, world_size, sequences_per_step):
    hp = hyperparameters(tmp_path, sequences_per_step=sequences_per_step)
    ranks = [train.train_batches(hp, rank, world_size, CPU) for rank in range(world_size)]
    expected = list(plain_stream(numbered_shards, sequences_per_step * 256))
    batches = list(zip(*ranks, strict=True))
    assert len(batches) == len(expected) > 3
    for batch, tokens in zip(batches, expected):
        inputs, targets = (torch.cat(parts) for parts in zip(*batch))
        assert inputs.shape == targets.shape == (sequences_per_step, 256)
        assert inputs.dtype == torch.int32 and targets.dtype == torch.int64
        assert inputs.flatten().tolist() == tokens[:-1].tolist()
        assert targets.flatten().tolist() == tokens[1:].tolist()


@pytest.mark.parametrize("length, batches", [(511, 0), (513, 0), (514, 1), (1025, 1), (1026, 2), (40_000, 78)])
def test_a_batch_needs_its_tokens_two_more_to_spare(length, batches):
    """512 tokens a batch: it needs the target of its last token, and the rule leaves one more over."""
    assert train.num_batches([length], 512) == batches == len(list(plain_stream([np.zeros(length)], 512)))


def test_the_golden_shards_are_left_at_step_9():
    positions = list(train.batch_positions([40_000, 60_000], 4096))
    assert positions[8:10] == [(0, 32_768), (1, 0)]


@pytest.mark.parametrize("lengths", [[4097, 303, 4600], [10_000], [100, 5000, 513, 514]])
@pytest.mark.parametrize("batch_tokens", [128, 512, 1000])
def test_num_batches_counts_the_positions(lengths, batch_tokens):
    assert train.num_batches(lengths, batch_tokens) == len(list(train.batch_positions(lengths, batch_tokens)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_every_world_size_validates_on_the_same_sequences(tmp_path, numbered_shards, world_size):
    hp = hyperparameters(tmp_path)
    read = {}
    for rank in range(world_size):
        sequences = list(train.val_sequences(train.open_shards(hp.val_files), hp, rank, world_size, CPU))
        assert len(sequences) == 6 // world_size
        read |= {number: (inputs.tolist(), targets.tolist()) for number, inputs, targets in sequences}
    expected = [tokens.tolist() for tokens in plain_stream(numbered_shards, 512)][:6]
    assert [read[number] for number in range(6)] == [(tokens[:-1], tokens[1:]) for tokens in expected]


def test_validation_starts_over_each_time(tmp_path, numbered_shards):
    hp = hyperparameters(tmp_path)
    shards = train.open_shards(hp.val_files)
    first, second = ([inputs.tolist() for _, inputs, _ in train.val_sequences(shards, hp, 0, 1, CPU)] for _ in range(2))
    assert first == second


def test_shards_are_read_in_sorted_order(tmp_path):
    for i in (10, 2, 1):
        write_shard(tmp_path / f"s_{i:06d}.bin", np.full(300, i))
    assert [shard[0] for shard in train.open_shards(f"{tmp_path}/s_*.bin")] == [1, 2, 10]


def test_ids_above_32767_are_read_as_they_are(tmp_path):
    write_shard(tmp_path / "s.bin", np.full(300, 50_256))
    inputs, targets = train.read_sequences(train.open_shard(str(tmp_path / "s.bin")), 0, 1, 128, CPU)
    assert inputs.unique().tolist() == targets.unique().tolist() == [50_256]
