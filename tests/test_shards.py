"""data/shards.py: the format, the stream's order, reading ahead, and the checks before a run.

test_batches.py compares the stream with a plain reading of its rule; test_checks.py tries how many tokens a run needs.
"""

import os
import pickle
import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
from helpers import ROOT

from data import shards
from data.shards import MissingShardsError, batch_positions, num_batches, open_shard, open_shards, write_shard


def header(magic=20240520, version=1, count=20_000):
    return np.array([magic, version, count] + 253 * [0], "<i4").tobytes()


@pytest.fixture
def opened(tmp_path):
    """A shard of 1,000 sevens."""
    write_shard(tmp_path / "s.bin", np.full(1000, 7))
    return open_shard(str(tmp_path / "s.bin"))


def test_a_shard_is_256_int32_and_its_tokens_as_uint16(tmp_path):
    write_shard(tmp_path / "s.bin", np.array([0, 50_256, 65_535]))
    content = (tmp_path / "s.bin").read_bytes()
    assert content[:1024] == header(count=3)
    assert np.frombuffer(content[1024:], "<u2").tolist() == [0, 50_256, 65_535]


def test_shards_are_opened_in_sorted_order(tmp_path):
    for number in (10, 2, 1):
        write_shard(tmp_path / f"s_{number:06d}.bin", np.full(300, number))
    assert [shard.read(0, 1)[0] for shard in open_shards(f"{tmp_path}/s_*.bin")] == [1, 2, 10]


def test_a_shard_that_becomes_shorter_during_a_run_is_named(opened):
    os.truncate(opened.path, 1024 + 1000)
    assert opened.read(0, 500).size == 500
    with pytest.raises(ValueError, match=f"{opened.path}: ends before token 501, .* make or fetch it again"):
        opened.read(0, 501)


def test_a_shard_of_which_the_disk_has_lost_a_sector_is_named(opened, monkeypatch):
    def lost_sector(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", lost_sector)
    with pytest.raises(ValueError, match=f"{opened.path}: Input/output error; make or fetch it again"):
        opened.read(0, 1000)


def test_shards_that_are_replaced_during_a_run_do_not_change_it(opened, tmp_path):
    write_shard(tmp_path / "new", np.zeros(10))
    (tmp_path / "new").rename(opened.path)
    assert opened.read(990, 10).tolist() == 10 * [7]


@pytest.mark.parametrize("make, complaint", [
    (lambda path: path.write_bytes(header(magic=1) + bytes(40_000)), "magic number 1 instead of 20240520"),
    (lambda path: path.write_bytes(header(version=2) + bytes(40_000)), "version 2 instead of 1"),
    (lambda path: path.write_bytes(header(count=100) + bytes(40_000)),
     "wrong length, the header says 100 tokens and the file holds 20,000"),
    (lambda path: path.write_bytes(header(count=0)), "wrong length"),
    (lambda path: path.touch(), "0 bytes are too short for the header of 1024"),
    (lambda path: path.mkdir(), "Is a directory"),
    (lambda path: path.symlink_to("/nowhere"), "No such file"),
])
def test_what_is_no_shard_is_named(tmp_path, make, complaint):
    write_shard(tmp_path / "b_1.bin", np.zeros(10))
    make(tmp_path / "b_2.bin")
    with pytest.raises(MissingShardsError, match=f"{tmp_path}/b_2.bin: {complaint}.*; it is no shard, or damaged"):
        open_shards(f"{tmp_path}/b_*.bin")


@pytest.mark.parametrize("length, batches", [(511, 0), (513, 0), (514, 1), (1025, 1), (1026, 2), (40_000, 78)])
def test_a_batch_needs_its_tokens_and_two_more(length, batches):
    """512 tokens a batch: it needs the target of its last token, and the rule leaves one more over."""
    assert num_batches([length], 512) == len(list(batch_positions([length], 512))) == batches


def test_the_rest_of_a_shard_is_dropped():
    assert list(batch_positions([1300, 300, 514], 512)) == [(0, 0), (0, 512), (2, 0)]


def test_reading_begins_at_once_and_goes_no_further_than_the_depth():
    """Two items wait and one is in the thread's hands."""
    reached = [threading.Event() for _ in range(100)]
    ahead = shards.read_ahead((event.set() or i for i, event in enumerate(reached)), depth=2)
    assert reached[2].wait(60) and not reached[3].wait(0.1)
    assert list(ahead) == list(range(100))


def test_an_error_is_raised_where_its_item_would_have_been():
    ahead = shards.read_ahead(1 // n for n in (1, -1, 0))
    assert [next(ahead), next(ahead)] == [1, -1]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_a_reader_that_is_left_behind_does_not_keep_the_process():
    code = "from data.shards import read_ahead; import itertools; print(next(read_ahead(itertools.count(5), depth=2)))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout == b"5\n"


NAMES = [f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3)] + ["fineweb_val_000000.bin"]
TRAIN, VAL = "fineweb_train_*.bin", "fineweb_val_*.bin"


def check(pattern, vocab_size=100, batch_tokens=100, needed=1, fineweb_shards=None):
    shards.check_stream(str(pattern), vocab_size, batch_tokens, needed, "a test", fineweb_shards)


@pytest.fixture
def fineweb(tmp_path, monkeypatch):
    """A folder that passes for FineWeb's, with shards of 15 batches."""
    monkeypatch.setattr(shards, "FINEWEB_FOLDER", tmp_path)
    for name in NAMES:
        write_shard(tmp_path / name, np.zeros(1_600))
    return tmp_path


@pytest.mark.parametrize("length, first, bytes_read", [(10**6, 999_999, 2 * 10**6), (25_000_000, 24_000_000, 2**21)])
def test_another_vocabulary_is_found(tmp_path, monkeypatch, length, first, bytes_read):
    """One wrong id in a small shard; in a large one, of which 2 MiB are read, some near the end."""
    tokens = np.zeros(length, np.uint16)
    tokens[first::10_000] = 300
    write_shard(tmp_path / "b.bin", tokens)
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: read.append(size) or pread(file, size, start))
    with pytest.raises(ValueError, match="b.bin: holds token id 300, but vocab_size is 256") as raised:
        check(tmp_path / "*.bin", vocab_size=256)
    assert sum(read) == bytes_read and not isinstance(raised.value, MissingShardsError)


