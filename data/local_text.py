"""Turn text files into shards of bytes, or of a tokenizer's ids; data/README.md describes both."""

import argparse
import codecs
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Collection, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import Shard, open_shard, reading, write_shard

LOCAL_TEXT_FOLDER = Path(__file__).resolve().parent / "local_text"
BYTE_PAIRS_FOLDER = LOCAL_TEXT_FOLDER.with_name("local_text_bpe")
EOT_ID, EOT_NAME = 256, "<|endoftext|>"  # end of text, among bytes and in a tokenizer
DOCUMENT_BYTES = 1024  # at most; with whole files as documents, `tiny` would validate on a part of one file
# Installed packages, and the tests that some distributions ship, are not the standard library's own text.
EXCLUDED_FOLDERS = set("site-packages dist-packages test tests idlelib lib2to3 turtledemo __pycache__".split())


def find_files(path: Path, suffix: str = "", excluded: Container[str] = ()) -> list[Path]:
    """Return the file, or those below the folder, but no hidden ones. Raises OSError if a folder cannot be read."""
    if not path.is_dir():
        return [path]
    children = [child for child in path.iterdir() if child.name[0] != "." and child.name not in excluded]
    return [file for child in children if child.is_file() and child.name.endswith(suffix)
            or child.is_dir() and not child.is_symlink() for file in find_files(child, suffix, excluded)]


