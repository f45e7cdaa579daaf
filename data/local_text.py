"""Turn text files into shards of bytes: python data/local_text.py [PATH ...]

Writes data/local_text/local_train_*.bin and local_val_*.bin in the speedrun's shard format, for --scale tiny.
A file is a document: the end-of-text token 256, then its bytes as token ids 0 to 255. A folder stands for the text
files in it. With no PATH it takes the standard library of the running Python. The documents' order depends on their
names only; the last tenth of the tokens is the validation set.
"""

import hashlib
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import LOCAL_TEXT_FOLDER, write_shard

END_OF_TEXT = 256
SHARD_TOKENS = 100_000_000
# Not the standard library's own text: installed packages and, where a distribution ships them, its tests.
NOT_STANDARD_LIBRARY = set("site-packages dist-packages test tests idlelib lib2to3 turtledemo __pycache__".split())


def standard_library() -> list[Path]:
    """The Python files of the running Python's standard library, without its tests."""
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders) - NOT_STANDARD_LIBRARY  # those that are left are walked through
        files += [path for name in names if name.endswith(".py") and (path := Path(folder, name)).is_file()]
    return files


def text_files(path: Path) -> list[Path]:
    """The file, or the files below the folder without hidden ones. Raises ValueError if there are none."""
    if path.is_file():
        return [path]
    files = [file for file in path.rglob("*") if file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise ValueError(f"{path}: no such file, or a folder without files; name text files or folders of them")
    return files


def read_documents(files: list[Path]) -> list[np.ndarray]:
    """The bytes of each file as tokens behind an end-of-text token, in the order of a hash of the names.

    Empty files and those with a zero byte, which are not text, are left out."""
    files = sorted(set(files), key=lambda path: (hashlib.sha256(os.fsencode(path.name)).digest(), path))
    texts = (text for path in files if (text := path.read_bytes()) and b"\0" not in text)
    return [np.concatenate([[END_OF_TEXT], np.frombuffer(text, np.uint8)]).astype(np.uint16) for text in texts]


def split(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens. The rest of a document that the cut goes through is a validation document."""
    tokens = np.concatenate(documents)
    cut = int(len(tokens) * 0.9)
    val = tokens[cut:]
    return tokens[:cut], val if val[0] == END_OF_TEXT else np.concatenate([[np.uint16(END_OF_TEXT)], val])


def byte_frequency_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Cross-entropy (nats a token) on `val` of a model that knows only how often each token is in `train`."""
    counts = np.bincount(train, minlength=END_OF_TEXT + 1) + 1  # one more of each: no token is impossible
    return float(-np.log(counts / counts.sum())[val].mean())


def write_shards(tokens_of: dict[str, np.ndarray], output: Path) -> None:
    """Write each name's tokens as shards `<name>_<number>.bin`, moved there when all are whole; remove older ones."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as unfinished:
        for name, tokens in tokens_of.items():
            for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
                write_shard(f"{unfinished}/{name}_{number:06d}.bin", tokens[start : start + SHARD_TOKENS])
        moved = {path.replace(output / path.name) for path in Path(unfinished).iterdir()}
    for old in set(output.glob("local_*.bin")) - moved:
        old.unlink(missing_ok=True)


def make_shards(paths: list[Path], output: Path) -> str:
    """Turn the texts into shards in a folder; returns what was made. Raises ValueError if there is too little text."""
    files = [file for path in paths for file in text_files(path)] if paths else standard_library()
    documents = read_documents(files)
    if sum(map(len, documents)) < 1000:
        raise ValueError(f"the {len(files)} files hold too little text for training and validation shards; name more")
    train, val = split(documents)
    write_shards({"local_train": train, "local_val": val}, output)
    source = ", ".join(map(str, paths)) or f"the standard library of Python {sys.version.split()[0]}"
    sizes = f"{len(train):,} training and {len(val):,} validation tokens"
    return (f"{output}: {len(documents):,} documents from {source}: {sizes}\n"
            f"a model that knows only byte frequencies has validation loss {byte_frequency_loss(train, val):.4f}")


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if any(argument.startswith("-") for argument in arguments):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    try:
        print(make_shards([Path(argument) for argument in arguments], LOCAL_TEXT_FOLDER))
    except (ValueError, OSError) as error:
        print(f"local_text.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