@pytest.mark.parametrize("pattern, batches, complaint", [
    (TRAIN, 30, None),
    (TRAIN, 31, f"{NAMES[2]} is missing though later shards are there"),
    ("fineweb_train_00000[124].bin", 31, None),  # it was left out on purpose
])
def test_a_gap_in_what_a_run_reads_is_a_mistake(fineweb, pattern, batches, complaint):
    (fineweb / NAMES[2]).rename(fineweb / "fineweb_train_000004.bin")
    with pytest.raises(MissingShardsError, match=complaint) if complaint else nullcontext():
        check(fineweb / pattern, needed=batches)


@pytest.mark.parametrize("num_iterations, step_tokens, count", [
    (1, 524_288, 1), (5890, 524_288, 31), (5891, 524_288, 32), (5960, 524_288, 32), (100, 2 * 524_288, 2),
    (2, 99_999_998, 2), (1, 99_999_999, None), (19_570, 524_288, 103), (19_571, 524_288, None)])
def test_the_number_of_shards_that_a_config_needs(num_iterations, step_tokens, count):
    """190 steps of 524,288 tokens a shard, 95 of twice that; a batch needs two tokens to spare; 103 are all."""
    assert shards.fineweb_shards_needed(num_iterations, step_tokens) == count
    if count is not None:
        batches = [num_batches(n * [100_000_000], step_tokens) for n in (count - 1, count)]
        assert batches[0] < num_iterations <= batches[1]


@pytest.mark.parametrize("gone, pattern, keys, number", [
    (NAMES, TRAIN, dict(fineweb_shards=32), 32),
    (NAMES, VAL, dict(fineweb_shards=32), 32),
    (NAMES, VAL, dict(fineweb_shards=0), 0),  # the run's training data are elsewhere
    (NAMES[1:2], TRAIN, dict(needed=30, fineweb_shards=1), 2),  # by whole shards' lengths, one would do
    ([], TRAIN, dict(needed=46, fineweb_shards=1), 1),  # by their number they would do: they are damaged
    ([], TRAIN, dict(needed=46, fineweb_shards=4), 4),
    ([], TRAIN, dict(needed=46), None),  # even all are too few
    ([], VAL, dict(needed=16, fineweb_shards=3), None),  # there is one validation shard
    ([], TRAIN, dict(vocab_size=0, fineweb_shards=3), None),  # other data would not help
    ([], "elsewhere/*.bin", dict(fineweb_shards=1), None),
])
def test_what_fetching_mends_names_its_command(fineweb, gone, pattern, keys, number):
    for name in gone:
        (fineweb / name).unlink()
    with pytest.raises(ValueError) as raised:
        check(fineweb / pattern, **keys)
    command = () if number is None else ("data/cached_fineweb10B.py", str(number))
    assert getattr(raised.value, "command", ()) == command
    assert str(raised.value).partition("; to get them: ")[2] == " ".join(("python", *command) if command else ())


def test_whole_shards_that_are_too_few_for_a_narrow_pattern_are_not_fetched_again(fineweb, monkeypatch):
    monkeypatch.setattr(shards, "FINEWEB_SHARD_TOKENS", 1_600)
    with pytest.raises(ValueError) as raised:
        check(fineweb / "fineweb_train_00000[12].bin", needed=31, fineweb_shards=3)
    assert not isinstance(raised.value, MissingShardsError)


def test_a_damaged_shard_beyond_those_needed_is_to_be_fetched_too(fineweb):
    os.truncate(fineweb / NAMES[2], 2_000)
    with pytest.raises(MissingShardsError) as raised:
        check(fineweb / TRAIN, fineweb_shards=1)
    assert raised.value.command == ("data/cached_fineweb10B.py", "3")


@pytest.mark.parametrize("files, command", [([], ("data/local_text.py",)), (["local_train_000000.bin"], ())])
def test_local_text_is_made_only_where_none_is_there(tmp_path, monkeypatch, files, command):
    """A damaged one may be of the user's own text."""
    monkeypatch.setattr(shards, "LOCAL_TEXT_FOLDER", tmp_path)
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(MissingShardsError) as raised:
        check(tmp_path / "local_train_*.bin")
    assert pickle.loads(pickle.dumps(raised.value)).command == command
