"""data/shards.py: the format, the stream's order against a plain reading of the rule, reading ahead, and checks."""

import functools
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import shards as module
from data.shards import (
    MissingShardsError,
    batch_positions,
    check_stream,
    fineweb_shards_needed,
    num_batches,
    open_shard,
    open_shards,
    read_ahead,
    write_shard,
)

ROOT = Path(__file__).resolve().parent.parent


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


# -----------------------------------------------------------------------------
# The format


def test_a_shard_is_256_int32_and_its_tokens_as_uint16(tmp_path):
    write_shard(tmp_path / "s.bin", np.array([0, 50_256, 65_535]))
    content = (tmp_path / "s.bin").read_bytes()
    assert np.frombuffer(content[:1024], "<i4").tolist() == [20240520, 1, 3] + 253 * [0]
    assert np.frombuffer(content[1024:], "<u2").tolist() == [0, 50_256, 65_535]


def test_threads_read_a_shard_at_once_from_any_position(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50_257, 200_000)
    write_shard(tmp_path / "s.bin", tokens)
    shard = open_shard(str(tmp_path / "s.bin"))
    starts = range(0, 199_000, 500)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda start: shard.read(start, 1000), starts))
    assert shard.num_tokens == 200_000 and read[0].dtype == np.uint16
    assert all(np.array_equal(part, tokens[start : start + 1000]) for start, part in zip(starts, read))


def test_shards_are_opened_in_sorted_order(tmp_path):
    for number in (10, 2, 1):
        write_shard(tmp_path / f"s_{number:06d}.bin", np.full(300, number))
    assert [shard.read(0, 1)[0] for shard in open_shards(f"{tmp_path}/s_*.bin")] == [1, 2, 10]


def test_a_shard_that_becomes_shorter_during_a_run_is_named(tmp_path):
    write_shard(tmp_path / "s.bin", np.zeros(1000))
    shard = open_shard(str(tmp_path / "s.bin"))
    os.truncate(tmp_path / "s.bin", 1024 + 1000)
    assert shard.read(0, 500).size == 500
    with pytest.raises(ValueError, match=f"{tmp_path}/s.bin: ends before token 501, .* make or fetch it again"):
        shard.read(0, 501)


def test_a_shard_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """As where the disk has lost a sector."""
    write_shard(tmp_path / "s.bin", np.zeros(1000))
    shard = open_shard(str(tmp_path / "s.bin"))

    def lost_sector(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", lost_sector)
    with pytest.raises(ValueError, match=f"{tmp_path}/s.bin: Input/output error; make or fetch it again"):
        shard.read(0, 1000)


def test_shards_that_are_replaced_during_a_run_do_not_change_it(tmp_path):
    write_shard(tmp_path / "s.bin", np.full(1000, 7))
    shard = open_shard(str(tmp_path / "s.bin"))
    write_shard(tmp_path / "new", np.zeros(10))
    (tmp_path / "new").rename(tmp_path / "s.bin")
    assert shard.read(990, 10).tolist() == 10 * [7]


def with_header(path, magic=20240520, version=1, count=20_000):
    """20,000 tokens behind a header that says something else."""
    path.write_bytes(np.array([magic, version, count] + 253 * [0], "<i4").tobytes() + bytes(40_000))


@pytest.mark.parametrize("bad, complaint", [
    (dict(magic=1), "magic number 1 instead of 20240520"),
    (dict(version=2), "version 2 instead of 1"),
    (dict(count=100), "wrong length, the header says 100 tokens and the file holds 20,000"),
    (dict(count=30_000), "wrong length"),
    (dict(count=-5), "wrong length"),
])
def test_a_bad_header_is_named(tmp_path, bad, complaint):
    with_header(tmp_path / "b_1.bin")
    with_header(tmp_path / "b_2.bin", **bad)
    with pytest.raises(MissingShardsError, match=f"{tmp_path}/b_2.bin: {complaint}.*; .*make or fetch it again"):
        open_shards(f"{tmp_path}/b_*.bin")


@pytest.mark.parametrize("size", [0, 7, 100, 1023, 1024])
def test_a_shard_that_is_too_short_for_its_header_or_empty(tmp_path, size):
    (tmp_path / "b.bin").write_bytes((np.array([20240520, 1, 0] + 253 * [0], "<i4").tobytes())[:size])
    with pytest.raises(MissingShardsError, match=f"{tmp_path}/b.bin: "):
        open_shards(f"{tmp_path}/b.bin")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("/nowhere")])
def test_a_folder_and_a_link_to_nowhere_are_no_shards(tmp_path, make):
    make(tmp_path / "b.bin")
    with pytest.raises(MissingShardsError, match=f"{tmp_path}/b.bin: .*it is no shard, or damaged"):
        open_shards(f"{tmp_path}/b.bin")


