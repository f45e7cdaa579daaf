"""data/loader.py: the ranks' batches against a plain reading of the stream's rule, prefetching, checks before a run."""

import os
import pickle
import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import model_on_meta

import train_gpt_medium as train
from data import loader
from data.cached_fineweb10B import num_shards_needed
from data.loader import check_stream, prefetch, train_batches, val_sequences
from data.shards import MissingShardsError, open_shards, write_shard

CPU = torch.device("cpu")
# Ids on both sides of 32,768. The second shard is too short for any batch.
TOKENS = np.split(np.arange(28_000, 37_000, dtype=np.uint16), [4_097, 4_400])


def plain_stream(batch_tokens):
    """The rule, word by word: each batch's tokens and the one after them."""
    for shard in TOKENS:
        pos = 0
        while pos + batch_tokens + 1 < len(shard):
            yield shard[pos : pos + batch_tokens + 1].tolist()
            pos += batch_tokens


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbered")
    for number, part in enumerate(TOKENS):
        write_shard(folder / f"n_{number}.bin", part)
    return open_shards(f"{folder}/n_*.bin")


@pytest.mark.parametrize("world_size, sequences, first_step", [(1, 2, 0), (3, 3, 0), (2, 6, 0), (1, 2, 6), (1, 2, 8)])
def test_the_ranks_together_read_the_plain_stream_from_any_step_to_the_last(shards, world_size, sequences, first_step):
    """With two sequences a step, the first shard holds seven batches, the second none, the third eight."""
    ranks = [train_batches(shards, sequences, 256, first_step, 10, r, world_size, CPU) for r in range(world_size)]
    batches, expected = list(zip(*ranks, strict=True)), list(plain_stream(sequences * 256))[first_step:10]
    assert len(batches) == len(expected) > 1
    for batch, plain in zip(batches, expected):
        inputs, targets = map(torch.cat, zip(*batch))
        assert inputs.shape == targets.shape == (sequences, 256)
        assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
        assert inputs.flatten().tolist() == plain[:-1] and targets.flatten().tolist() == plain[1:]


def test_prefetching_stays_within_its_depth_and_raises_errors_in_place():
    reached = [threading.Event() for _ in range(100)]
    ahead = prefetch((event.set() or i for i, event in enumerate(reached)), depth=2)
    assert next(ahead) == 0 and reached[2].wait(60) and not reached[3].wait(0.1) and list(ahead) == list(range(1, 100))
    ahead = prefetch(1 // n for n in (1, -1, 0))
    assert [next(ahead), next(ahead)] == [1, -1]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


@pytest.mark.parametrize("num_iterations, step_tokens, count", [
    (5890, 524_288, 31), (5891, 524_288, 32), (2, 99_999_998, 2), (1, 99_999_999, None),
    (19_570, 524_288, 103), (19_571, 524_288, None)])
def test_the_number_of_shards_that_a_config_needs(num_iterations, step_tokens, count):
    """A shard holds 190 steps of 524,288 tokens; a batch needs two spare tokens; there are 103 shards."""
    assert num_shards_needed(num_iterations, step_tokens) == count


@pytest.mark.parametrize("length, place, bytes_read", [(10**6, 999_999, 2 * 10**6), (25_000_000, 24_990_000, 2**21)])
def test_wrong_token_ids_are_found_in_all_of_a_small_shard_and_samples_of_a_large_one(
        tmp_path, monkeypatch, length, place, bytes_read):
    """An id beyond the vocabulary, and a vocabulary whose end of text starts no document; one start is enough."""
    tokens, read, pread = np.full(length, 7, np.uint16), [], os.pread
    tokens[place:] = 256
    write_shard(tmp_path / "a.bin", tokens)
    monkeypatch.setattr(os, "pread", lambda file, size, start: read.append(size) or pread(file, size, start))
    check_stream(f"{tmp_path}/a.bin", 300, 256, 100, 1, "a test", None)
    assert sum(read) == bytes_read
    for vocab_size, end_of_text, fault in (
            (256, 7, f"token {place:,} has id 256, but vocab_size is 256; use data with this vocabulary, or set"),
            (300, 299, f"no document starts: none of {bytes_read // 2:,} tokens is 299; set end_of_text to the id")):
        with pytest.raises(ValueError, match=f"a.bin: {fault}") as raised:
            check_stream(f"{tmp_path}/a.bin", vocab_size, end_of_text, 100, 1, "a test", None)
        assert not isinstance(raised.value, MissingShardsError)


def test_a_token_id_between_the_samples_is_found_when_its_batch_is_read(tmp_path):
    """In training, where it is due, and in a validation."""
    tokens = np.zeros(9_000_000, np.uint16)
    tokens[20_000] = 300
    write_shard(tmp_path / "b.bin", tokens)
    shards = check_stream(f"{tmp_path}/b.bin", 256, 0, 512, 100, "a test", None)
    for batches in (train_batches(shards, 2, 256, 0, 100, 0, 1, CPU), val_sequences(shards, 512, 100, 0, 1, CPU)):
        assert len([next(batches) for _ in range(39)]) == 39
        with pytest.raises(ValueError, match="b.bin: token 20,000 has id 300, but vocab_size is 256; use data"):
            next(batches)


@pytest.mark.parametrize("keys, eot_id", [({}, 249), ({"end_of_text": 0}, 0)])
def test_documents_start_at_the_key_end_of_text(keys, eot_id):
    """In masks and in bigram tables; by default at the last id."""
    model = model_on_meta(train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=250, value_embeddings=[
        {"layers": [1], "source": "bigram"}], **keys))
    assert model.eot_id == model.value_embeds[0].eot_id == eot_id