def read_file(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces, UTF-16 with a byte order mark as UTF-8. Raises ValueError if it cannot be read."""
    with reading(path), open(path, "rb") as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            file = codecs.EncodedFile(file, "utf-8", "utf-16", errors="replace")
        yield from iter(lambda: file.read(2**16), b"")


def split_text(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield documents of up to DOCUMENT_BYTES that end with a line, else with a word, else with a UTF-8 character."""
    text = b""
    for piece in pieces:
        text += piece
        while len(text) > DOCUMENT_BYTES:
            line, word = (text.rfind(mark, 0, DOCUMENT_BYTES) + 1 for mark in (b"\n", b" "))
            characters = (end for end in range(DOCUMENT_BYTES, DOCUMENT_BYTES - 4, -1) if text[end] & 0xC0 != 0x80)
            end = line or word or next(characters, DOCUMENT_BYTES)
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def read_documents(files: Collection[Path], skipped: list[Path], found: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield documents as id 256 and their bytes.

    Add binary files to `skipped`, and the hash and the number of tokens of each document to `found`.
    """
    for path in sorted(files):
        if any(b"\0" in piece for piece in read_file(path)):
            skipped.append(path)
        for document in () if path in skipped else split_text(read_file(path)):
            found.append((zlib.crc32(document), 1 + len(document)))
            yield np.append(np.uint16(EOT_ID), np.frombuffer(document, np.uint8))


def read_spans(text: Shard, spans: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the documents at `spans`, (n, 2): first token and number of tokens. Each piece holds up to 256."""
    for i in range(0, len(spans), 256):
        yield np.concatenate([text.read(*span) for span in spans[i : i + 256].tolist()])


def to_texts(piece: np.ndarray) -> list[str]:
    """Return the documents in a piece: id 256, which starts each, becomes a zero byte."""
    return piece.astype(np.uint8).tobytes().decode("utf-8", "replace").split("\0")[1:]


def make_tokenizer(file: Path | None, vocab_size: int, pieces: Iterator[np.ndarray]) -> Any:
    """Return a file's tokenizer, or train one on the pieces' byte pairs; add an end of text if it lacks one."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    if file:
        tokenizer = Tokenizer.from_file(str(file))
    else:
        pairs = ByteLevelBPETokenizer()
        pairs.train_from_iterator(map(to_texts, pieces), vocab_size - 1, show_progress=False)
        tokenizer = Tokenizer.from_str(pairs.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a special token in a document is text
    tokenizer.add_special_tokens([EOT_NAME])
    return tokenizer


def encode(pieces: Iterator[np.ndarray], tokenizer: Any, eot_id: int, counts: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pieces of bytes as the tokenizer's ids, or unchanged without one; add each id's frequency to `counts`."""
    for piece in pieces:
        if tokenizer:
            texts = tokenizer.encode_batch_fast(to_texts(piece), add_special_tokens=False)
            piece = np.array([i for text in texts for i in (eot_id, *text.ids)], np.uint16)
        counts += np.bincount(piece, minlength=len(counts))
        yield piece


def make_shards(paths: list[Path], output: Path, vocab_size: int | None = None, file: Path | None = None) -> str:
    """Replace a folder's shards by those of texts, in bytes or a tokenizer's ids. Raises ValueError or OSError."""
    skipped, found, tokenizer, eot_id, num_ids = [], [], None, EOT_ID, EOT_ID + 1
    library = Path(sysconfig.get_path("stdlib"))
    files = {f for path in paths for f in find_files(path)} if paths else find_files(library, ".py", EXCLUDED_FOLDERS)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        write_shard(f"{folder}/text", read_documents(files, skipped, found))
        hashes, lengths = np.array(found, int).reshape(-1, 2).T
        order = np.argsort(hashes, kind="stable")  # shuffled
        cut = int(np.searchsorted(lengths[order].cumsum(), 0.9 * lengths.sum()))
        cut = int(np.searchsorted(hashes[order], hashes[order][cut])) if found else 0  # equal documents stay together
        if cut == 0 or lengths.sum() < 10 * DOCUMENT_BYTES:
            raise ValueError(f"the {len(files)} files hold too little text for training and validation; name more")
        text = open_shard(Path(folder, "text"), num_ids)
        spans = np.stack([lengths.cumsum() - lengths, lengths], axis=1)[order]
        if vocab_size or file:
            tokenizer = make_tokenizer(file, vocab_size, read_spans(text, spans[:cut]))
            tokenizer.save(f"{folder}/local_tokenizer.json")
            eot_id, num_ids = tokenizer.token_to_id(EOT_NAME), max(tokenizer.get_vocab().values()) + 1
            if num_ids > 2**16:
                raise ValueError(f"the tokenizer has {num_ids:,} ids, a shard's limit is {2**16:,}; use a smaller one")
        train, val = np.zeros((2, num_ids), int)
        for name, counts, part in (("train", train, spans[:cut]), ("val", val, spans[cut:])):
            write_shard(f"{folder}/local_{name}_000000.bin", encode(read_spans(text, part), tokenizer, eot_id, counts))
        new = {path.replace(output / path.name) for path in Path(folder).glob("local_*")}
    for old in set(output.glob("local_*.bin")) - new:
        old.unlink()
    loss, rate = -val @ np.log((train + 1) / (train + 1).sum()) / val.sum(), spans[cut:, 1].sum() / val.sum()
    example = f", as {skipped[0]}" if skipped else ""
    eot_key = f", end_of_text = {eot_id}" if eot_id < num_ids - 1 else ""
    return (f"{output}: {len(found):,} documents from {len(files) - len(skipped)} files in "
            f"{', '.join(map(str, paths)) or library}; skipped {len(skipped)} binary files{example}\n"
            f"{train.sum():,} training and {val.sum():,} validation tokens of {rate:.3f} bytes\n"
            f"a model that knows only {'token' if tokenizer else 'byte'} frequencies has validation loss {loss:.4f}, "
            f"{loss / rate:.4f} a byte\nset vocab_size = {num_ids}{eot_key}")


def main(arguments: list[str]) -> None:
    """Run the command; exit with status 2 and one line if it fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.error = lambda message: parser.exit(2, f"local_text.py: {message}; see --help\n")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="default: Python's standard library")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--vocab_size", type=int, metavar="N", help="make a tokenizer of N ids from the training text")
    kind.add_argument("--tokenizer", type=Path, metavar="FILE.json", help="use a file of the `tokenizers` library")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: data/local_text or data/local_text_bpe")
    options = parser.parse_args(arguments)
    if options.vocab_size is not None and options.vocab_size < 258:
        parser.error(f"--vocab_size is {options.vocab_size}; use at least 258: the bytes, a pair and the end of text")
    default = BYTE_PAIRS_FOLDER if options.vocab_size or options.tokenizer else LOCAL_TEXT_FOLDER
    try:
        print(make_shards(options.paths, options.output or default, options.vocab_size, options.tokenizer))
    except (Exception, KeyboardInterrupt) as error:  # the tokenizers library raises plain Exceptions
        place = f"{options.tokenizer}: not a tokenizer: " if type(error) is Exception else ""
        fix = f"; {sys.executable} -m pip install tokenizers" if isinstance(error, ImportError) else ""
        parser.exit(2, f"local_text.py: {place}{str(error) or type(error).__name__}{fix}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