# -----------------------------------------------------------------------------
# The stream


@pytest.mark.parametrize("length, batches", [(511, 0), (513, 0), (514, 1), (1025, 1), (1026, 2), (40_000, 78)])
def test_a_batch_needs_its_tokens_and_two_more(length, batches):
    """512 tokens a batch: it needs the target of its last token, and the rule leaves one more over."""
    assert num_batches([length], 512) == batches == len(list(plain_stream([np.zeros(length)], 512)))


def test_the_golden_shards_are_left_at_step_9():
    assert list(batch_positions([40_000, 60_000], 4096))[8:10] == [(0, 32_768), (1, 0)]


@pytest.mark.parametrize("lengths", [[4097, 303, 4600], [10_000], [100, 5000, 513, 514]])
@pytest.mark.parametrize("batch_tokens", [128, 512, 1000])
def test_positions_are_those_of_the_plain_rule(lengths, batch_tokens):
    shards = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    positions = list(batch_positions(lengths, batch_tokens))
    read = [shards[shard][position : position + batch_tokens + 1].tolist() for shard, position in positions]
    assert read == [batch.tolist() for batch in plain_stream(shards, batch_tokens)]
    assert num_batches(lengths, batch_tokens) == len(positions)


# -----------------------------------------------------------------------------
# Reading ahead


def test_reading_ahead_gives_the_same_items():
    assert list(read_ahead(iter(range(1000)), depth=3)) == list(range(1000))


def test_reading_begins_before_the_first_item_is_asked_for():
    begun = threading.Event()

    def items():
        begun.set()
        yield 1

    ahead = read_ahead(items())
    assert begun.wait(60) and next(ahead) == 1


def test_no_more_is_read_ahead_than_the_depth():
    """Two wait in the queue and one is in the thread's hands, until another is asked for."""
    taken, full = [], threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            if number >= 3:
                full.set()
            yield number

    ahead = read_ahead(items(), depth=2)
    assert next(ahead) == 0 and full.wait(60)
    assert taken == [0, 1, 2, 3]


def test_an_error_is_raised_where_its_item_would_have_been():
    def items():
        yield from (1, 2)
        raise ValueError("a lost sector")

    ahead = read_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="a lost sector"):
        next(ahead)


def test_a_reader_that_is_left_behind_does_not_keep_the_process():
    code = "from data.shards import read_ahead; import itertools; print(next(read_ahead(itertools.count(5), depth=2)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout == b"5\n"


# -----------------------------------------------------------------------------
# Checks


def check(pattern, vocab_size=100, batch_tokens=100, needed=1, fineweb_shards=None):
    check_stream(str(pattern), vocab_size, batch_tokens, needed, "a test", fineweb_shards)


def test_exactly_enough_tokens_pass(tmp_path):
    """3 shards of 20,000 hold 39 batches of 512 each: 38 * 512 + 512 + 1 < 20,000."""
    for number in range(3):
        write_shard(tmp_path / f"{number}.bin", np.zeros(20_000))
    check(tmp_path / "*.bin", batch_tokens=512, needed=117)
    complaint = r"too few tokens: a test needs 60,416 \(118 x 512\) .* has 60,000 in 3 shards, good for 117"
    with pytest.raises(ValueError, match=complaint):
        check(tmp_path / "*.bin", batch_tokens=512, needed=118)


@pytest.mark.parametrize("step, length", [(765_432, 1_000_000), (10_000, 3 * module.WHOLLY_CHECKED_TOKENS)])
def test_another_vocabulary_is_found(tmp_path, step, length):
    """One wrong id in a small shard; in a large one, of which samples are read, some here and there."""
    tokens = np.zeros(length, np.uint16)
    tokens[step::step] = 300
    write_shard(tmp_path / "b.bin", tokens)
    with pytest.raises(ValueError, match="b.bin: holds token id 300, but vocab_size is 256") as raised:
        check(tmp_path / "*.bin", vocab_size=256)
    assert not isinstance(raised.value, MissingShardsError)


def test_large_shards_are_sampled(tmp_path, monkeypatch):
    """Of one of 200 MB 2 MB are read, so that checking 32 of them takes well under a second."""
    read = []
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(size) or bytes(size))
    with open(tmp_path / "large.bin", "wb") as file:
        file.write(np.array([20240520, 1, 100_000_000] + 253 * [0], "<i4").tobytes())
        file.truncate(1024 + 200_000_000)
    check(tmp_path / "*.bin")
    assert sum(read) == 64 * 2**14 * 2


