"""Token shards: the file format, and the order in which a stream reads them. data/README.md describes both."""

import glob
import hashlib
import io
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


class MissingShardsError(ValueError):
    """Shards are missing or damaged."""

    def __init__(self, message: str, path: str = "", command: Sequence[str] = ()):
        super().__init__(message + (f": python {' '.join(command)}" if command else ""))
        self.path = path  # of the file at fault, "" if there is none
        self.command = list(command)  # arguments of the Python command that gets the data, [] if none does


@dataclass(frozen=True)
class Shard:
    """An open shard. The file stays open so that replacing it during a run does not change the run."""

    path: str
    num_tokens: int
    file: io.FileIO

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def read(self, position: int, count: int) -> np.ndarray:
        """Return the tokens from `position` on, (count,) uint16. Raises MissingShardsError if they cannot be read."""
        try:
            # pread reports a lost disk page as an error; a memory map would kill the process.
            content = os.pread(self.file.fileno(), 2 * count, HEADER_BYTES + 2 * position)
            if len(content) < 2 * count:
                raise OSError(0, f"ends before token {position + count:,}, though it was whole when opened")
        except OSError as error:
            raise MissingShardsError(f"{self.path}: {error.strerror}; make or fetch it again", self.path) from None
        return np.frombuffer(content, "<u2")


def open_shard(path: str) -> Shard:
    """Open a shard. Raises MissingShardsError if it is unreadable or its magic number, version or length is wrong."""
    try:
        file = open(path, "rb", buffering=0)
        magic, version, num_tokens = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        size = os.fstat(file.fileno()).st_size
        found = (size - HEADER_BYTES) / 2  # tokens
        for is_wrong, fault in (
            (size < HEADER_BYTES, f"{size} bytes are too short for the header of {HEADER_BYTES}"),
            (magic != SHARD_MAGIC, f"magic number {magic} instead of {SHARD_MAGIC}"),
            (version != SHARD_VERSION, f"version {version} instead of {SHARD_VERSION}"),
            (not 0 < num_tokens == found, f"wrong length, {num_tokens:,} tokens by its header but {found:,.15g} in it"),
        ):
            if is_wrong:
                raise OSError(0, fault)
    except OSError as error:
        raise MissingShardsError(f"{path}: {error.strerror}; not a valid shard: make or fetch it again", path) from None
    return Shard(path, num_tokens, file)


def open_shards(pattern: str) -> list[Shard]:
    """Open the shards that match a glob pattern, sorted. Raises MissingShardsError if none match or one is damaged."""
    if not (paths := sorted(glob.glob(pattern))):
        raise MissingShardsError(f"no file matches {pattern}; make or fetch the data (see data/README.md)")
    return [open_shard(path) for path in paths]


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write tokens, (n,) integers below 65,536, as a shard."""
    with open(path, "wb") as file:
        file.write(struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(tokens)).ljust(HEADER_BYTES, b"\0"))
        file.write(np.ascontiguousarray(tokens, "<u2"))


def batch_positions(shard_tokens: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (shard index, position) of each batch: two tokens more must follow; a shard's rest is dropped."""
    for shard, num_tokens in enumerate(shard_tokens):
        for position in range(0, num_tokens - batch_tokens - 1, batch_tokens):
            yield shard, position


def num_batches(shard_tokens: Sequence[int], batch_tokens: int) -> int:
    """Return how many batches a stream holds."""
    return sum(1 for _ in batch_positions(shard_tokens, batch_tokens))


def locate_batches(shards: list[Shard], batch_tokens: int, start: int, stop: int) -> Iterator[tuple[Shard, int]]:
    """Yield (shard, position) of batches `start` to `stop` - 1 of the stream."""
    positions = itertools.islice(batch_positions([shard.num_tokens for shard in shards], batch_tokens), start, stop)
    return ((shards[i], position) for i, position in positions)


def fingerprint(shards: list[Shard], batch_tokens: int, count: int) -> list[list[str | int]]:
    """Return [name, number of tokens, hash] of each shard that the first `count` batches read, as JSON values.

    The hash is the first 16 hex digits of the SHA-256 of the header and first tokens, together at most 64 KiB.
    """
    used = dict.fromkeys(shard for shard, _ in locate_batches(shards, batch_tokens, 0, count))
    header = HEADER_BYTES // 2  # in tokens; reading from -header on includes it
    starts = [shard.read(-header, min(2**15, header + shard.num_tokens)) for shard in used]
    return [[shard.name, shard.num_tokens, hashlib.sha256(x).hexdigest()[:16]] for shard, x in zip(used, starts)]
