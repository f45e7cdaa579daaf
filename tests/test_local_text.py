"""data/local_text.py: text files become shards of bytes."""

import math

import numpy as np
import pytest

from data import local_text
from data.shards import open_shards


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for i in range(20):
        (folder / ("deeper" if i % 2 else "") / f"{i}.txt").write_text(f"Text number {i}: žluťoučký kůň.\n" * (i + 5))
    return folder


def make(path, folder):
    """Makes shards of a file or folder; returns the training and the validation tokens."""
    local_text.make_shards([path], folder)
    shards = (open_shards(f"{folder}/local_{kind}_*.bin") for kind in ("train", "val"))
    return [np.concatenate([shard.read(0, shard.num_tokens) for shard in each]) for each in shards]


def documents(tokens):
    """The bytes between the end-of-text tokens."""
    assert tokens[0] == 256
    return [bytes(part[1:].astype(np.uint8)) for part in np.split(tokens, np.flatnonzero(tokens == 256))[1:]]


def test_each_file_is_a_document_byte_by_byte_and_a_tenth_is_for_validation(texts, tmp_path):
    """All but the document that the cut goes through are whole."""
    train, val = make(texts, tmp_path / "out")
    found, expected = documents(train) + documents(val), [path.read_bytes() for path in texts.rglob("*.txt")]
    assert len({*found} & {*expected}) >= 19 and sum(map(len, found)) == sum(map(len, expected))
    assert len(val) / (len(train) + len(val)) == pytest.approx(0.1, abs=0.001)


def test_a_single_file_is_cut_in_two(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 256)) * 20)
    (first,), (second,) = map(documents, make(tmp_path / "book.txt", tmp_path / "out"))
    assert first + second == bytes(range(1, 256)) * 20


def test_the_same_text_gives_the_same_shards_and_other_files_are_left_out(texts, tmp_path):
    first = make(texts, tmp_path / "a")
    (texts / "binary").write_bytes(b"a\0b" * 1000)
    (texts / "empty.txt").touch()
    (texts / ".hidden").write_text("hidden" * 1000)
    assert all(map(np.array_equal, first, make(texts, tmp_path / "b")))


def test_new_text_replaces_the_old_shards(texts, tmp_path, monkeypatch):
    """1081 training tokens are two shards."""
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 1000)
    make(texts, tmp_path)
    many = sorted(path.name for path in tmp_path.glob("local_train_*.bin"))
    assert many[0] == "local_train_000000.bin" and len(many) > 3
    (tmp_path / "short.txt").write_text("short " * 200)
    make(tmp_path / "short.txt", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("local_*.bin")) == [*many[:2], "local_val_000000.bin"]


def test_byte_frequency_loss_of_a_known_distribution():
    train_tokens = np.repeat(np.arange(256), 10_000)
    assert local_text.byte_frequency_loss(train_tokens, np.arange(256)) == pytest.approx(math.log(256), abs=1e-3)


@pytest.mark.parametrize("text, complaint", [
    (None, "no such file, or a folder without files"), ("little", "too little text")])
def test_mistakes_are_one_line(tmp_path, capsys, text, complaint):
    if text:
        (tmp_path / "text").write_text(text)
    assert local_text.main([str(tmp_path / "text")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert complaint in error


def test_the_standard_library_is_taken_without_packages_and_tests(tmp_path, monkeypatch):
    for name in ("os.py", "json/tool.py", "site-packages/numpy/version.py", "test/test_os.py", "json/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(local_text.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    assert {path.name for path in local_text.standard_library()} == {"os.py", "tool.py"}