@pytest.mark.parametrize("pattern, batches, complaint", [
    ("fineweb_train_*.bin", 18, ""),  # the first two have nine each
    ("fineweb_train_*.bin", 19, "fineweb_train_000003.bin is missing"),
    ("fineweb_train_00000[124].bin", 19, ""),  # it was left out on purpose
])
def test_a_gap_in_what_a_run_reads_is_a_mistake(tmp_path, pattern, batches, complaint):
    for number in (1, 2, 4):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", np.zeros(1_000))
    run = functools.partial(check, tmp_path / pattern, needed=batches)
    if complaint:
        with pytest.raises(MissingShardsError, match=complaint):
            run()
    else:
        run()


# -----------------------------------------------------------------------------
# What mends an error


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
    assert fineweb_shards_needed(num_iterations, step_tokens) == shards
    if shards is not None:
        batches = [num_batches(count * [100_000_000], step_tokens) for count in (shards - 1, shards)]
        assert batches[0] < num_iterations <= batches[1]


NAMES = [f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3)] + ["fineweb_val_000000.bin"]
TRAIN, VAL = "fineweb_train_*.bin", "fineweb_val_*.bin"


@pytest.fixture
def fineweb(tmp_path, monkeypatch):
    """A folder that passes for FineWeb's, with shards of 15 batches."""
    monkeypatch.setattr(module, "FINEWEB_FOLDER", tmp_path)
    for name in NAMES:
        write_shard(tmp_path / name, np.zeros(1_600))
    return tmp_path


@pytest.mark.parametrize("gone, pattern, keys, number", [
    (NAMES, TRAIN, dict(fineweb_shards=32), 32),
    (NAMES, VAL, dict(fineweb_shards=32), 32),
    (NAMES, VAL, dict(fineweb_shards=0), 0),  # the run's training data are elsewhere
    (NAMES[3:], VAL, dict(fineweb_shards=1), 1),
    (NAMES[:1], TRAIN, dict(needed=30, fineweb_shards=1), 1),
    (NAMES[1:2], TRAIN, dict(needed=30, fineweb_shards=1), 2),  # by whole shards' lengths, one would do
    ([], TRAIN, dict(needed=46, fineweb_shards=1), 1),  # by their number they would do: they are damaged
    ([], TRAIN, dict(needed=46, fineweb_shards=4), 4),
    ([], TRAIN, dict(needed=46), None),  # even all are too few
    ([], VAL, dict(needed=16, fineweb_shards=3), None),  # there is one validation shard
    ([], TRAIN, dict(vocab_size=0, fineweb_shards=3), None),  # other data would not help
])
def test_what_fetching_mends_names_its_command(fineweb, gone, pattern, keys, number):
    for name in gone:
        (fineweb / name).unlink()
    with pytest.raises(ValueError) as raised:
        check(fineweb / pattern, **keys)
    command = getattr(raised.value, "command", ())
    assert command == (() if number is None else ("data/cached_fineweb10B.py", str(number)))
    ending = f"; to get them: python data/cached_fineweb10B.py {number}"
    assert str(raised.value).endswith(ending) == (number is not None)


def test_whole_shards_that_are_too_few_for_a_narrow_pattern_are_not_fetched_again(fineweb, monkeypatch):
    monkeypatch.setattr(module, "FINEWEB_SHARD_TOKENS", 1_600)
    with pytest.raises(ValueError) as raised:
        check(fineweb / "fineweb_train_00000[12].bin", needed=31, fineweb_shards=3)
    assert not isinstance(raised.value, MissingShardsError)


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 2_000), lambda path: path.write_bytes(b"<html>")])
def test_a_damaged_shard_beyond_those_needed_is_to_be_fetched_too(fineweb, damage):
    damage(fineweb / NAMES[2])
    with pytest.raises(MissingShardsError) as raised:
        check(fineweb / TRAIN, fineweb_shards=1)
    assert raised.value.command == ("data/cached_fineweb10B.py", "3")


def test_shards_elsewhere_have_no_command(tmp_path):
    with pytest.raises(MissingShardsError) as raised:
        check(tmp_path / TRAIN, fineweb_shards=1)
    assert raised.value.command == () and "to get them" not in str(raised.value)


def test_local_text_that_was_not_made_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOCAL_TEXT_FOLDER", tmp_path)
    with pytest.raises(MissingShardsError, match="; to get them: python data/local_text.py$") as raised:
        check(tmp_path / "local_train_*.bin")
    assert pickle.loads(pickle.dumps(raised.value)).command == ("data/local_text.py",)
    (tmp_path / "local_train_000000.bin").write_bytes(b"damaged: of which text it was, nobody knows")
    with pytest.raises(MissingShardsError) as raised:
        check(tmp_path / "local_train_*.bin")
    assert raised.value.command == ()


def test_nothing_here_needs_pytorch():
    code = "import sys, data.shards, data.local_text; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
