"""Data: the stream's order, shard switches, dropped tails and the ranks' slices, against a plain reading of the rule."""

import functools
import os
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, random_tokens, write_shard

import train_gpt_medium as train

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


# -----------------------------------------------------------------------------
# Reading ahead


@pytest.fixture
def reads(monkeypatch):
    """What is read from the shards, in order: (file's name, positions, tokens from each), noted when it is in memory."""
    noted, read_tokens = [], train.read_tokens

    def note(file, positions, count):
        tokens = read_tokens(file, positions, count)
        noted.append((os.path.basename(file.name), list(positions), count))
        return tokens

    monkeypatch.setattr(train, "read_tokens", note)
    return noted


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_first_shard_is_in_memory_before_the_first_step(tmp_path, numbered_shards, reads):
    train.train_batches(hyperparameters(tmp_path), 0, 1, CPU)
    assert [name for name, *_ in reads] == ["n_train_0.bin"]


def test_the_next_shard_is_read_while_one_is_used_and_no_more(tmp_path, numbered_shards, reads):
    """The first shard has seven batches, the second none, the third eight."""
    batches = train.train_batches(hyperparameters(tmp_path), 0, 1, CPU)
    next(batches)
    wait_until(lambda: len(reads) == 2)
    assert [(name, len(positions)) for name, positions, _ in reads] == [("n_train_0.bin", 7), ("n_train_2.bin", 8)]
    assert len(list(batches)) == 14 and len(reads) == 2


def test_a_rank_reads_its_own_sequences_only(tmp_path, numbered_shards, reads):
    """A sequence and the target of its last token, from where the rank's share of each batch begins."""
    list(train.train_batches(hyperparameters(tmp_path), 1, 2, CPU))
    assert {count for *_, count in reads} == {257}
    assert [position for name, positions, _ in reads for position in positions if name == "n_train_0.bin"] == list(range(256, 3585, 512))


def test_nothing_is_read_beyond_the_last_step(tmp_path, numbered_shards, reads):
    assert len(list(train.train_batches(hyperparameters(tmp_path, num_iterations=5), 0, 1, CPU))) == 5
    assert [(name, len(positions)) for name, positions, _ in reads] == [("n_train_0.bin", 5)]


def test_a_large_shard_is_read_in_pieces(tmp_path, numbered_shards, reads, monkeypatch):
    """As one of many GB, which would not fit in memory: here three batches of 1026 bytes make a piece."""
    expected = list(train.train_batches(hyperparameters(tmp_path), 0, 1, CPU))
    monkeypatch.setattr(train, "READ_AHEAD_BYTES", 4_000)
    reads.clear()
    batches = list(train.train_batches(hyperparameters(tmp_path), 0, 1, CPU))
    assert [len(positions) for _, positions, _ in reads] == [3, 3, 1, 3, 3, 2]
    assert all(torch.equal(a, b) for pair, other in zip(batches, expected, strict=True) for a, b in zip(pair, other))


def test_a_shard_that_becomes_shorter_during_a_run_is_named(tmp_path, numbered_shards):
    batches = train.train_batches(hyperparameters(tmp_path), 0, 1, CPU)
    os.truncate(tmp_path / "n_train_2.bin", 3_000)
    with pytest.raises(ValueError, match=f"{tmp_path}/n_train_2.bin: ends before token"):
        list(batches)


def test_shards_that_are_made_anew_during_a_run_do_not_change_it(tmp_path, numbered_shards):
    """As data/local_text.py makes them: under another name, then renamed."""
    expected = list(train.train_batches(hyperparameters(tmp_path), 0, 1, CPU))
    batches = train.train_batches(hyperparameters(tmp_path), 0, 1, CPU)
    write_shard(tmp_path / "new", np.zeros(4_600))
    (tmp_path / "new").rename(tmp_path / "n_train_2.bin")
    assert all(torch.equal(inputs, other) for (inputs, _), (other, _) in zip(batches, expected, strict=True))


# -----------------------------------------------------------------------------
# FineWeb


@pytest.mark.parametrize("num_iterations, step_tokens, shards", [
    (5960, 524_288, 32),
    (5890, 524_288, 31),  # 190 batches a shard
    (5891, 524_288, 32),
    (5820, 524_288, 31),
    (1, 524_288, 1),
    (190, 524_288, 1),
    (191, 524_288, 2),
    (100, 2 * 524_288, 2),  # 95 a shard
    (1, 99_999_998, 1),
    (2, 99_999_998, 2),
    (1, 99_999_999, None),  # a batch needs two tokens to spare
    (19_570, 524_288, 103),
    (19_571, 524_288, None),  # there are no more
    (10**400, 524_288, None),
])
def test_the_number_of_shards_that_a_config_needs(num_iterations, step_tokens, shards):
    assert train.fineweb_shards_needed(num_iterations, step_tokens) == shards
    if shards is not None:
        assert train.num_batches(shards * [100_000_000], step_tokens) >= num_iterations > train.num_batches((shards - 1) * [100_000_000], step_tokens)


