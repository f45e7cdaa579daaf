"""data/batches.py: the ranks' batches, against a plain reading of the stream's rule."""

import numpy as np
import pytest
import torch

from data.batches import next_batch, to_inputs_and_targets, train_batches, val_sequences
from data.shards import open_shards, write_shard
from train_gpt_medium import Hyperparameters

CPU = torch.device("cpu")


def plain_stream(shards, batch_tokens):
    """The rule, word by word: yields each batch's tokens and the one after them."""
    for shard in shards:
        pos = 0
        while pos + batch_tokens + 1 < len(shard):
            yield shard[pos : pos + batch_tokens + 1].tolist()
            pos += batch_tokens


@pytest.fixture(scope="module")
def tokens():
    """Three shards whose tokens count on from shard to shard, the second too short for any batch of the tests."""
    return np.split(np.arange(9_000, dtype=np.uint16), [4_097, 4_400])


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("numbered")
    for number, part in enumerate(tokens):
        write_shard(folder / f"n_{number}.bin", part)
    return open_shards(f"{folder}/n_*.bin")


def hyperparameters(**keys):
    return Hyperparameters(**dict(train_seq_len=256, val_seq_len=512, val_tokens=6 * 512, sequences_per_step=2,
                                  num_iterations=100) | keys)


@pytest.mark.parametrize("world_size, sequences_per_step", [(1, 2), (3, 3), (2, 6)])
def test_the_ranks_together_read_the_plain_stream(tokens, shards, world_size, sequences_per_step):
    hp = hyperparameters(sequences_per_step=sequences_per_step)
    batches = list(zip(*(train_batches(shards, hp, rank, world_size, CPU) for rank in range(world_size)), strict=True))
    expected = list(plain_stream(tokens, sequences_per_step * 256))
    assert len(batches) == len(expected) > 3
    for batch, plain in zip(batches, expected):
        inputs, targets = (torch.cat(parts) for parts in zip(*batch))
        assert inputs.shape == targets.shape == (sequences_per_step, 256)
        assert inputs.dtype == torch.int32 and targets.dtype == torch.int64
        assert inputs.flatten().tolist() == plain[:-1] and targets.flatten().tolist() == plain[1:]


@pytest.mark.parametrize("step, place", [
    (0, ["n_0.bin", 0]), (6, ["n_0.bin", 3072]), (7, ["n_2.bin", 0]), (8, ["n_2.bin", 512]), (10, [])])
def test_a_run_that_goes_on_reads_what_it_would_have_read_up_to_its_last_step(tokens, shards, step, place):
    """Seven batches are in the first shard, none in the second."""
    hp = hyperparameters(num_iterations=10)
    rest = [inputs.flatten().tolist() for inputs, _ in train_batches(shards, hp, 0, 1, CPU, first_step=step)]
    assert rest == [plain[:-1] for plain in plain_stream(tokens, 512)][step:10]
    assert next_batch(shards, hp, step) == place


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_world_size_validates_on_the_same_sequences(tokens, shards, world_size):
    read = {}
    for rank in range(world_size):
        sequences = list(val_sequences(shards, hyperparameters(), rank, world_size, CPU))
        assert len(sequences) == 6 // world_size
        read |= {number: (inputs.tolist(), targets.tolist()) for number, inputs, targets in sequences}
    expected = list(plain_stream(tokens, 512))[:6]
    assert [read[number] for number in range(6)] == [(plain[:-1], plain[1:]) for plain in expected]


def test_ids_above_32767_are_read_as_they_are():
    inputs, targets = to_inputs_and_targets(np.full(129, 50_256, np.uint16), 128, CPU)
    assert inputs.unique().tolist() == targets.unique().tolist() == [50_256]
