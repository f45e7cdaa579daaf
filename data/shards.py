"""Shards of tokens: the file format, the order in which a stream reads them, reading ahead, and checks before a run.

A shard is 256 little-endian int32 (magic number, version, number of tokens, zeros) and then its tokens as uint16.
A stream is the shards that match a glob pattern, in sorted order, read once without shuffling.
"""

import fnmatch
import glob
import io
import itertools
import os
import queue
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from logs.log_file import plural

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
WHOLLY_CHECKED_TOKENS = 2**23  # in shards up to this size every token id is checked
SAMPLE_PIECES, SAMPLE_PIECE_TOKENS = 64, 2**14  # in larger ones this many pieces, spread evenly
LOCAL_TEXT_FOLDER = Path(__file__).resolve().parent / "local_text"
FINEWEB_FOLDER = Path(__file__).resolve().parent / "fineweb10B"
FINEWEB_SHARDS, FINEWEB_SHARD_TOKENS = 103, 100_000_000  # for training
T = TypeVar("T")


class MissingShardsError(ValueError):
    """Shards are missing or damaged. `command`: the arguments of the Python command that mends it, () if none does."""

    def __init__(self, complaint: str, path: str = "", command: tuple[str, ...] = ()):
        super().__init__(complaint + (f"; to get them: python {' '.join(command)}" if command else ""))
        self.path, self.command = path, command


@dataclass(frozen=True)
class Shard:
    """A shard's file, kept open so that data replaced during a run does not change the run."""

    path: str
    num_tokens: int
    file: io.FileIO

    def read(self, position: int, count: int) -> np.ndarray:
        """The `count` tokens from a position on, (count,) uint16. Raises MissingShardsError if they cannot be read."""
        try:
            # A memory map would end the process without a word where the disk has lost a page.
            content = os.pread(self.file.fileno(), 2 * count, HEADER_BYTES + 2 * position)
        except OSError as error:
            raise MissingShardsError(f"{self.path}: {error.strerror}; make or fetch it again", self.path) from None
        if len(content) < 2 * count:
            raise MissingShardsError(f"{self.path}: ends before token {position + count:,}, though it was whole at the "
                                     f"start; make or fetch it again", self.path)
        return np.frombuffer(content, "<u2")


def open_shard(path: str) -> Shard:
    """Raises MissingShardsError if the file cannot be read or has a wrong magic number, version or length."""
    fix = "it is no shard, or damaged: make or fetch it again"
    try:
        file = open(path, "rb", buffering=0)
        magic, version, num_tokens = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    except OSError as error:
        raise MissingShardsError(f"{path}: {error.strerror}; {fix}", path) from None
    size = os.fstat(file.fileno()).st_size
    found = (size - HEADER_BYTES) / 2  # tokens
    if size < HEADER_BYTES:
        damage = f"{size} bytes are too short for the header of {HEADER_BYTES}"
    elif magic != SHARD_MAGIC:
        damage = f"magic number {magic} instead of {SHARD_MAGIC}"
    elif version != SHARD_VERSION:
        damage = f"version {version} instead of {SHARD_VERSION}"
    elif num_tokens < 1 or found != num_tokens:
        damage = f"wrong length, the header says {num_tokens:,} tokens and the file holds {found:,.15g}"
    else:
        return Shard(path, num_tokens, file)
    raise MissingShardsError(f"{path}: {damage}; {fix}", path)


def open_shards(pattern: str) -> list[Shard]:
    """The shards that match a glob pattern, sorted. Raises MissingShardsError if no file matches or one is damaged."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise MissingShardsError(f"no file matches {pattern}; make or fetch the data first (README, section Run, test)")
    return [open_shard(path) for path in paths]


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write tokens, (n,) integers below 65,536, as a shard."""
    with open(path, "wb") as file:
        file.write(struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(tokens)).ljust(HEADER_BYTES, b"\0"))
        file.write(np.ascontiguousarray(tokens, "<u2"))