@pytest.mark.parametrize("config, shards", [("baseline", 32), ("record", 31), ("add_5", 32)])
def test_a_config_without_its_shards_names_the_command_that_fetches_them(capsys, monkeypatch, tmp_path, config, shards):
    monkeypatch.setattr(train, "FINEWEB_FOLDER", tmp_path)
    files = ["--train_files", f"{tmp_path}/fineweb_train_*.bin", "--val_files", f"{tmp_path}/fineweb_val_*.bin"]
    assert train.main([f"{ROOT}/configs/{config}.toml", "--check", *files]) == 2
    assert capsys.readouterr().err.endswith(f"; to fetch FineWeb: python data/cached_fineweb10B.py {shards}\n")


@pytest.mark.parametrize("missing, number", [("fineweb_train_000001.bin", 1), ("fineweb_train_000002.bin", 2), ("fineweb_val_000000.bin", 1)])
def test_each_missing_shard_of_fineweb_is_one_to_fetch(small_config, capsys, monkeypatch, tmp_path, missing, number):
    """Also the first of several, without which the stream would begin with the second."""
    monkeypatch.setattr(train, "FINEWEB_FOLDER", tmp_path)
    for name in ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_train_000003.bin", "fineweb_val_000000.bin"):
        write_shard(tmp_path / name, random_tokens(1_600, seed=1, vocab_size=256))
    config = small_config(train_files=f"{tmp_path}/fineweb_train_*.bin", val_files=f"{tmp_path}/fineweb_val_*.bin", num_iterations=6)
    assert train.main([str(config), "--check"]) == 0
    (tmp_path / missing).unlink()
    capsys.readouterr()
    assert train.main([str(config), "--check"]) == 2
    assert capsys.readouterr().err.endswith(f"; to fetch FineWeb: python data/cached_fineweb10B.py {number}\n")


@pytest.mark.parametrize("pattern, batches, complaint", [
    ("fineweb_train_*.bin", 18, ""),  # the first two have nine each
    ("fineweb_train_*.bin", 19, "fineweb_train_000003.bin is missing"),
    ("fineweb_train_00000[124].bin", 19, ""),  # it was left out on purpose
])
def test_a_gap_in_what_a_run_reads_is_a_mistake(tmp_path, pattern, batches, complaint):
    for number in (1, 2, 4):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", np.zeros(1_000))
    check = functools.partial(train.check_stream, f"{tmp_path}/{pattern}", 10, 100, batches, "a test")
    if complaint:
        with pytest.raises(ValueError, match=complaint):
            check()
    else:
        check()


@pytest.mark.parametrize("change, suggestion", [
    (dict(train_files="elsewhere/*.bin"), None),
    (dict(vocab_size=100), None),  # other data would not help
    (dict(val_tokens=2048), None),  # there is one validation shard
    (dict(num_iterations=19_571 * 524_288), None),
    (dict(num_iterations=300), 1),  # by their number they would do: they are damaged
])
def test_only_what_fetching_mends_is_to_be_fetched(small_config, capsys, monkeypatch, tmp_path, change, suggestion):
    monkeypatch.setattr(train, "FINEWEB_FOLDER", tmp_path)
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        write_shard(tmp_path / name, random_tokens(1_600, seed=1, vocab_size=256))
    config = small_config(**dict(train_files=f"{tmp_path}/fineweb_train_*.bin", val_files=f"{tmp_path}/fineweb_val_*.bin", num_iterations=2) | change)
    assert train.main([str(config), "--check"]) == 2
    error = capsys.readouterr().err
    assert ("to fetch FineWeb" in error) == (suggestion is not None) and (suggestion is None or error.endswith(f"cached_fineweb10B.py {suggestion}\n"))


@pytest.mark.parametrize("train_elsewhere, number", [(False, 1), (True, 0)])
def test_training_shards_that_are_not_used_are_not_to_be_fetched(small_config, small_data, capsys, monkeypatch, tmp_path, train_elsewhere, number):
    monkeypatch.setattr(train, "FINEWEB_FOLDER", tmp_path)
    write_shard(tmp_path / "fineweb_train_000001.bin", random_tokens(10_000, seed=1, vocab_size=256))
    files = {} if train_elsewhere else dict(train_files=f"{tmp_path}/fineweb_train_*.bin")
    assert train.main([str(small_config(val_files=f"{tmp_path}/fineweb_val_*.bin", **files)), "--check"]) == 2
    assert capsys.readouterr().err.endswith(f"to fetch FineWeb: python data/cached_fineweb10B.py {number}\n")


def test_a_damaged_shard_beyond_those_needed_is_to_be_fetched_too(small_config, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "FINEWEB_FOLDER", tmp_path)
    for name in ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"):
        write_shard(tmp_path / name, random_tokens(10_000, seed=1, vocab_size=256))
    os.truncate(tmp_path / "fineweb_train_000002.bin", 5_000)
    config = small_config(train_files=f"{tmp_path}/fineweb_train_*.bin", val_files=f"{tmp_path}/fineweb_val_*.bin")
    assert train.main([str(config), "--check"]) == 2
    assert capsys.readouterr().err.endswith("to fetch FineWeb: python data/cached_fineweb10B.py 2\n")
