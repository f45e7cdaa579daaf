"""data/local_text.py: text files become shards of bytes."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import local_text
from data.shards import open_shards


def read_back(folder):
    """Training and validation tokens from the shards in a folder."""
    shards = (open_shards(f"{folder}/local_{kind}_*.bin") for kind in ("train", "val"))
    return tuple(np.concatenate([shard.read(0, shard.num_tokens) for shard in each]) for each in shards)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for i in range(20):
        (folder / ("deeper" if i % 2 else "") / f"{i}.txt").write_text(f"Text number {i}: žluťoučký kůň.\n" * (i + 5))
    return folder


def documents(tokens):
    """The bytes between the end-of-text tokens."""
    starts = np.flatnonzero(tokens == 256)
    return [bytes(part[1:].astype(np.uint8)) for part in np.split(tokens, starts)[1:]]


def test_each_file_is_a_document_byte_by_byte(texts, tmp_path):
    local_text.make_shards([texts], tmp_path / "out")
    train_tokens, val_tokens = read_back(tmp_path / "out")
    assert train_tokens[0] == val_tokens[0] == 256
    found = documents(train_tokens) + documents(val_tokens)
    expected = [path.read_bytes() for path in texts.rglob("*.txt")]
    assert b"".join(sorted(found)) != b"" and sum(map(len, found)) == sum(map(len, expected))
    # All but the document that the cut goes through are whole.
    assert len([text for text in expected if text in found]) >= len(expected) - 1


def test_a_tenth_is_for_validation(texts, tmp_path):
    local_text.make_shards([texts], tmp_path / "out")
    train_tokens, val_tokens = read_back(tmp_path / "out")
    assert len(val_tokens) / (len(train_tokens) + len(val_tokens)) == pytest.approx(0.1, abs=0.001)


def test_a_single_file_is_cut_in_two(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 256)) * 20)
    local_text.make_shards([tmp_path / "book.txt"], tmp_path / "out")
    (first,), (second,) = map(documents, read_back(tmp_path / "out"))
    assert first + second == bytes(range(1, 256)) * 20


def test_the_same_text_gives_the_same_shards(texts, tmp_path):
    for name in ("a", "b"):
        local_text.make_shards([texts], tmp_path / name)
    assert all(np.array_equal(a, b) for a, b in zip(read_back(tmp_path / "a"), read_back(tmp_path / "b")))


def test_binary_empty_and_hidden_files_are_left_out(texts, tmp_path):
    local_text.make_shards([texts], tmp_path / "a")
    (texts / "binary").write_bytes(b"a\0b" * 1000)
    (texts / "empty.txt").touch()
    (texts / ".hidden").write_text("hidden" * 1000)
    local_text.make_shards([texts], tmp_path / "b")
    assert all(np.array_equal(a, b) for a, b in zip(read_back(tmp_path / "a"), read_back(tmp_path / "b")))


def test_new_text_replaces_the_old_shards(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 1000)
    local_text.make_shards([texts], tmp_path)
    many = sorted(path.name for path in tmp_path.glob("local_train_*.bin"))
    assert many[0] == "local_train_000000.bin" and len(many) > 3
    (tmp_path / "short.txt").write_text("short " * 200)
    local_text.make_shards([tmp_path / "short.txt"], tmp_path)
    assert [path.name for path in tmp_path.glob("local_train_*.bin")] != many
    assert len(list(tmp_path.glob("local_*.bin"))) == 3  # 1081 training tokens are two shards


def test_byte_frequency_loss_of_a_known_distribution():
    train_tokens = np.repeat(np.arange(256), 10_000)
    assert local_text.byte_frequency_loss(train_tokens, np.arange(256)) == pytest.approx(math.log(256), abs=1e-3)


@pytest.mark.parametrize("make, complaint", [
    (lambda path: None, "no such file, or a folder without files"),
    (lambda path: path.mkdir(), "no such file, or a folder without files"),
    (lambda path: path.write_text("little"), "too little text"),
])
def test_mistakes_are_one_line(tmp_path, capsys, make, complaint):
    make(tmp_path / "text")
    assert local_text.main([str(tmp_path / "text")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and complaint in errors[0]


def test_without_a_path_it_takes_the_standard_library():
    paths = local_text.standard_library()
    assert {"argparse.py", "dataclasses.py", "os.py"} <= {path.name for path in paths}
    assert not any("site-packages" in path.parts for path in paths)
