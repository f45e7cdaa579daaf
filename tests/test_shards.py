"""data/shards.py: the file format, the stream's order and the fingerprint. test_loader.py reads whole batches."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest

from data.shards import MissingShardsError, batch_positions, fingerprint, num_batches, open_shards, write_shard


def header(magic=20240520, version=1, count=20_000):
    return struct.pack("<3i", magic, version, count) + bytes(1012)


def test_a_shard_is_256_int32_and_its_tokens_as_uint16_and_shards_are_sorted(tmp_path):
    for number in (10, 2, 1):
        write_shard(tmp_path / f"s_{number:06d}.bin", np.array([number, 50_256, 65_535]))
    assert (tmp_path / "s_000002.bin").read_bytes() == header(count=3) + struct.pack("<3H", 2, 50_256, 65_535)
    assert [shard.read(0, 1).item() for shard in open_shards(f"{tmp_path}/s_*.bin")] == [1, 2, 10]


def test_a_shard_that_changes_during_a_run(tmp_path, monkeypatch):
    """Replacing it does not change the run. Truncation and a lost disk sector are errors that name the file."""
    path = tmp_path / "s.bin"
    write_shard(path, np.full(1000, 7))
    (opened,), (replaced,) = open_shards(str(path)), open_shards(str(path))
    os.truncate(path, 1024 + 1000)
    assert opened.read(0, 500).size == 500
    with pytest.raises(MissingShardsError, match=f"{path}: ends before token 501, .* make or fetch it again"):
        opened.read(0, 501)
    write_shard(tmp_path / "new", np.zeros(500))
    (tmp_path / "new").rename(path)
    assert replaced.read(490, 10).tolist() == 10 * [7]
    monkeypatch.setattr(os, "pread", lambda *_: exec("raise OSError(5, 'Input/output error')"))
    with pytest.raises(MissingShardsError, match=f"{path}: Input/output error; make or fetch it again"):
        opened.read(0, 500)


@pytest.mark.parametrize("make, fault", [
    (lambda path: path.write_bytes(header(magic=1) + bytes(40_000)), "magic number 1 instead of 20240520"),
    (lambda path: path.write_bytes(header(version=2) + bytes(40_000)), "version 2 instead of 1"),
    (lambda path: path.write_bytes(header(count=100) + bytes(40_000)), "wrong length, 100 tokens .* 20,000"),
    (lambda path: path.write_bytes(header(count=0)), "wrong length"),
    (lambda path: path.touch(), "0 bytes are too short for the header of 1024"),
    (lambda path: path.mkdir(), "Is a directory"), (lambda path: path.symlink_to("/nowhere"), "No such file")])
def test_an_invalid_shard_is_named_with_its_fault(tmp_path, make, fault):
    write_shard(tmp_path / "b_1.bin", np.zeros(10))
    make(bad := tmp_path / "b_2.bin")
    with pytest.raises(MissingShardsError, match=f"{bad}: {fault}.*; not a valid shard: make or fetch it") as raised:
        open_shards(f"{tmp_path}/b_*.bin")
    assert raised.value.path == str(bad)


@pytest.mark.parametrize("lengths, expected", [
    ([513], []), ([514], [(0, 0)]), ([1025], [(0, 0)]), ([1300, 300, 514], [(0, 0), (0, 512), (2, 0)])])
def test_a_batch_needs_its_tokens_and_two_more_and_the_rest_is_dropped(lengths, expected):
    assert list(batch_positions(lengths, 512)) == expected and num_batches(lengths, 512) == len(expected)


def test_the_fingerprint_is_of_the_shards_that_are_read_and_of_their_first_64_kib(tmp_path):
    """The first shard holds 78 batches, the second none."""
    expected = []
    for name, length in (("s_0.bin", 40_000), ("s_1.bin", 300), ("s_2.bin", 1_000)):
        write_shard(tmp_path / name, np.arange(length))
        expected.append([name, length, hashlib.sha256((tmp_path / name).read_bytes()[: 2**16]).hexdigest()[:16]])
    for count, read in ((78, expected[:1]), (79, expected[::2])):
        assert json.loads(json.dumps(fingerprint(open_shards(f"{tmp_path}/s_*.bin"), 512, count))) == read
