"""data/shards.py: the file format, faulty shards, patterns and the fingerprint. test_loader.py reads whole batches."""

import errno
import hashlib
import json
import os
import struct
from unittest.mock import Mock

import numpy as np
import pytest

from data.shards import MissingShardsError, fingerprint, open_shards, write_shard, write_synthetic_shard


def header(magic=20240520, version=1, count=20_000):
    return struct.pack("<3i", magic, version, count) + bytes(1012)


def test_a_shard_is_256_int32_and_its_tokens_as_uint16_and_shards_are_sorted(tmp_path):
    for number in (10, 2, 1):
        write_shard(tmp_path / f"s_{number:06d}.bin", (np.array(part) for part in ([number], [50_256, 65_535])))
    assert (tmp_path / "s_000002.bin").read_bytes() == header(count=3) + struct.pack("<3H", 2, 50_256, 65_535)
    assert [shard.read(0, 1).item() for shard in open_shards(f"{tmp_path}/s_*.bin")] == [1, 2, 10]


def test_synthetic_documents_begin_with_the_end_of_text_and_are_as_long_as_stated(tmp_path):
    write_synthetic_shard(tmp_path / "s.bin", 1_000_000, 2**16, 7)
    tokens = open_shards(f"{tmp_path}/s.bin")[0].read(0, 1_000_000)
    assert tokens[0] == 7 and tokens.max() > 60_000 and 600 < 1_000_000 / (tokens == 7).sum() < 900
    assert (tokens == 0).mean() == pytest.approx(2 * (tokens == 1).mean(), rel=0.3)


def test_a_shard_that_changes_during_a_run(tmp_path, monkeypatch):
    """Replacing it does not change the run. Truncation and a failing system call are errors that name the file."""
    path = tmp_path / "s.bin"
    write_shard(path, np.full(1000, 7))
    (opened,), (replaced,) = open_shards(str(path)), open_shards(str(path))
    os.truncate(path, 1024 + 1000)
    assert opened.read(0, 500).size == 500
    with pytest.raises(ValueError, match=f"{path}: cannot be read: ends before token 501, though it was whole when op"):
        opened.read(0, 501)
    write_shard(tmp_path / "new", np.zeros(500))
    (tmp_path / "new").rename(path)
    assert replaced.read(490, 10).tolist() == 10 * [7]
    for number, fix in ((errno.EIO, "check its path, permissions and disk"), (errno.EMFILE, "raise ulimit -n")):
        monkeypatch.setattr(os, "pread", Mock(side_effect=OSError(number, os.strerror(number))))
        with pytest.raises(ValueError, match=f"{path}: cannot be read: {os.strerror(number)}; {fix}"):
            opened.read(0, 500)


@pytest.mark.parametrize("make, fault", [
    (lambda path: path.write_bytes(header(magic=1) + bytes(40_000)), "wrong magic number, 1 in its header instead of"),
    (lambda path: path.write_bytes(header(version=2) + bytes(40_000)), "wrong version, 2 in its header instead of 1"),
    (lambda path: path.write_bytes(header(count=100) + bytes(39_999)), "wrong length, 100 in .* instead of 19999.5"),
    (lambda path: path.touch(), "wrong magic number, 0 in"),
    (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    (lambda path: path.symlink_to("/nowhere"), "cannot be read: No such file")])
def test_a_damaged_or_unreadable_shard_is_named_with_its_fault(tmp_path, make, fault):
    """Only a damaged one is to be fetched again."""
    write_shard(tmp_path / "b_1.bin", np.zeros(10))
    make(bad := tmp_path / "b_2.bin")
    fix = "check its path, permissions and disk" if "read" in fault else "not a valid shard: make or fetch it again"
    with pytest.raises(ValueError, match=f"{bad}: {fault}.*; {fix}") as raised:
        open_shards(f"{tmp_path}/b_*.bin")
    assert isinstance(raised.value, MissingShardsError) == ("read" not in fault)


@pytest.mark.parametrize("folder, name, pattern", [
    ("a [v2]", "s_1.bin", "s_*.bin"), ("[v2]", "s_1.bin", "s_[12].bin"), ("[12]", "s[v2].bin", "s[v2].bin"),
    ("b", "s[v2]_1.bin", "s[v2]_*.bin")])
def test_brackets_are_literal_in_an_existing_folder_and_where_they_match_nothing(tmp_path, folder, name, pattern):
    for each in (folder, "1", "v"):  # which the brackets would match
        (tmp_path / each).mkdir()
        write_shard(tmp_path / each / name, np.zeros(10))
    assert [shard.path for shard in open_shards(f"{tmp_path}/{folder}/{pattern}")] == [tmp_path / folder / name]


def test_the_fingerprint_is_of_the_shards_that_are_read_and_of_their_first_64_kib(tmp_path):
    """The first shard holds 78 batches, the second none."""
    expected = []
    for name, length in (("s_0.bin", 40_000), ("s_1.bin", 300), ("s_2.bin", 1_000)):
        write_shard(tmp_path / name, np.arange(length))
        expected.append([name, length, hashlib.sha256((tmp_path / name).read_bytes()[: 2**16]).hexdigest()[:16]])
    for count, read in ((78, expected[:1]), (79, expected[::2])):
        assert json.loads(json.dumps(fingerprint(open_shards(f"{tmp_path}/s_*.bin"), 512, count))) == read
