"""data/local_text.py: text files become shards of bytes."""

import re
import sys
import tracemalloc
from pathlib import Path

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
        path.write_text("".join(f"Text {i}, line {j}: žluťoučký kůň.\n" for j in range(20 * (i + 5))))
    return tmp_path / "texts"


def test_documents_of_whole_lines_are_shuffled_and_a_tenth_is_for_validation(texts, tmp_path):
    """So each part has documents from everywhere. The same text gives the same shards, in place of older ones."""
    train, val = make(texts, tmp_path / "a")
    assert train[0] == val[0] == EOT and len(val) / len(train + val) == pytest.approx(0.1, abs=0.01)
    documents = (train + val).split(EOT)[1:]
    assert all(len(text) <= 1024 and text[-1] == "\n" for text in documents)
    found, expected = "".join(documents), "".join(path.read_text("latin-1") for path in texts.rglob("*.txt"))
    assert sorted(found.splitlines()) == sorted(expected.splitlines()) and found != expected
    assert len({text.partition(",")[0] for text in val.split(EOT)[1:]}) > 5  # files
    for name, content in (("binary", b"a\0b" * 1000), ("empty.txt", b""), (".hidden", b"hidden" * 1000)):
        (texts / name).write_bytes(content)
    for name in ("local_train_000001.bin", "local_plan.txt"):
        (texts.parent / name).touch()
    assert make(texts, tmp_path) == [train, val]
    kept = ["a", "local_plan.txt", "local_train_000000.bin", "local_val_000000.bin", "texts"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_equal_documents_are_in_one_part(tmp_path):
    """Else the model could learn a validation document by heart."""
    (tmp_path / "book.txt").write_bytes(bytes(1 + i % 7 for i in range(40) for _ in range(1024)))
    train, val = (part.split(EOT)[1:] for part in make(tmp_path / "book.txt", tmp_path))
    assert {*train} & {*val} == set() and len(train + val) == 40 and train and val


@pytest.mark.parametrize("text, lengths", [
    (b"x" * 1500, [1024, 476]), (b"a b " * 400, [1024, 576]), (b"x" * 1000 + b"\n" + b"y" * 1000, [1001, 1000]),
    (b"xyz " * 100 + b"z" * 1000, [400, 1000]), (b"line\n" * 300, [1020, 480]),
    ("\u6587".encode() * 400, [1023, 177]), (b"\xbf" * 1100, [1024, 76])])
def test_a_document_ends_with_a_line_or_a_word_or_a_character(text, lengths):
    for size in (1, 300, 5000):  # of the pieces that are read
        parts = [*local_text.split_text(text[i : i + size] for i in range(0, len(text), size))]
        assert [*map(len, parts)] == lengths and b"".join(parts) == text


def test_utf_16_is_read_as_its_utf_8_and_named_without_a_byte_order_mark(texts, tmp_path):
    expected = make(texts, tmp_path / "a")
    for path, kind in zip(sorted(texts.rglob("*.txt")), 7 * ["utf-16", "utf-16-le", "utf-16-be"]):
        mark = "" if kind == "utf-16" else "\ufeff"
        path.write_bytes((mark + path.read_text("utf-8")).encode(kind))
    (texts / "unmarked").write_text("words", "utf-16-le")
    assert make(texts, tmp_path / "b") == expected
    assert f"; skipped 1 binary files, as {texts}/unmarked\n" in local_text.make_shards([texts], tmp_path / "b")


@pytest.mark.parametrize("option, eot_id", [("--vocab_size=300", 299), ("--tokenizer=own.json", 1)])
def test_byte_pairs_hold_the_same_text_and_the_loss_compares_with_that_of_bytes(
        texts, tmp_path, monkeypatch, capsys, option, eot_id):
    """Of both parts, with the documents at the same places. A tokenizer's special tokens and limits do not count."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    (texts / "special.txt").write_text("a literal <|endoftext|> and <unk> " * 100)
    characters = make(texts, tmp_path / "bytes")
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator(["number" * 9], 270, special_tokens=["<unk>", "<|endoftext|>"])
    own.enable_truncation(5)
    own.enable_padding(length=50)
    own.save("own.json")
    monkeypatch.setattr(local_text, "BYTE_PAIRS_FOLDER", tmp_path / "local_text_bpe")
    local_text.main([option, "texts"])
    *_, summary, keys = capsys.readouterr().out.splitlines()
    tokenizer = tokenizers.Tokenizer.from_file("local_text_bpe/local_tokenizer.json")
    size = tokenizer.get_vocab_size()
    assert keys == ("set vocab_size = 300" if eot_id == 299 else f"set vocab_size = {size}, end_of_text = 1")
    shards = [open_shards(f"local_text_bpe/local_{kind}_*.bin")[0] for kind in ("train", "val")]
    train, val = [shard.read(0, shard.num_tokens) for shard in shards]
    for ids, expected in ((train, characters[0]), (val, characters[1])):
        documents = np.split(ids, np.flatnonzero(ids == eot_id))[1:]
        decoded = "".join("\0" + tokenizer.decode(part[1:], skip_special_tokens=False) for part in documents)
        assert decoded.encode() == expected.replace(EOT, "\0").encode("latin-1")
    loss, per_byte = map(float, re.fullmatch(r"a model that knows only token frequencies has validation loss (.*), "
                                             "(.*) a byte", summary).groups())
    p = np.bincount(train, minlength=size) + 1.0
    assert loss == pytest.approx(-np.log(p / p.sum())[val].mean(), abs=1e-4)
    assert per_byte == pytest.approx(loss * len(val) / len(characters[1]), rel=0.01)


def test_text_streams(tmp_path):
    """8 MB in one file take less than 6 MB of memory."""
    (tmp_path / "big.txt").write_bytes(b"".join(b"%d words again.\n" % i for i in range(420_000)))
    tracemalloc.start()
    local_text.make_shards([tmp_path / "big.txt"], tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


@pytest.mark.parametrize("arguments, fault", [
    (["short"], "too little text"), (["same"], "too little text"),
    (["nowhere"], "nowhere: cannot be read: No such file or directory; check its path"),
    (["loop"], "loop: cannot be read: Too many levels"),
    (["book", "--vocab_size=x"], "argument --vocab_size: invalid int value: 'x'; see --help"),
    (["book", "--vocab_size=0"], "--vocab_size is 0; use at least 258: the bytes, a pair and the end of text"),
    (["book", "--vocab_size=300", "--tokenizer=x"], "not allowed with"),
    (["book", "--tokenizer=short"], "short: not a tokenizer: "),
    (["book", "--tokenizer=nowhere"], "nowhere: not a tokenizer: No such file"),
    (["book", "--tokenizer=big"], "the tokenizer has 70,001 ids, a shard's limit is 65,536; use a smaller one"),
    (["book", "--vocab_size=300"], "-m pip install tokenizers")])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, fault):
    monkeypatch.chdir(tmp_path)
    Path("short").touch()
    Path("loop").symlink_to("loop")
    Path("book").write_text("".join(f"{i} words " for i in range(3000)))
    Path("same").write_text("word\n" * 10**5)
    if "tokenizer" in fault and "pip" not in fault:
        tokenizers = pytest.importorskip("tokenizers")
        tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(70_000)}, "0")).save("big")
    else:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SystemExit, match="2"):
        local_text.main([*arguments, "--output=out"])
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("local_text.py: ") and fault in error
    assert not Path("out").exists() or list(Path("out").iterdir()) == []


def test_the_standard_library_is_taken_without_packages_and_tests(tmp_path, monkeypatch):
    for name in ("os.py", "json/tool.py", "site-packages/numpy/version.py", "test/test_os.py", "json/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 1000)
    monkeypatch.setattr(local_text.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    summary = local_text.make_shards([], tmp_path / "out")
    assert f"documents from 2 files in {tmp_path}; skipped 0 binary files\n" in summary