def batch_positions(shard_tokens: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """(shard, position in it) of each batch of a stream, in order, from the shards' numbers of tokens.

    A batch needs two tokens more than its own: the last target and one that is left over. A shard's rest is dropped.
    """
    for shard, num_tokens in enumerate(shard_tokens):
        for position in range(0, num_tokens - batch_tokens - 1, batch_tokens):
            yield shard, position


def num_batches(shard_tokens: Sequence[int], batch_tokens: int) -> int:
    """How many batches a stream holds: the length of `batch_positions`."""
    return sum(len(range(0, num_tokens - batch_tokens - 1, batch_tokens)) for num_tokens in shard_tokens)


def read_ahead(items: Iterator[T], depth: int = 64) -> Iterator[T]:
    """The same items, taken by a thread from now on, up to `depth` ahead. An exception of `items` is raised here."""
    ready: queue.Queue[tuple[T, None] | tuple[None, Exception] | None] = queue.Queue(depth)

    def fill() -> None:
        try:
            for item in items:
                ready.put((item, None))
            ready.put(None)
        except Exception as error:
            ready.put((None, error))

    def take() -> Iterator[T]:
        for item, error in iter(ready.get, None):
            if error is not None:
                raise error
            yield item

    threading.Thread(target=fill, daemon=True).start()
    return take()


def check_stream(pattern: str, vocab_size: int, batch_tokens: int, needed: int, purpose: str,
                 fineweb_shards: int | None) -> None:
    """Check that a stream holds `needed` batches of token ids below `vocab_size`; `purpose` says what needs them.

    Raises MissingShardsError if shards are missing or damaged, with the command that fetches at least the first
    `fineweb_shards` of FineWeb's training shards where they are FineWeb's. Raises ValueError for anything else.
    """
    try:
        shards = open_shards(pattern)
        for shard in shards:
            if (largest := largest_token_id(shard)) >= vocab_size:
                fix = "use data of that vocabulary, or set vocab_size"
                raise ValueError(f"{shard.path}: holds token id {largest}, but vocab_size is {vocab_size}; {fix}")
        check_length(pattern, shards, batch_tokens, needed, purpose, fineweb_shards)
        check_no_gap(pattern, shards, batch_tokens, needed)
    except MissingShardsError as error:
        raise MissingShardsError(str(error), command=mending_command(pattern, error.path, fineweb_shards)) from None


def largest_token_id(shard: Shard) -> int:
    """The largest id of all tokens of a small shard, or of a sample of a large one."""
    if shard.num_tokens <= WHOLLY_CHECKED_TOKENS:
        return int(shard.read(0, shard.num_tokens).max())
    starts = np.linspace(0, shard.num_tokens - SAMPLE_PIECE_TOKENS, SAMPLE_PIECES).astype(int)
    return max(int(shard.read(int(start), SAMPLE_PIECE_TOKENS).max()) for start in starts)


def check_length(pattern: str, shards: list[Shard], batch_tokens: int, needed: int, purpose: str,
                 fineweb_shards: int | None) -> None:
    """Raises ValueError if the shards hold too few batches, as MissingShardsError if there are more to fetch."""
    lengths = [shard.num_tokens for shard in shards]
    if (found := num_batches(lengths, batch_tokens)) >= needed:
        return
    whole = {os.path.basename(shard.path) for shard in shards if shard.num_tokens == FINEWEB_SHARD_TOKENS}
    error = MissingShardsError if lacking(pattern, fineweb_shards or 0, whole) else ValueError
    raise error(f"too few tokens: {purpose} needs {needed * batch_tokens:,} ({needed:,} x {batch_tokens:,}) and the "
                f"start of one more, {pattern} has {sum(lengths):,} in {plural(len(shards), 'shard')}, "
                f"good for {found:,}; add shards or ask for less")


def check_no_gap(pattern: str, shards: list[Shard], batch_tokens: int, needed: int) -> None:
    """Raises MissingShardsError if one of FineWeb's training shards is missing before the last that a run reads."""
    positions = batch_positions([shard.num_tokens for shard in shards], batch_tokens)
    last, _ = next(itertools.islice(positions, needed - 1, None))
    read = {os.path.basename(shard.path) for shard in shards[: last + 1]}
    for name in lacking(pattern, max(map(shard_number, read)), read):
        complaint = "is missing though later shards are there, so the run would see other tokens"
        raise MissingShardsError(f"{pattern}: {name} {complaint}; fetch it, or name the shards in the pattern", name)


def lacking(pattern: str, count: int, there: set[str]) -> list[str]:
    """Of FineWeb's first `count` training shards, the names that match a pattern and are not among `there`."""
    names = (f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1))
    return [name for name in names if name not in there and fnmatch.fnmatchcase(name, os.path.basename(pattern))]


def shard_number(path: str) -> int:
    """The number of one of FineWeb's training shards, by its name; 0 for other files."""
    found = re.fullmatch(r"fineweb_train_(\d{6})\.bin", os.path.basename(path))
    return int(found[1]) if found else 0


def is_fineweb(pattern: str) -> bool:
    """Whether the files of a pattern are those that data/cached_fineweb10B.py fetches."""
    return os.path.realpath(os.path.dirname(pattern)) == os.path.realpath(FINEWEB_FOLDER)


def fineweb_shards_needed(num_iterations: int, step_tokens: int) -> int | None:
    """How many of FineWeb's training shards hold the steps, by the stream's rule; None if all hold too few."""
    steps_per_shard = num_batches([FINEWEB_SHARD_TOKENS], step_tokens)
    return -(-num_iterations // steps_per_shard) if num_iterations <= FINEWEB_SHARDS * steps_per_shard else None


def mending_command(pattern: str, path: str, fineweb_shards: int | None) -> tuple[str, ...]:
    """The arguments of the command that brings a pattern's shards, also the one at `path`; () if there is none."""
    if is_fineweb(pattern) and fineweb_shards is not None:
        return "data/cached_fineweb10B.py", str(max(fineweb_shards, shard_number(path)))
    is_local_text = os.path.realpath(os.path.dirname(pattern)) == os.path.realpath(LOCAL_TEXT_FOLDER)
    is_empty = not any(LOCAL_TEXT_FOLDER.glob("local_*.bin"))  # the user's own text must not be replaced
    return ("data/local_text.py",) if is_local_text and is_empty else ()
