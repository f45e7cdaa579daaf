"""Turn text files into shards of bytes: python data/local_text.py [PATH ...]

Writes data/local_text/local_train_*.bin and local_val_*.bin in the speedrun's shard format, for configs/tiny.toml.
A file is a document: the end-of-text token 256, then its bytes as token ids 0 to 255. A folder stands for the text
files in it. With no PATH it takes the standard library of the running Python.

The documents are put in an order that depends on their names only; the last tenth of the tokens is the validation set.
"""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np

END_OF_TEXT = 256
SHARD_TOKENS = 100_000_000
VAL_FRACTION = 0.1
OUTPUT = Path(__file__).resolve().parent / "local_text"
# Not the standard library's own text: installed packages and, where a distribution ships them, its tests.
NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def standard_library() -> list[Path]:
    """The Python files of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in root.rglob("*.py") if path.is_file() and not NOT_STANDARD_LIBRARY & set(path.relative_to(root).parts)]


def text_files(path: Path) -> list[Path]:
    """The file, or the files below the folder, hidden ones left out. ValueError where there is nothing."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; name text files or folders of them")
    files = [p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise ValueError(f"{path}: the folder holds no files; name text files or folders of them")
    return files


def read_documents(files: list[Path]) -> list[np.ndarray]:
    """The bytes of each file as token ids behind an end-of-text token, in the order of a hash of the names.

    Files with a zero byte are no text and empty ones no document; they are left out.
    """
    files = sorted(set(files), key=lambda path: (hashlib.sha256(path.name.encode(errors="surrogateescape")).digest(), path))
    texts = (path.read_bytes() for path in files)
    return [np.concatenate([[END_OF_TEXT], np.frombuffer(text, np.uint8)]).astype(np.uint16) for text in texts if text and b"\0" not in text]


def split(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens; a document that the cut goes through goes on in the validation set as one of its own."""
    tokens = np.concatenate(documents)
    cut = int(len(tokens) * (1 - VAL_FRACTION))
    val = tokens[cut:]
    return tokens[:cut], val if val[0] == END_OF_TEXT else np.concatenate([[np.uint16(END_OF_TEXT)], val])


def byte_frequency_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Cross-entropy (nats a token) on `val` of a model that knows only how often each token is in `train`."""
    counts = np.bincount(train, minlength=END_OF_TEXT + 1) + 1  # one more of each: no token is impossible
    return float(-np.log(counts / counts.sum())[val].mean())


def write_shards(tokens_of: dict[str, np.ndarray], output: Path) -> None:
    """Write each name's tokens as `<name>_<number, six digits>.bin` files of at most 100M tokens; remove those of an earlier text.

    A file under a shard's name is always whole: all are written under other names first, and then renamed.
    """
    unfinished = {}
    for name, tokens in tokens_of.items():
        for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
            shard = tokens[start : start + SHARD_TOKENS]
            header = np.zeros(256, "<i4")
            header[:3] = 20240520, 1, len(shard)
            path = output / f"{name}_{number:06d}.bin"
            unfinished[path] = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
            unfinished[path].write_bytes(header.tobytes() + shard.astype("<u2").tobytes())
    for path, source in unfinished.items():
        source.replace(path)
    for old in set(output.glob("local_*.bin")) - set(unfinished):
        old.unlink(missing_ok=True)


def make_shards(paths: list[Path], output: Path) -> str:
    """Turn the texts into shards in `output`; returns what was made, in a few lines. ValueError: there is too little text."""
    files = [file for path in paths for file in text_files(path)] if paths else standard_library()
    documents = read_documents(files)
    if sum(map(len, documents)) < 1000:
        raise ValueError(f"the {len(files)} files hold too little text to make training and validation shards of; name more")
    train, val = split(documents)
    output.mkdir(parents=True, exist_ok=True)
    write_shards({"local_train": train, "local_val": val}, output)
    source = ", ".join(map(str, paths)) or f"the standard library of Python {sys.version.split()[0]}"
    return (
        f"{output}: {len(documents):,} documents from {source}: {len(train):,} training and {len(val):,} validation tokens\n"
        f"a model that knows only byte frequencies has validation loss {byte_frequency_loss(train, val):.4f}"
    )


def main(arguments: list[str]) -> int:
    if any(argument.startswith("-") for argument in arguments):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    try:
        print(make_shards([Path(argument) for argument in arguments], OUTPUT))
    except (ValueError, OSError) as error:
        print(f"local_text.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
