"""Token shards: the file format, and the order in which a stream reads them. data/README.md describes both."""

import errno
import glob
import hashlib
import io
import itertools
import math
import os
import shlex
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


class MissingShardsError(ValueError):
    """Shards are missing, or `path` is damaged. `command` holds the arguments of a Python command that gets them."""

    def __init__(self, message: str, path: str = "", command: Iterable[str] = ()):
        super().__init__(message + (f": {shlex.join([sys.executable, *command])}" if command else ""))
        self.path, self.command = path, list(command)


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError into a ValueError. A file that cannot be read is not damaged: never remove or fetch it again."""
    try:
        yield
    except OSError as error:
        fix = "raise ulimit -n" if error.errno == errno.EMFILE else "check its path, permissions and disk"
        raise ValueError(f"{path}: cannot be read: {error.strerror}; {fix}") from None


@dataclass(frozen=True)
class Shard:
    """An open shard. The file stays open so that replacing it during a run does not change the run."""

    path: Path
    num_tokens: int
    vocab_size: int
    file: io.FileIO

    def read(self, position: int, count: int) -> np.ndarray:
        """Return the tokens from `position` on, (count,) uint16. Raises ValueError for too large or lost ones."""
        with reading(self.path):
            # pread reports a lost disk page as an error; a memory map would kill the process.
            content = os.pread(self.file.fileno(), 2 * count, HEADER_BYTES + 2 * position)
            if len(content) < 2 * count:
                raise OSError(0, f"ends before token {position + count:,}, though it was whole when opened")
        tokens = np.frombuffer(content, "<u2")
        if (largest := tokens.max(initial=0)) >= self.vocab_size:
            raise ValueError(f"{self.path}: token {position + tokens.argmax():,} has id {largest}, but vocab_size is "
                             f"{self.vocab_size}; use data with this vocabulary, or set vocab_size")
        return tokens


def open_shard(path: Path, vocab_size: int) -> Shard:
    """Open a shard. Raises MissingShardsError if its magic number, version or length is wrong."""
    with reading(path):
        file = open(path, "rb", buffering=0)
        magic, version, num_tokens = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        size = os.fstat(file.fileno()).st_size
    for what, found, expected in (("magic number", magic, SHARD_MAGIC), ("version", version, SHARD_VERSION),
                                  ("length", num_tokens, (size - HEADER_BYTES) / 2)):
        if found != expected:
            raise MissingShardsError(f"{path}: wrong {what}, {found} in its header instead of {expected:.15g}; not a "
                                     "valid shard: make or fetch it again", str(path))
    return Shard(path, num_tokens, vocab_size, file)


def open_shards(pattern: str, vocab_size: int = 2**16, batch_tokens: int = 1, count: float = math.inf) -> list[Shard]:
    """Open the shards that match a glob pattern, in sorted order, as far as the first `count` batches need them.

    Raises MissingShardsError if there are none or one is damaged, ValueError if one cannot be read.
    """
    folder, name = os.path.split(pattern)
    literal = glob.escape(folder) if os.path.isdir(folder) else folder  # an existing folder's brackets mean themselves
    paths = glob.glob(os.path.join(literal, name)) or glob.glob(os.path.join(literal, name.replace("[", "[[]")))
    if not paths:
        with reading(folder), suppress(FileNotFoundError, NotADirectoryError):
            os.listdir(folder or ".")
        raise MissingShardsError(f"no file matches {pattern}; make or fetch the data (see data/README.md)")
    shards: list[Shard] = []
    for path in sorted(paths):
        if num_batches([shard.num_tokens for shard in shards], batch_tokens) >= count:
            break
        shards.append(open_shard(Path(path), vocab_size))
    return shards


def write_shard(path: str | os.PathLike, tokens: np.ndarray | Iterable[np.ndarray]) -> None:
    """Write tokens, (n,) integers below 65,536, or several such arrays, as a shard."""
    parts = [tokens] if isinstance(tokens, np.ndarray) else tokens
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        size = sum(file.write(np.ascontiguousarray(part, "<u2")) for part in parts)
        file.seek(0)
        file.write(struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, size // 2))


def write_synthetic_shard(path: str | os.PathLike, num_tokens: int, vocab_size: int, eot_id: int) -> None:
    """Write random documents of 735 tokens on average. Token id i has a frequency of about 1 / (i + 1)."""
    random = np.random.default_rng(0)
    tokens = (vocab_size ** random.random(num_tokens) - 1).astype(np.uint16)
    tokens[tokens == eot_id] = (eot_id + 1) % vocab_size
    starts = random.lognormal(6, 1.1, num_tokens // 100).astype(int).cumsum()
    tokens[[0, *starts[starts < num_tokens]]] = eot_id
    write_shard(path, tokens)


def num_batches(shard_tokens: Iterable[int], batch_tokens: int) -> int:
    """Return how many batches a stream holds: two tokens more must follow each; a shard's rest is dropped."""
    return sum(max(0, num_tokens - 2) // batch_tokens for num_tokens in shard_tokens)


def locate_batches(shards: list[Shard], batch_tokens: int, start: int, stop: int) -> Iterator[tuple[Shard, int]]:
    """Yield (shard, position) of batches `start` to `stop` - 1 of the stream."""
    batches = ((shard, number * batch_tokens) for shard in shards
               for number in range(num_batches([shard.num_tokens], batch_tokens)))
    return itertools.islice(batches, start, stop)


def count_documents(shards: list[Shard], batch_tokens: int, count: int, end_of_text: int) -> int:
    """Count the documents that start in the first `count` batches. Raises ValueError as `read` does."""
    batches = locate_batches(shards, batch_tokens, 0, count)
    return sum(int((shard.read(position, batch_tokens) == end_of_text).sum()) for shard, position in batches)


def fingerprint(shards: list[Shard], batch_tokens: int, count: int) -> list[list[str | int]]:
    """Return [name, number of tokens, hash] of each shard that the first `count` batches read, as JSON values.

    The hash is the first 16 hex digits of the SHA-256 of the header and first tokens, together at most 64 KiB.
    """
    used = dict.fromkeys(shard for shard, _ in locate_batches(shards, batch_tokens, 0, count))
    starts = [os.pread(shard.file.fileno(), 2**16, 0) for shard in used]
    return [[shard.path.name, shard.num_tokens, hashlib.sha256(x).hexdigest()[:16]] for shard, x in zip(used, starts)]
