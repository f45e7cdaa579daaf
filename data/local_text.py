"""Turn text files into shards of bytes for --scale tiny: python data/local_text.py [PATH ...]

Writes local_train_*.bin and local_val_*.bin to data/local_text. A PATH is a text file or a folder of them; with no PATH
it takes the standard library of the running Python. data/README.md describes the tokens and the split.
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

from data.shards import write_shard

LOCAL_TEXT_FOLDER = Path(__file__).resolve().parent / "local_text"
EOT_ID = 256  # end of text
SHARD_TOKENS = 100_000_000
# Installed packages, and the tests that some distributions ship, are not the standard library's own text.
EXCLUDED_FOLDERS = set("site-packages dist-packages test tests idlelib lib2to3 turtledemo __pycache__".split())


def standard_library() -> list[Path]:
    """Return the Python files of the running Python's standard library, without its tests."""
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders) - EXCLUDED_FOLDERS  # os.walk enters the remaining ones
        files += [path for name in names if name.endswith(".py") and (path := Path(folder, name)).is_file()]
    return files


def text_files(path: Path) -> list[Path]:
    """Return the file, or the files below the folder except hidden ones. Raises ValueError if there are none."""
    if path.is_file():
        return [path]
    files = [file for file in path.rglob("*") if file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise ValueError(f"{path}: no such file, or a folder without files; name text files or folders of them")
    return files


def read_documents(files: list[Path]) -> list[np.ndarray]:
    """Return each file as tokens, (1 + bytes,) uint16, sorted by a hash of its name. Skips empty and binary files."""
    files = sorted(set(files), key=lambda path: (hashlib.sha256(os.fsencode(path.name)).digest(), path))
    texts = (text for path in files if (text := path.read_bytes()) and b"\0" not in text)
    return [np.concatenate([[EOT_ID], np.frombuffer(text, np.uint8)]).astype(np.uint16) for text in texts]


def split(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return training and validation tokens (the last tenth). A document cut in two becomes two documents."""
    tokens = np.concatenate(documents)
    train, val = np.split(tokens, [int(len(tokens) * 0.9)])
    return train, val if val[0] == EOT_ID else np.insert(val, 0, EOT_ID)


def byte_frequency_loss(train: np.ndarray, val: np.ndarray) -> float:
    """Return the loss (nats per token) on `val` of a model that knows only how often each token occurs in `train`."""
    counts = np.bincount(train, minlength=EOT_ID + 1) + 1  # add one to each, so that no token is impossible
    return float(-np.log(counts / counts.sum())[val].mean())


def write_shards(tokens_by_name: dict[str, np.ndarray], output: Path) -> None:
    """Write each name's tokens as shards `<name>_<number>.bin`. Replace the old ones only when all are complete."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as unfinished:
        for name, tokens in tokens_by_name.items():
            for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
                write_shard(f"{unfinished}/{name}_{number:06d}.bin", tokens[start : start + SHARD_TOKENS])
        new = {path.replace(output / path.name) for path in Path(unfinished).iterdir()}
    for old in set(output.glob("local_*.bin")) - new:
        old.unlink(missing_ok=True)


def make_shards(paths: list[Path], output: Path) -> str:
    """Turn the texts into shards in a folder; return a description. Raises ValueError if there is too little text."""
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


def main(arguments: list[str]) -> None:
    """Run the command; exit with status 2 and one line if it fails."""
    if any(argument.startswith("-") for argument in arguments):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(arguments) else 2)
    try:
        print(make_shards(list(map(Path, arguments)), LOCAL_TEXT_FOLDER))
    except (ValueError, OSError) as error:
        print(f"local_text.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