_, TWO, THREE, _ = NAMES = [*(f"fineweb_train_00000{number}.bin" for number in (1, 2, 3)), "fineweb_val_000000.bin"]
TRAIN, VAL = "fineweb_train_*.bin", "fineweb_val_*.bin"
# The tokens in each of these files, 0 for none, negative for a truncated file. A whole shard holds 15 batches of 100.
NONE, GAP, WHOLE, DAMAGED = 4 * [0], [1_600, 0, 1_600, 1_600], 4 * [1_600], [1_600, 1_600, -1_600, 0]


@pytest.mark.parametrize("tokens, pattern, needed, count, fault, number", [
    (NONE, TRAIN, 1, 32, "no file matches", 32),
    (NONE, VAL, 1, 0, "no file matches", 0),  # the training data is elsewhere
    (WHOLE, "elsewhere/*.bin", 1, 1, "no file matches", None),
    (GAP, TRAIN, 15, 1, "", None),  # the run does not read beyond the gap
    (GAP, TRAIN, 16, 1, f"{TWO} is missing though later shards are there", 2),  # by count, one is enough
    (GAP, "fineweb_train_00000[13].bin", 30, 1, "", None),  # the pattern omits it on purpose
    (WHOLE, TRAIN, 46, 4, r"tokens: a test needs 4,600 \(46 x 100\), .* has 4,800 \(shards: 3\), enough for 45;", 4),
    (WHOLE, TRAIN, 46, None, "too few tokens", None),  # even all are too few
    (WHOLE, VAL, 16, 3, "too few tokens", None),  # there is one validation shard
    (WHOLE, "fineweb_train_00000[12].bin", 31, 3, "too few tokens", None),  # nothing to fetch for a narrow pattern
    (DAMAGED, TRAIN, 30, 1, "", None), (DAMAGED, TRAIN, 31, 1, f"{THREE}: wrong length", 3)])
def test_a_faulty_stream_and_the_command_for_it(tmp_path, monkeypatch, tokens, pattern, needed, count, fault, number):
    """In a folder that stands for FineWeb's. `number` is that of shards to fetch, None for no command."""
    monkeypatch.setattr(loader, "FINEWEB_FOLDER", tmp_path)
    for path, length in ((tmp_path / name, length) for name, length in zip(NAMES, tokens) if length):
        write_shard(path, np.zeros(abs(length)))
        os.truncate(path, 2_000 if length < 0 else path.stat().st_size)
    with pytest.raises(ValueError, match=fault) if fault else nullcontext() as raised:
        check_stream(f"{tmp_path}/{pattern}", 100, 0, 100, needed, "a test", count)
    if fault:
        command = [] if number is None else ["data/cached_fineweb10B.py", str(number)]
        assert getattr(raised.value, "command", []) == command
        assert str(raised.value).partition(f": {sys.executable} ")[2] == " ".join(command)


@pytest.mark.parametrize("folder, words", [("LOCAL_TEXT_FOLDER", []), ("BYTE_PAIRS_FOLDER", ["--vocab_size", "257"])])
def test_local_text_is_made_only_where_there_is_none(tmp_path, monkeypatch, folder, words):
    """A damaged shard may hold the user's own text. The command survives the way between ranks."""
    monkeypatch.setattr(loader, folder, tmp_path)
    for command in (["data/local_text.py", *words], []):
        with pytest.raises(MissingShardsError) as raised:
            check_stream(f"{tmp_path}/local_train_*.bin", 257, 256, 100, 1, "a test", None)
        assert pickle.loads(pickle.dumps(raised.value)).command == command
        (tmp_path / "local_train_000000.bin").touch()
