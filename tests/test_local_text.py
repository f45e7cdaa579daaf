"""data/local_text.py: text files become shards of bytes."""

import math

import numpy as np
import pytest

from data import local_text
from data.shards import open_shards

EOT = chr(256)


def make(path, folder):
    """Make shards of a file or folder; return their training and validation tokens as characters."""
    local_text.make_shards([path], folder)
    shards = (open_shards(f"{folder}/local_{kind}_*.bin") for kind in ("train", "val"))
    return ["".join(chr(token) for shard in each for token in shard.read(0, shard.num_tokens)) for each in shards]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts" / "deeper").mkdir(parents=True)
    for i in range(20):
        path = tmp_path / "texts" / ("deeper" if i % 2 else "") / f"{i}.txt"
        path.write_text(f"Text number {i}: žluťoučký kůň.\n" * (i + 5))
    return tmp_path / "texts"


def test_each_file_is_a_document_and_a_tenth_is_for_validation(texts, tmp_path):
    """All but the document at the cut are whole. The same text gives the same shards. Other files are left out."""
    train, val = make(texts, tmp_path / "a")
    found, expected = (train + val).split(EOT)[1:], [path.read_text("latin-1") for path in texts.rglob("*.txt")]
    assert len({*found} & {*expected}) >= 19 and sum(map(len, found)) == sum(map(len, expected))
    assert train[0] == val[0] == EOT and len(val) / len(train + val) == pytest.approx(0.1, abs=0.001)
    for name, content in (("binary", b"a\0b" * 1000), ("empty.txt", b""), (".hidden", b"hidden" * 1000)):
        (texts / name).write_bytes(content)
    assert make(texts, tmp_path / "b") == [train, val]


def test_a_single_file_is_cut_in_two(tmp_path):
    (tmp_path / "book.txt").write_bytes(text := bytes(range(1, 256)) * 20)
    first, second = make(tmp_path / "book.txt", tmp_path)
    assert first[0] == second[0] == EOT and first[1:] + second[1:] == text.decode("latin-1")


def test_new_text_replaces_the_old_shards(texts, tmp_path, monkeypatch):
    """1081 training tokens are two shards."""
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 1000)
    make(texts, tmp_path)
    many = sorted(path.name for path in tmp_path.glob("local_train_*.bin"))
    (tmp_path / "short.txt").write_text("short " * 200)
    make(tmp_path / "short.txt", tmp_path)
    names = ["local_train_000000.bin", "local_train_000001.bin"]
    assert sorted(path.name for path in tmp_path.glob("local_*.bin")) == [*names, "local_val_000000.bin"]
    assert many[:2] == names and len(many) > 3


def test_byte_frequency_loss_of_a_known_distribution():
    loss = local_text.byte_frequency_loss(np.repeat(np.arange(256), 10_000), np.arange(256))
    assert loss == pytest.approx(math.log(256), abs=1e-3)


@pytest.mark.parametrize("name, fault", [
    ("short", "too little text"), ("nowhere", "no such file, or a folder without files")])
def test_a_mistake_is_one_line(tmp_path, capsys, name, fault):
    (tmp_path / "short").touch()
    with pytest.raises(SystemExit, match="2"):
        local_text.main([str(tmp_path / name)])
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("local_text.py: ") and fault in error


def test_the_standard_library_is_taken_without_packages_and_tests(tmp_path, monkeypatch):
    for name in ("os.py", "json/tool.py", "site-packages/numpy/version.py", "test/test_os.py", "json/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(local_text.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    assert {path.name for path in local_text.standard_library()} == {"os.py", "tool.py"}
