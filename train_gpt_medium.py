"""Train the modded-nanogpt GPT-2-Medium speedrun's model under any map of value embeddings.

    torchrun --standalone --nproc_per_node=8 train_gpt_medium.py configs/baseline.toml [--KEY VALUE ...]
    python train_gpt_medium.py configs/baseline.toml --check

What is unusual about the model, and who had the idea, as credited by the speedrun's record list
(https://github.com/KellerJordan/modded-nanogpt#world-record-history):
- value embeddings: a table of V x d numbers whose row for a token is added to the attention values of the
  layers that share the table (@KoszarskyB, after Zhou et al. 2024, https://arxiv.org/abs/2410.17897)
- skip connections between layers, and from the embedding to every layer, with learned weights
  (@brendanh0gan, @KoszarskyB)
- FlexAttention within documents, under a sliding window that grows with training; most layers see half of it
  (@KoszarskyB, @fernbear.bsky.social)
- query-key norm, ReLU squared (https://arxiv.org/abs/2109.08668), zero-initialised projections, half of the
  rotary frequencies zero (@Grad62304977, @YouJiacheng)
- logits capped softly, after Gemma 2 (https://arxiv.org/abs/2408.00118)
- Muon for the matrices (Keller Jordan, https://kellerjordan.github.io/posts/muon/)
"""

import argparse
import difflib
import faulthandler
import fcntl
import fnmatch
import glob
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without it
    triton, tl = None, SimpleNamespace(constexpr=None)

# -----------------------------------------------------------------------------
# Architecture: what no config changes

NUM_LAYERS = 16
HEAD_DIM = 128
SKIPS = {9: 6, 10: 4, 11: 2}  # layer -> the earlier layer whose output it adds
LONG_WINDOW_LAYERS = {0, 4, 11, 15}  # every other layer sees half of the window
NO_ATTENTION_LAYER = 7
BLOCK_SIZE = 128  # tokens in a block of the attention mask
ATTENTION_SCALE = 0.12
LOGIT_CAP = 15.0

# -----------------------------------------------------------------------------
# Configuration


def key(default: Any, meaning: str, **limits: int | float) -> Any:
    """A config key: its default, what it means, and its limits (`at_least`, `at_most`, `multiple_of`)."""
    metadata = {"meaning": meaning, "limits": limits}
    if isinstance(default, list):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Hyperparameters:
    """The keys of a config file. The defaults are the published baseline."""

    description: str = key("", "what the experiment asks")
    value_embeddings: list[list[int]] = key([[0, 13], [1, 14], [2, 15]], "tables, each the list of layers that share it")
    # data
    train_files: str = key("data/fineweb10B/fineweb_train_*.bin", "training shards, read in sorted order")
    val_files: str = key("data/fineweb10B/fineweb_val_*.bin", "validation shards, read in sorted order")
    val_tokens: int = key(10_485_760, "tokens of one validation", at_least=1)
    train_seq_len: int = key(64 * 1024, "tokens in a training sequence", at_least=1, multiple_of=BLOCK_SIZE)
    val_seq_len: int = key(4 * 64 * 1024, "tokens in a validation sequence", at_least=1, multiple_of=BLOCK_SIZE)
    sequences_per_step: int = key(8, "training sequences in a step, over all ranks", at_least=1)
    # optimization
    num_iterations: int = key(5960, "training steps", at_least=1)
    cooldown_frac: float = key(0.7, "fraction of the steps in which the learning rates fall to 0", at_least=0, at_most=1)
    # architecture; shards hold uint16, so 65,536 ids are all there can be
    vocab_size: int = key(50257, "token ids; the last one is the end-of-text token", at_least=2, at_most=2**16)
    num_heads: int = key(8, "attention heads", at_least=1, at_most=256)
    model_dim: int = key(1024, "width, 128 * num_heads", at_least=1)
    # evaluation, compilation and bookkeeping
    val_loss_every: int = key(125, "steps between validations; 0: only at the end", at_least=0)
    warmup_steps: int = key(10, "untimed steps that compile and warm every kernel, then are undone", at_least=0)
    coordinate_descent_tuning: bool = key(True, "let the compiler search longer for faster kernels (CUDA only)")
    fast_paths: list[str] = key([], "parts that take another way to the same function, of tables, mlp, head, blocks (CUDA only; not measured yet)")
    seed: int | None = key(None, "seed of the initial weights; default: run_id", at_least=0, at_most=2**63 - 1)
    run_id: int | None = key(None, "number of the run; default: the first free one", at_least=0, at_most=999)
    init_from: str = key("", "checkpoint to take the initial weights from")
    log_dir: str = key("logs", "logs go to LOG_DIR/<config's name>/<run_id>.txt")
    save_checkpoint: bool = key(False, "write the final weights beside the log, as <run_id>.ckpt")
    checkpoint_every: int = key(0, "steps between checkpoints, from which an interrupted run goes on; 0: none", at_least=0)
    step_timeout: int = key(600, "seconds without progress after which a rank counts as hung and the run is ended", at_least=1)


KEYS = {f.name: f for f in fields(Hyperparameters)}
TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    int | None: "an integer",
    list[list[int]]: "a list of tables, each a list of layers, as in [[0, 13], [1, 14], [2, 15]]",
    list[str]: 'a list of names, as in ["mlp", "head"]',
}
FAST_PATHS = ("tables", "mlp", "head", "blocks")  # what they are: see their section


@contextmanager
def blame(source: str) -> Iterator[None]:
    """Put the file and key, or the option, that an error came from in front of its message, as a ValueError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: {error}") from None


def check_type(value: Any, kind: Any) -> Any:
    """`value` as the type of a config key; ValueError where it is of another type."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (is_integer or isinstance(value, float)):
        return float(value)
    fits = {
        int: is_integer,
        int | None: is_integer,
        bool: isinstance(value, bool),
        str: isinstance(value, str),
        list[list[int]]: isinstance(value, list),
        list[str]: isinstance(value, list) and all(isinstance(item, str) for item in value),
    }
    if not fits.get(kind, False):
        raise ValueError(f"expected {TYPE_NAMES[kind]}, found {json.dumps(value, default=str)}")
    return value


def check_limits(value: int | float, at_least: float | None = None, at_most: float | None = None, multiple_of: int | None = None) -> None:
    """ValueError where a number is outside its range (NaN is outside every range)."""
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{value} is too small; use at least {at_least}")
    if at_most is not None and not value <= at_most:
        raise ValueError(f"{value} is too large; use at most {at_most}")
    if multiple_of is not None and value % multiple_of:
        below = value // multiple_of * multiple_of
        nearest = f"{below} or {below + multiple_of}" if below else f"{multiple_of}"
        raise ValueError(f"{value} is not a multiple of {multiple_of}; use {nearest}")


def check_value_embeddings(tables: list) -> None:
    """ValueError where a map of value embeddings names what is not there: see the messages."""
    table_of: dict[int, int] = {}
    for k, table in enumerate(tables):
        if not isinstance(table, list):
            shown = json.dumps(table, default=str)
            raise ValueError(f"table {k} is {shown}, not a list of layers; write [{shown}]")
        if not table:
            raise ValueError(f"table {k} is empty; name the layers that use it, or remove it")
        for layer in table:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"table {k}: layer {json.dumps(layer, default=str)} is not an integer; layers are 0 to {NUM_LAYERS - 1}")
            if not 0 <= layer < NUM_LAYERS:
                raise ValueError(f"table {k}: there is no layer {layer}; layers are 0 to {NUM_LAYERS - 1}")
            if layer == NO_ATTENTION_LAYER:
                raise ValueError(f"table {k}: layer {layer} has no attention, so it cannot use a value embedding; remove it")
            if layer in table_of:
                both = f"table {table_of[layer]} and table {k}"
                raise ValueError(f"layer {layer} is named twice, in {both}; remove one, a layer uses one table")
            table_of[layer] = k


def check_fast_paths(names: list[str]) -> None:
    """ValueError where a name is none of FAST_PATHS, or named twice."""
    for name in names:
        if name not in FAST_PATHS:
            raise ValueError(f"there is no fast path {json.dumps(name)}; there are {', '.join(FAST_PATHS)}")
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice; remove one")


def check_value(name: str, value: Any) -> Any:
    """The value of one config key, checked on its own; ValueError says what is wrong with it."""
    value = check_type(value, KEYS[name].type)
    if name in ("train_files", "val_files", "log_dir") and not value:
        raise ValueError("is empty; name a path, or leave the key out for its default")
    if name in ("train_files", "val_files", "log_dir", "init_from"):
        return os.path.expanduser(value)
    if name == "value_embeddings":
        check_value_embeddings(value)
    elif name == "fast_paths":
        check_fast_paths(value)
    elif isinstance(value, (int, float)):
        check_limits(value, **KEYS[name].metadata["limits"])
    return value


def nearest_key(name: str) -> str:
    """The config key that is spelled most like `name`."""
    return difflib.get_close_matches(name, KEYS, n=1, cutoff=0.0)[0]


def read_config(path: Path) -> dict[str, Any]:
    """The checked keys of a flat TOML file; ValueError names the file, the key and the fix."""
    if not path.is_file():
        known = [p.stem for p in (Path(__file__).parent / "configs").glob("*.toml")]
        similar = difflib.get_close_matches(path.stem, known, n=1)
        hint = f"; did you mean configs/{similar[0]}.toml?" if similar else "; name a TOML file, such as configs/baseline.toml"
        raise ValueError(f"{path}: no such config file{hint}")
    with blame(str(path)):
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"TOML syntax error: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    for name, value in values.items():
        with blame(f"{path}: {name}"):
            if name not in KEYS:
                raise ValueError(f"unknown key; the nearest known one is {nearest_key(name)}")
            values[name] = check_value(name, value)
    return values


def read_override(name: str, text: str) -> Any:
    """The checked value of `--NAME TEXT`: TEXT as it would stand in TOML, strings also without quotes."""
    with blame(f"--{name}"):
        if KEYS[name].type is str:
            return check_value(name, text)
        try:
            parsed = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            parsed = {}
        if list(parsed) != ["value"]:
            raise ValueError(f"expected {TYPE_NAMES[KEYS[name].type]}, found {json.dumps(text)}")
        return check_value(name, parsed["value"])


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ValueErrors, so that they too are reported in one line."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; {' '.join(self.format_usage().split())}, --help says more")


def parse_command_line(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str], bool]:
    """The configs' paths, the overrides as text, and whether only to check. ValueError: an unknown option, no config, or several to run."""
    parser = CommandLine(prog="train_gpt_medium.py", usage="%(prog)s CONFIG.toml [--KEY VALUE ...] [--check]",
                         description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("configs", metavar="CONFIG.toml", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="check the config and everything it names, print the map, and stop")
    for name, f in KEYS.items():
        default = f.default_factory() if f.default is MISSING else f.default
        shown = "" if default in ("", None) else f" (default: {json.dumps(default)})"
        parser.add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=f.metadata["meaning"] + shown)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        option = unknown[0].partition("=")[0]
        raise ValueError(f"{option}: unknown key; the nearest known one is --{nearest_key(option.lstrip('-'))}")
    overrides = {name: text for name, text in vars(given).items() if name in KEYS}
    if len(given.configs) > 1 and not given.check:
        raise ValueError(f"unexpected argument {given.configs[1]}; a key is set with --KEY VALUE, and there is one config a run (a queue: run.sh)")
    return given.configs, overrides, given.check


def load_hyperparameters(path: Path, overrides: dict[str, str]) -> Hyperparameters:
    """Defaults, then the config file, then the command line. ValueError: see `read_config`, `read_override`."""
    return Hyperparameters(**read_config(path) | {name: read_override(name, text) for name, text in overrides.items()})


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def draw_map(tables: list[list[int]]) -> str:
    """The layers from first to last, a column for each table: o where a layer uses it, | between its uses."""
    lines = [f"value embeddings: {counted(len(tables), 'table')}"]
    for layer in range(NUM_LAYERS):
        cells = ["o" if layer in table else "|" if min(table) < layer < max(table) else " " for table in tables]
        used = next((f"table {k}" for k, table in enumerate(tables) if layer in table), "")
        note = "no attention" if layer == NO_ATTENTION_LAYER else used
        lines.append(f"  layer {layer:2d}  {' '.join(cells)}  {note}".rstrip())
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Data
#
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then its tokens as uint16.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 256 * 4
WHOLLY_CHECKED_TOKENS = 2**23  # shards up to this size have every token id checked
SAMPLE_PIECES, SAMPLE_PIECE_TOKENS = 64, 2**14  # larger ones this many pieces, spread evenly
FINEWEB_FOLDER = Path(__file__).resolve().parent / "data" / "fineweb10B"
FINEWEB_SHARDS, FINEWEB_SHARD_TOKENS = 103, 100_000_000  # for training
READ_AHEAD_BYTES = 2**28  # at most so much is read at once: more than a FineWeb shard, which has 200 MB


class Wanting(ValueError):
    """Shards are missing or damaged: making or fetching them mends it."""


def open_shard(path: str) -> np.memmap:
    """The tokens of a shard, memory-mapped (n,) uint16. Wanting: wrong magic, version or length."""
    if not os.path.isfile(path):
        raise Wanting(f"{path}: not a regular file; let the pattern match shards only")
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=3)
    fix = "it is no shard, or damaged: make or fetch it again"
    if size < SHARD_HEADER_BYTES:
        raise Wanting(f"{path}: {size} bytes are too short for the header of {SHARD_HEADER_BYTES}; {fix}")
    magic, version, num_tokens = (int(x) for x in header)
    if magic != SHARD_MAGIC:
        raise Wanting(f"{path}: magic number {magic} instead of {SHARD_MAGIC}; {fix}")
    if version != SHARD_VERSION:
        raise Wanting(f"{path}: version {version} instead of {SHARD_VERSION}; {fix}")
    if num_tokens < 1 or size != SHARD_HEADER_BYTES + 2 * num_tokens:
        found = (size - SHARD_HEADER_BYTES) / 2
        raise Wanting(f"{path}: wrong length, the header says {num_tokens:,} tokens and the file holds {found:,.15g}; {fix}")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(num_tokens,))


def open_shards(pattern: str) -> list[np.memmap]:
    """All shards that match a glob pattern, in sorted order. Wanting: there is none, or a bad one."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise Wanting(f"no file matches {pattern}; make or fetch the data first (README, section Data)")
    return [open_shard(path) for path in paths]


def batch_positions(shard_tokens: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """(shard, position in it) of each batch of a stream, in order.

    A batch needs its own tokens and one more (the last target), and one is left over; where a shard has no
    room for another batch its rest is dropped. No shuffling, one epoch.
    """
    for shard, num_tokens in enumerate(shard_tokens):
        for position in range(0, num_tokens - batch_tokens - 1, batch_tokens):
            yield shard, position


def num_batches(shard_tokens: Sequence[int], batch_tokens: int) -> int:
    """How many batches a stream holds: the length of `batch_positions`."""
    return sum(len(range(0, num_tokens - batch_tokens - 1, batch_tokens)) for num_tokens in shard_tokens)


def to_inputs_and_targets(tokens: Tensor, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs (n, seq_len) int32 and targets (n, seq_len) int64 on the device, from n*seq_len + 1 int32 tokens."""
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens[:-1].view(-1, seq_len), tokens[1:].long().view(-1, seq_len)


def read_sequences(shard: np.memmap, position: int, count: int, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of `count` sequences that begin at a position of a shard."""
    tokens = shard[position : position + count * seq_len + 1].astype(np.int32)
    return to_inputs_and_targets(torch.from_numpy(tokens), seq_len, device)


class Piece(NamedTuple):
    """What is read ahead at once: consecutive batches of one shard."""

    shard: int
    positions: list[int]  # of the batches in the shard


def cut_into_pieces(batches: Iterable[tuple[int, int]], max_batches: int) -> Iterator[Piece]:
    """The batches of a stream, (shard, position) each, shard by shard, at most `max_batches` of them in a piece."""
    for shard, group in itertools.groupby(batches, key=lambda batch: batch[0]):
        positions = [position for _, position in group]
        for start in range(0, len(positions), max_batches):
            yield Piece(shard, positions[start : start + max_batches])


def read_tokens(file: io.BufferedReader, positions: Sequence[int], count: int) -> np.ndarray:
    """The `count` tokens from each position of an open shard: (positions, count) uint16. ValueError: the file ends before.

    Read, not mapped: a page that a mapping lacks would make the training thread wait, and one that the disk
    has lost would end the process without a word.
    """
    tokens = np.empty((len(positions), count), "<u2")
    for row, position in zip(tokens, positions):
        with blame(file.name):
            file.seek(SHARD_HEADER_BYTES + 2 * position)
            received = file.readinto(row)
        if received != row.nbytes:
            raise ValueError(f"{file.name}: ends before token {position + count:,}, though it was whole at the start; make or fetch it again")
    return tokens


def read_ahead(read: Callable[[Piece], np.ndarray], pieces: Iterator[Piece]) -> Iterator[np.ndarray]:
    """What `read` gives for each piece. The first is in memory when this returns, and each next one is read, by a thread,
    from the moment that the one before it is asked for."""
    reader = ThreadPoolExecutor(max_workers=1)

    def start_next() -> Future | None:
        piece = next(pieces, None)
        return None if piece is None else reader.submit(read, piece)

    def results(ahead: Future | None) -> Iterator[np.ndarray]:
        while ahead is not None:
            current = ahead.result()
            ahead = start_next()
            yield current

    if (first := start_next()) is not None:
        wait([first])
    return results(first)


def train_positions(shards: list[np.memmap], hp: Hyperparameters, first_step: int) -> Iterator[tuple[int, int]]:
    """(shard, position in it) of the training batch of each step from `first_step` on."""
    positions = batch_positions([len(shard) for shard in shards], hp.sequences_per_step * hp.train_seq_len)
    return itertools.islice(positions, first_step, hp.num_iterations)


def train_batches(hp: Hyperparameters, rank: int, world_size: int, device: torch.device, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's sequences of each training batch from `first_step` on, (sequences_per_step / world_size, train_seq_len).

    A rank reads its own sequences only, and a shard (of those above 256 MB a piece) while the one before it is used.
    """
    shards = open_shards(hp.train_files)
    files = [open(shard.filename, "rb") for shard in shards]  # once, so that data made anew during a run does not change it
    count = hp.sequences_per_step // world_size
    tokens = count * hp.train_seq_len + 1
    mine = ((shard, position + rank * count * hp.train_seq_len) for shard, position in train_positions(shards, hp, first_step))
    pieces = cut_into_pieces(mine, max(1, READ_AHEAD_BYTES // (2 * tokens)))
    arrays = read_ahead(lambda piece: read_tokens(files[piece.shard], piece.positions, tokens), pieces)
    return (to_inputs_and_targets(torch.from_numpy(row.astype(np.int32)), hp.train_seq_len, device) for array in arrays for row in array)


def batch_place(shards: list[np.memmap], hp: Hyperparameters, step: int) -> list[str | int]:
    """Where the batch of a step begins: the shard's name and the position in it; [] where it is the end of the run."""
    return next(([os.path.basename(shards[shard].filename), position] for shard, position in train_positions(shards, hp, step)), [])


def val_sequences(shards: list[np.memmap], hp: Hyperparameters, rank: int, world_size: int, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number, inputs, targets) of this rank's validation sequences, (val_seq_len,) each.

    The stream is cut sequence by sequence, so that every world size validates on the same sequences. (The
    reference cuts it by one sequence a rank; the two differ only where a shard ends within val_tokens.)
    """
    positions = itertools.islice(batch_positions([len(s) for s in shards], hp.val_seq_len), hp.val_tokens // hp.val_seq_len)
    for number, (shard, position) in enumerate(positions):
        if number % world_size == rank:
            inputs, targets = read_sequences(shards[shard], position, 1, hp.val_seq_len, device)
            yield number, inputs[0], targets[0]


def largest_token_id(shard: np.memmap) -> int:
    """The largest id of a shard: of all of a small one's, of a sample of a large one's.

    The sample is read from the file, not through the memory map, which would fetch far more around each piece.
    """
    if len(shard) <= WHOLLY_CHECKED_TOKENS:
        return int(shard.max())
    starts = np.linspace(0, len(shard) - SAMPLE_PIECE_TOKENS, SAMPLE_PIECES).astype(int)
    pieces = (np.fromfile(shard.filename, "<u2", SAMPLE_PIECE_TOKENS, offset=SHARD_HEADER_BYTES + 2 * start) for start in starts)
    return max(int(piece.max()) for piece in pieces)


def is_fineweb(pattern: str) -> bool:
    """Whether the files of a pattern are those that data/cached_fineweb10B.py fetches."""
    return os.path.realpath(os.path.dirname(pattern)) == os.path.realpath(FINEWEB_FOLDER)


def fineweb_shards_needed(num_iterations: int, step_tokens: int) -> int | None:
    """How many of FineWeb's training shards hold so many steps, by the rule of `batch_positions`. None: all of them do not."""
    steps_per_shard = num_batches([FINEWEB_SHARD_TOKENS], step_tokens)
    shards = -(-num_iterations // steps_per_shard) if steps_per_shard else FINEWEB_SHARDS + 1
    return shards if shards <= FINEWEB_SHARDS else None


@contextmanager
def suggest_fetching(pattern: str, shards: int | None) -> Iterator[None]:
    """Add the command that fetches so many of FineWeb's shards to an error about its files that this mends. `run.sh` reads it."""
    try:
        yield
    except Wanting as error:
        if shards is None or not is_fineweb(pattern):
            raise
        named = re.search(r"fineweb_train_(\d{6})\.bin", str(error))  # a damaged one beyond what is needed
        shards = max(shards, int(named[1])) if named else shards
        raise ValueError(f"{error}; to fetch FineWeb: python data/cached_fineweb10B.py {shards}") from None


def check_no_gap(pattern: str, paths: list[str]) -> None:
    """Wanting where one of FineWeb's training shards is missing although a later one is there: its tokens would be passed over."""
    names = {os.path.basename(path) for path in paths}
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"fineweb_train_(\d{6})\.bin", name))]
    for number in range(1, max(numbers, default=1)):
        name = f"fineweb_train_{number:06d}.bin"
        if name not in names and fnmatch.fnmatchcase(name, os.path.basename(pattern)):
            raise Wanting(f"{pattern}: {name} is missing though later shards are there, so the run would see other tokens; fetch it, or name the shards in the pattern")


def check_stream(pattern: str, vocab_size: int, batch_tokens: int, needed: int, purpose: str, more: type[ValueError] = Wanting) -> None:
    """ValueError where the shards are of another vocabulary, Wanting where they are missing or damaged, `more` where there are too few tokens."""
    shards = open_shards(pattern)
    for shard in shards:
        if (largest := largest_token_id(shard)) >= vocab_size:
            fix = "use data of that vocabulary, or set vocab_size"
            raise ValueError(f"{shard.filename}: holds token id {largest}, but vocab_size is {vocab_size}; {fix}")
    lengths = [len(shard) for shard in shards]
    found = num_batches(lengths, batch_tokens)
    if found < needed:
        raise more(
            f"too few tokens: {purpose} needs {needed * batch_tokens:,} ({needed:,} x {batch_tokens:,}) and the start of one more, "
            f"{pattern} has {sum(lengths):,} in {counted(len(shards), 'shard')}, good for {found:,}; add shards or ask for less"
        )
    last, _ = next(itertools.islice(batch_positions(lengths, batch_tokens), needed - 1, None))
    check_no_gap(pattern, [shard.filename for shard in shards[: last + 1]])


# -----------------------------------------------------------------------------
# Masks
#
# Attention is causal, within documents, and within a window of blocks of 128 tokens. Which key blocks a query
# block sees is worked out on blocks: a *full* block is seen by every token, a *partial* one is masked token by
# token. FlexAttention takes these lists as they are; the dense mask for CPUs is made from the same lists.

DENSE_QUERY_BLOCKS = 2  # query blocks in a piece of the dense mask


class BlockLists(NamedTuple):
    """The key blocks of each query block, nearest first; entries of a row beyond its count mean nothing."""

    partial_count: Tensor  # (blocks,) int32
    partial: Tensor  # (blocks, blocks) int32
    full_count: Tensor  # (blocks,) int32
    full: Tensor  # (blocks, blocks) int32


def document_ids(tokens: Tensor, end_of_text: int) -> Tensor:
    """(T,) number of the document that each token of (T,) belongs to; the end-of-text token starts a document."""
    return (tokens == end_of_text).cumsum(0)


def nearest_first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (blocks,) and lists (blocks, blocks) of the key blocks that are true in `chosen` (query, key)."""
    number = torch.arange(1, chosen.size(1) + 1, dtype=torch.int32, device=chosen.device)
    order = (chosen * number).argsort(dim=1, descending=True)
    return chosen.sum(dim=1, dtype=torch.int32), order.to(torch.int32)


def document_blocks(docs: Tensor) -> BlockLists:
    """The lists without a window, from the document of each token, (T,)."""
    first, last = docs.view(-1, BLOCK_SIZE)[:, 0], docs.view(-1, BLOCK_SIZE)[:, -1]
    block = torch.arange(len(first), device=docs.device)
    query, k = block[:, None], block[None, :]
    candidate = (k <= query) & (first[:, None] <= last[None, :]) & (first[None, :] <= last[:, None])
    full = (k < query) & (first[:, None] == last[None, :]) & (last[:, None] == first[None, :])
    return BlockLists(*nearest_first(candidate & ~full), *nearest_first(full))


def clip_to_window(lists: BlockLists, window: Tensor) -> BlockLists:
    """Keep the nearest window - 1 full blocks, and so many partial ones as fill the window, but at least one.

    `window` is in blocks, 0-dimensional int32: a tensor, so that a new window is no new program to compile.
    """
    return lists._replace(
        partial_count=torch.minimum(lists.partial_count, (window - lists.full_count).clamp(min=1)),
        full_count=torch.minimum(lists.full_count, (window - 1).clamp(min=0)),
    )


def flex_mask(lists: BlockLists, docs: Tensor) -> BlockMask:
    """The lists as FlexAttention wants them, for one batch entry and all heads alike."""

    def document_causal(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (docs[q_idx] == docs[kv_idx])

    partial_count, partial, full_count, full = (x[None, None].contiguous() for x in lists)
    return BlockMask.from_kv_blocks(partial_count, partial, full_count, full, BLOCK_SIZE=BLOCK_SIZE, mask_mod=document_causal)


class MaskedRows(NamedTuple):
    """A piece of a dense mask: what some consecutive queries see of the keys from the first to the last that they need."""

    queries: slice
    keys: slice
    bias: Tensor  # (queries, keys) fp32, added to the scores: 0 where a query sees a key, else -inf


def is_listed(count: Tensor, blocks: Tensor) -> Tensor:
    """(query blocks, key blocks) bool: whether a key block is among the first `count` of a query block's list."""
    listed = torch.arange(len(count)) < count[:, None]
    return torch.zeros_like(listed).scatter(1, blocks.long(), listed)


def block_to_tokens(blocks: Tensor) -> Tensor:
    """A value a block (queries, keys) as the same value for each of its tokens."""
    return blocks.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)


def dense_mask(lists: BlockLists, docs: Tensor) -> list[MaskedRows]:
    """The same mask as dense pieces, in order of their queries."""
    full, partial = is_listed(lists.full_count, lists.full), is_listed(lists.partial_count, lists.partial)
    position = torch.arange(len(docs))
    pieces = []
    for start in range(0, len(full), DENSE_QUERY_BLOCKS):
        stop = min(start + DENSE_QUERY_BLOCKS, len(full))
        first_key = int((full | partial)[start:stop].any(dim=0).nonzero()[0])
        rows, columns = slice(start, stop), slice(first_key, stop)
        queries, keys = slice(start * BLOCK_SIZE, stop * BLOCK_SIZE), slice(first_key * BLOCK_SIZE, stop * BLOCK_SIZE)
        document_causal = (docs[queries, None] == docs[keys]) & (position[queries, None] >= position[keys])
        seen = block_to_tokens(full[rows, columns]) | block_to_tokens(partial[rows, columns]) & document_causal
        pieces.append(MaskedRows(queries, keys, torch.zeros(seen.shape).masked_fill(~seen, -math.inf)))
    return pieces


Mask = BlockMask | list[MaskedRows]


def attention_masks(tokens: Tensor, end_of_text: int, window: Tensor) -> tuple[Mask, Mask]:
    """The masks of the long-window and of the short-window layers for a sequence (T,).

    Dense on a CPU, where FlexAttention has no backward.
    """
    docs = document_ids(tokens, end_of_text)
    lists = document_blocks(docs)
    make_mask = flex_mask if tokens.device.type == "cuda" else dense_mask
    return make_mask(clip_to_window(lists, window), docs), make_mask(clip_to_window(lists, window // 2), docs)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q, k, v (1, heads, T, head_dim) under either kind of mask."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=ATTENTION_SCALE)
    rows = [
        F.scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=bias, scale=ATTENTION_SCALE)
        for queries, keys, bias in mask
    ]
    return torch.cat(rows, dim=2)


# -----------------------------------------------------------------------------
# Fast paths
#
# Other ways to functions of the model, taken where the config's `fast_paths` names them; the plain ways are the default.
#
#   tables  the gradient of an embedding table: a sequence's tokens are sorted once, each token's rows added up and written once
#   mlp     ReLU squared and its derivative in the products before them, instead of passes over (T, 4d) of their own
#   head    the gradients of the loss made together with the loss, half of the sequence at a time
#   blocks  each kind of block compiled once, instead of the whole model (`GPT.compile_parts`): for the start, not for the step
#
# The kernels are Triton's (https://triton-lang.org); PyTorch sees each path as an operator of its own, so that
# torch.compile leaves it as it is. Bytes and times below are of T = 65,536, d = 1024 and bf16.

jit = (lambda kernel: kernel) if triton is None else triton.jit


def can_run_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run here: on a GPU, or, for tests, in Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


class Occurrences(NamedTuple):
    """Where each token of a sequence occurs: `order[starts[i] : starts[i + 1]]` for i < count, the i-th distinct token in order of its id."""

    ids: Tensor  # (T,) the tokens, sorted
    order: Tensor  # (T,) int64, their positions in the sequence
    starts: Tensor  # (T + 1,) int64, beyond count without meaning
    count: Tensor  # (1,) int64, distinct tokens


def find_occurrences(tokens: Tensor) -> Occurrences:
    """Of the tokens (T,); without waiting for the GPU."""
    T = len(tokens)
    ids, order = tokens.sort(stable=True)
    is_first = torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ids[1:] != ids[:-1]])
    number = is_first.cumsum(0) - 1
    position = torch.arange(T, device=tokens.device)
    starts = torch.full((T + 1,), T, device=tokens.device).scatter(0, torch.where(is_first, number, T), position)
    return Occurrences(ids, order, starts, number[-1:] + 1)


@jit
def row_sums_kernel(rows, ids, order, starts, count, sums, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum, in fp32, of each distinct token's `rows` (T, WIDTH) into its row of `sums` (V, WIDTH), by a fixed number of programs.

    ROWS at a time, for a frequent token has thousands in a sequence, and one after the other they would outlast all else.
    """
    i = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.load(count)
    while i < tokens:
        start, stop = tl.load(starts + i), tl.load(starts + i + 1)
        target = tl.load(ids + start).to(tl.int64)
        total = tl.zeros((COLUMNS,), tl.float32)
        while start < stop:
            place = start + tl.arange(0, ROWS)
            source = tl.load(order + place, mask=place < stop, other=0)
            part = tl.load(rows + source[:, None] * WIDTH + columns[None, :], mask=(place < stop)[:, None], other=0.0)
            total += tl.sum(part.to(tl.float32), axis=0)
            start += ROWS
        tl.store(sums + target * WIDTH + columns, total.to(sums.dtype.element_ty))
        i += tl.num_programs(0)


ROW_SUMS_TILE = dict(ROWS=32, COLUMNS=128)


@torch.library.custom_op("train_gpt_medium::embedding_gradient", mutates_args=())
def embedding_gradient(grad: Tensor, vocab_size: int, ids: Tensor, order: Tensor, starts: Tensor, count: Tensor) -> Tensor:
    """(V, d) gradient of a table from that of its rows (T, d), and the `Occurrences`. Added up in fp32 and rounded once, always in the same order.

    Reads grad once (134 MB) and writes the table once (103 MB): at least 0.08 ms at an H100's 3.35 TB/s.
    """
    width = grad.size(1)
    sums = grad.new_zeros(vocab_size, width)
    programs = (min(len(ids), 512), width // ROW_SUMS_TILE["COLUMNS"])
    row_sums_kernel[programs](grad.contiguous(), ids, order, starts, count, sums, WIDTH=width, **ROW_SUMS_TILE)
    return sums


@embedding_gradient.register_fake
def _(grad: Tensor, vocab_size: int, ids: Tensor, order: Tensor, starts: Tensor, count: Tensor) -> Tensor:
    return grad.new_empty(vocab_size, grad.size(1))


class SortedEmbedding(torch.autograd.Function):
    """The rows (T, d) of a table (V, d) for tokens (T,), as F.embedding, with `embedding_gradient` behind it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, *occurrences: Tensor) -> Tensor:
        ctx.vocab_size = len(weight)
        ctx.save_for_backward(*occurrences)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return embedding_gradient(grad, ctx.vocab_size, *ctx.saved_tensors), None, None, None, None, None


@jit
def relu_squared_kernel(a, b, squares, out, N: tl.constexpr, K: tl.constexpr, B_K_STRIDE: tl.constexpr, B_N_STRIDE: tl.constexpr,
                        BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of `out` (M, N): relu(a @ b)**2 or, with BACKWARD, (a @ b) * 2 * sqrt(squares); a (M, K), b (K, N).

    2 * sqrt(relu(h)**2) is the derivative of relu(h)**2: so h itself is never written.
    """
    tile = tl.program_id(0)  # the tiles of some rows one after the other, so that `a` is fetched once; `b` stays in the L2 cache
    row = (tile // (N // BLOCK_N)).to(tl.int64) * BLOCK_M  # M * N may be more than 2**31
    m = tl.arange(0, BLOCK_M)
    n = tile % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a += row * K + m[:, None] * K + k[None, :]
    b += k[:, None] * B_K_STRIDE + n[None, :] * B_N_STRIDE
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        h = tl.dot(tl.load(a), tl.load(b), h)
        a += BLOCK_K
        b += BLOCK_K * B_K_STRIDE
    place = row * N + m[:, None] * N + n[None, :]
    if BACKWARD:
        h *= 2 * tl.sqrt(tl.load(squares + place).to(tl.float32))
    else:
        h = tl.maximum(h, 0.0)
        h *= h
    tl.store(out + place, h.to(out.dtype.element_ty))


RELU_SQUARED_TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)


def relu_squared(a: Tensor, b: Tensor, squares: Tensor | None = None) -> Tensor:
    """relu(a @ b)**2 or, given that, `squares`, (a @ b) times its derivative: a (M, K) contiguous, b (K, N) -> (M, N)."""
    out = a.new_empty(len(a), b.size(1))
    tiles = out.numel() // (RELU_SQUARED_TILE["BLOCK_M"] * RELU_SQUARED_TILE["BLOCK_N"])
    relu_squared_kernel[(tiles,)](a, b, out if squares is None else squares, out, N=b.size(1), K=b.size(0), B_K_STRIDE=b.stride(0),
                                  B_N_STRIDE=b.stride(1), BACKWARD=squares is not None, **RELU_SQUARED_TILE)
    return out


@torch.library.custom_op("train_gpt_medium::fused_mlp", mutates_args=())
def fused_mlp(x: Tensor, fc_w: Tensor, proj_w: Tensor) -> tuple[Tensor, Tensor]:
    """relu(x @ fc_w.T)**2 @ proj_w.T, (T, d), and the square before the second product, (T, 4d), which its backward needs.

    Against a pass of its own for ReLU squared and one for its backward, (T, 4d) is read or written at most five times less: 2.7 GB a
    layer. Idea: the speedrun's fused MLP (https://github.com/KellerJordan/modded-nanogpt); the derivative from the square is ours.
    """
    squares = relu_squared(x.contiguous(), fc_w.T)
    return F.linear(squares, proj_w), squares


@fused_mlp.register_fake
def _(x: Tensor, fc_w: Tensor, proj_w: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), len(fc_w))


@torch.library.custom_op("train_gpt_medium::fused_mlp_backward", mutates_args=())
def fused_mlp_backward(grad: Tensor, x: Tensor, squares: Tensor, fc_w: Tensor, proj_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, fc_w and proj_w from that of `fused_mlp`'s first result."""
    grad_h = relu_squared(grad.contiguous(), proj_w, squares)
    return grad_h @ fc_w, grad_h.T @ x, grad.T @ squares


@fused_mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, squares: Tensor, fc_w: Tensor, proj_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), fc_w.new_empty(fc_w.shape), proj_w.new_empty(proj_w.shape)


def keep_for_mlp_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    x, fc_w, proj_w = inputs
    ctx.save_for_backward(x, output[1], fc_w, proj_w)


fused_mlp.register_autograd(lambda ctx, grad, _: fused_mlp_backward(grad, *ctx.saved_tensors), setup_context=keep_for_mlp_backward)

HEAD_CHUNK_TOKENS = 32 * 1024  # logits of 3.3 GB at once
HEAD_TILE = dict(TILE=4096, num_warps=32)  # so many warps that the rows at work, two a multiprocessor and 0.1 MB each, fit the L2 cache


@jit
def capped_cross_entropy_kernel(z, targets, losses, gradient_scale, LOGITS: tl.constexpr, CAP: tl.constexpr, WITH_GRADIENTS: tl.constexpr,
                                TILE: tl.constexpr):
    """The cross-entropy of a row of `z` (T, LOGITS), capped, into `losses` (T,); then `gradient_scale` times its gradient in the place of the row.

    Capped logits are at most 15, so that their exponentials can be added up in fp32 as they are. The row's second reading should be from
    the L2 cache. The target is read before the sum, at which all threads meet, so that no thread has written by then.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * LOGITS
    target = tl.load(targets + row)
    target_z = tl.load(z + target).to(tl.float32)
    column = tl.arange(0, TILE)
    exponentials = tl.zeros((TILE,), tl.float32)
    for start in range(0, LOGITS, TILE):
        x = tl.load(z + start + column, mask=start + column < LOGITS, other=0.0).to(tl.float32)
        exponentials += tl.where(start + column < LOGITS, tl.exp(CAP * x * tl.rsqrt(x * x + CAP * CAP)), 0.0)
    log_sum = tl.log(tl.sum(exponentials, axis=0))
    tl.store(losses + row, log_sum - CAP * target_z * tl.rsqrt(target_z * target_z + CAP * CAP))
    if WITH_GRADIENTS:
        for start in range(0, LOGITS, TILE):
            x = tl.load(z + start + column, mask=start + column < LOGITS, other=0.0).to(tl.float32)
            r = CAP * tl.rsqrt(x * x + CAP * CAP)  # the capped logit is r x, its derivative r**3
            gradient = tl.exp(r * x - log_sum) - tl.where(start + column == target, 1.0, 0.0)
            tl.store(z + start + column, (gradient_scale * gradient * r * r * r).to(z.dtype.element_ty), mask=start + column < LOGITS)


@torch.library.custom_op("train_gpt_medium::fused_head", mutates_args=())
def fused_head(x: Tensor, w: Tensor, targets: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy, () fp32, of targets (T,) under the capped logits x (T, d) @ w (V, d).T, and its gradients by x and w
    (of no elements without `with_gradients`).

    The logits of a sequence (6.6 GB) are written once by the product, read and replaced by their gradients once, and read by two
    products; they never exist in fp32, and half of them at a time. w's gradients are added up in fp32. Idea: the fused linear
    cross-entropy of Liger Kernel (https://arxiv.org/abs/2410.10989).
    """
    w_low = w.to(x.dtype)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    grad_x, grad_w = (torch.empty_like(x), torch.zeros_like(w)) if with_gradients else (x.new_empty(0), w.new_empty(0))
    for start in range(0, len(x), HEAD_CHUNK_TOKENS):
        chunk = slice(start, start + HEAD_CHUNK_TOKENS)
        z = x[chunk] @ w_low.T
        capped_cross_entropy_kernel[(len(z),)](z, targets[chunk], losses[chunk], 1 / len(x), LOGITS=len(w), CAP=LOGIT_CAP,
                                               WITH_GRADIENTS=with_gradients, **HEAD_TILE)
        if with_gradients:
            torch.mm(z, w_low, out=grad_x[chunk])
            grad_w += z.T @ x[chunk]
    return losses.mean(), grad_x, grad_w


@fused_head.register_fake
def _(x: Tensor, w: Tensor, targets: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    gradients = (x.new_empty(x.shape), w.new_empty(w.shape)) if with_gradients else (x.new_empty(0), w.new_empty(0))
    return x.new_empty((), dtype=torch.float32), *gradients


def keep_for_head_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def head_backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_w = ctx.saved_tensors
    return (grad * grad_x.float()).to(grad_x.dtype), grad * grad_w, None, None  # a product in bf16 would round grad first


fused_head.register_autograd(head_backward, setup_context=keep_for_head_backward)


# -----------------------------------------------------------------------------
# Model

LOSS_CHUNK_TOKENS = 64 * 1024  # logits of more tokens at once would not fit: 65,536 x 50,304 in fp32 are 13 GB


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def uniform_(w: Tensor, std: float) -> Tensor:
    """Fill with a uniform distribution around 0 of the given standard deviation."""
    return w.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864) in which half of the frequencies are 0 (@YouJiacheng)."""

    def __init__(self, max_seq_len: int):
        super().__init__()
        frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, HEAD_DIM // 4), torch.zeros(HEAD_DIM // 4)])
        theta = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos", theta.cos(), persistent=False)  # (max_seq_len, head_dim / 2) fp32
        self.register_buffer("sin", theta.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (1, T, heads, head_dim), rotated by position in fp32, in x's dtype."""
        cos, sin = self.cos[: x.size(1), None], self.sin[: x.size(1), None]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, model_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkvo_w = nn.Parameter(torch.zeros(4, model_dim, model_dim))  # query, key, value, output: (4, d, d)
        with torch.no_grad():
            uniform_(self.qkvo_w[:3], 0.5 * model_dim**-0.5)

    def forward(self, x: Tensor, value_embedding: Tensor | None, lambdas: Tensor, mask: Mask, rotary: Rotary) -> Tensor:
        """x (T, d), value_embedding (T, d) or None, lambdas (2,) -> (T, d)."""
        qkv = F.linear(x, self.qkvo_w[:3].flatten(end_dim=1)).view(1, len(x), 3, self.num_heads, HEAD_DIM)
        q, k, v = qkv.unbind(dim=2)  # (1, T, heads, head_dim) each
        q, k = rotary(norm(q)), rotary(norm(k))
        v = lambdas[0] * norm(v)
        if value_embedding is not None:
            v = v + lambdas[1] * value_embedding.view_as(v)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return F.linear(y.transpose(1, 2).reshape(x.shape), self.qkvo_w[3])


class MLP(nn.Module):
    def __init__(self, model_dim: int, fused: bool):
        super().__init__()
        self.fused = fused
        self.fc_w = nn.Parameter(torch.empty(4 * model_dim, model_dim))  # (4d, d)
        self.proj_w = nn.Parameter(torch.zeros(model_dim, 4 * model_dim))  # (d, 4d)
        with torch.no_grad():
            uniform_(self.fc_w, 0.5 * model_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, d) -> (T, d), with ReLU squared between the two products."""
        if self.fused:
            return fused_mlp(x, self.fc_w, self.proj_w)[0]
        return F.linear(F.relu(F.linear(x, self.fc_w)).square(), self.proj_w)


class Block(nn.Module):
    def __init__(self, layer: int, hp: Hyperparameters):
        super().__init__()
        self.attn = CausalSelfAttention(hp.model_dim, hp.num_heads) if layer != NO_ATTENTION_LAYER else None
        self.mlp = MLP(hp.model_dim, fused="mlp" in hp.fast_paths)

    def forward(self, x: Tensor, x0: Tensor, value_embedding: Tensor | None, block_lambdas: Tensor, attn_lambdas: Tensor,
                mask: Mask, rotary: Rotary) -> Tensor:
        """x, x0 (T, d) -> (T, d). The attention's input is not normed, the MLP's is."""
        x = block_lambdas[0] * x + block_lambdas[1] * x0
        if self.attn is not None:
            x = x + self.attn(x, value_embedding, attn_lambdas, mask, rotary)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The 16-layer model; `forward` gives the loss of one sequence.

    Parameter names and shapes are those of a published checkpoint. Initial values:

        embed, value_embeds           N(0, 1)
        attention's q, k, v; mlp.fc_w uniform, std 0.5 * d**-0.5
        output projections, head      0
        scalars                       skip weights 1, block lambdas (1, 0), attention lambdas (0.5, 0.5)
    """

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.end_of_text = hp.vocab_size - 1
        self.fast_paths = frozenset(hp.fast_paths)
        self.attention_masks = attention_masks
        self.table_of = {layer: k for k, table in enumerate(hp.value_embeddings) for layer in table}
        self.embed = nn.Embedding(hp.vocab_size, hp.model_dim)  # (V, d)
        self.value_embeds = nn.ModuleList(nn.Embedding(hp.vocab_size, hp.model_dim) for _ in hp.value_embeddings)  # (V, d) each
        self.blocks = nn.ModuleList(Block(layer, hp) for layer in range(NUM_LAYERS))
        self.rotary = Rotary(max(hp.train_seq_len, hp.val_seq_len))
        padded_vocab_size = -(-hp.vocab_size // 128) * 128
        self.lm_head_w = nn.Parameter(torch.zeros(padded_vocab_size, hp.model_dim))  # (padded V, d)
        self.scalars = nn.Parameter(torch.cat([
            torch.ones(NUM_LAYERS),  # skip weights, (L,)
            torch.tensor([1.0, 0.0]).repeat(NUM_LAYERS),  # block lambdas, (L, 2)
            torch.tensor([0.5, 0.5]).repeat(NUM_LAYERS),  # attention lambdas, (L, 2)
        ]))

    def use_bf16(self) -> None:
        """Keep every matrix but the head in bf16, as on CUDA; activations follow the embedding."""
        for module in (self.embed, self.value_embeds, self.blocks):
            module.bfloat16()

    def forward(self, tokens: Tensor, targets: Tensor, window: Tensor) -> Tensor:
        """Mean cross-entropy (nats, fp32) of targets (T,) after tokens (T,), under a long window of `window` blocks."""
        L = NUM_LAYERS
        skip_weights, block_lambdas, attn_lambdas = self.scalars[:L], self.scalars[L : 3 * L].view(L, 2), self.scalars[3 * L :].view(L, 2)
        long_mask, short_mask = self.attention_masks(tokens, self.end_of_text, window)
        # A value embedding enters here: each table is read once, and every layer that shares it gets the same rows.
        x0, *values = self.embeddings(tokens)
        x = x0.view_as(x0)  # no x0 itself, for which `compile_parts` would make the first block a kind of its own
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i in SKIPS:
                x = x + skip_weights[SKIPS[i]] * outputs[SKIPS[i]]
            value_embedding = values[self.table_of[i]] if i in self.table_of else None
            mask = long_mask if i in LONG_WINDOW_LAYERS else short_mask
            x = block(x, x0, value_embedding, block_lambdas[i], attn_lambdas[i], mask, self.rotary)
            outputs.append(x)
        return self.loss(x, targets)

    def compile_parts(self) -> None:
        """The path "blocks": compile each kind of block once, and what stands before and behind them.

        Blocks of one kind share a program, as long as it takes their parameters as inputs. What stands between blocks (the skips' sums,
        the sum of x0's gradients) is then in no program. Idea: regional compilation
        (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
        """
        for block in self.blocks:
            block.compile(dynamic=False, fullgraph=True)
        self.attention_masks, self.embeddings, self.loss = (
            torch.compile(part, dynamic=False, fullgraph=True) for part in (attention_masks, self.embeddings, self.loss)
        )

    def embeddings(self, tokens: Tensor) -> list[Tensor]:
        """The rows (T, d) of `embed`, normed, and of each value embedding, for tokens (T,)."""
        tables = [self.embed, *self.value_embeds]
        if "tables" in self.fast_paths and torch.is_grad_enabled():
            occurrences = find_occurrences(tokens)
            rows = [SortedEmbedding.apply(table.weight, tokens, *occurrences) for table in tables]
        else:
            rows = [table(tokens) for table in tables]
        return [norm(rows[0]), *rows[1:]]

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (T,), from the last block's x (T, d)."""
        x = norm(x)
        if "head" in self.fast_paths:
            return fused_head(x, self.lm_head_w, targets, torch.is_grad_enabled())[0]
        chunks = zip(x.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS))
        return sum(self.summed_loss(x_chunk, target_chunk) for x_chunk, target_chunk in chunks) / len(x)

    def summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies of targets (T,), from x (T, d), over the padded vocabulary with capped logits."""
        z = F.linear(x, self.lm_head_w.to(x.dtype)).float()
        logits = LOGIT_CAP * z * torch.rsqrt(z.square() + LOGIT_CAP**2)
        return F.cross_entropy(logits, targets, reduction="sum")


def model_on_meta(hp: Hyperparameters) -> GPT:
    """The model without memory behind its parameters, for their names, shapes and numbers."""
    with torch.device("meta"):
        return GPT(replace(hp, train_seq_len=BLOCK_SIZE, val_seq_len=BLOCK_SIZE))


def parameter_counts(model: GPT) -> dict[str, int]:
    """How many parameters each part has."""
    parts = {"hidden matrices": model.blocks, "embeddings": model.embed, "value embeddings": model.value_embeds}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return counts | {"head": model.lm_head_w.numel(), "scalars": model.scalars.numel()}


# -----------------------------------------------------------------------------
# Optimizers

NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalize(u: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to each u (..., rows, cols), roughly, by Newton-Schulz in u's dtype.

    Source: Muon (https://kellerjordan.github.io/posts/muon/), with the coefficients of @YouJiacheng, one set an iteration.
    """
    wide = u.size(-2) <= u.size(-1)
    x = u if wide else u.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def join_bits(p: Tensor, mantissa: Tensor) -> Tensor:
    """The fp32 master weight whose upper 16 bits are the bf16 tensor `p` and whose lower 16 are the uint16 `mantissa`."""
    return (p.view(torch.int16).to(torch.int32) << 16 | mantissa.to(torch.int32)).view(torch.float32)


def split_bits_(p: Tensor, mantissa: Tensor, master: Tensor) -> None:
    """Write an fp32 master weight back to `p` (truncated, not rounded) and `mantissa`: the inverse of `join_bits`."""
    bits = master.view(torch.int32)
    p.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
    mantissa.copy_((bits & 0xFFFF).to(torch.uint16))


def muon_update(p: Tensor, grad: Tensor, momentum_buffer: Tensor, mantissa: Tensor | None,
                momentum: Tensor, lr: Tensor, weight_decay: Tensor) -> None:
    """One Muon update of p (..., rows, cols), in place, with the momentum buffer (fp32) and mantissa of `Muon`.

    `momentum`, `lr` and `weight_decay` are 0-dimensional tensors, so that new values are no new program to compile.
    """
    g = grad.float()
    momentum_buffer.copy_(momentum * momentum_buffer + (1 - momentum) * g)
    v = orthogonalize((momentum * momentum_buffer + (1 - momentum) * g).to(p.dtype))
    master = p if mantissa is None else join_bits(p, mantissa)
    step_size = lr * math.sqrt(max(1, p.size(-2) / p.size(-1)))
    master = master * (1 - lr * weight_decay) - step_size * v.float()
    if mantissa is None:
        p.copy_(master)
    else:
        split_bits_(p, mantissa, master)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Keller Jordan, https://kellerjordan.github.io/posts/muon/), sharded over the ranks.

    Each group of parameters has one shape (..., rows, cols). `step` works through a group in rounds of one
    parameter a rank:
      1. each rank updates its own parameter of the round, from the gradient that all ranks have agreed on;
      2. it starts gathering the round's new parameters on all ranks, and goes on with the next round meanwhile;
      3. after the last round it waits for all of them.
    Only the rank that updates a parameter has its state: the momentum buffer and, for a bf16 parameter, the mantissa,
    the lower 16 bits of the fp32 master weight whose upper 16 bits are the parameter.
    """

    def __init__(self, param_groups: list[dict], lr: float, rank: int, world_size: int):
        super().__init__(param_groups, dict(lr=lr, weight_decay=0.0, momentum=0.95))
        self.rank, self.world_size = rank, world_size
        self.update = muon_update
        self.owner = {p: i % world_size for group in self.param_groups for i, p in enumerate(group["params"])}  # the rank with p's state
        for group in self.param_groups:
            assert len({p.shape for p in group["params"]}) == 1, "a group's parameters share one shape"
            # Every rank takes part in every gathering: where a round has no parameter for it, with one of these.
            group["spare"] = [torch.empty_like(group["params"][0]) for _ in range(world_size)] if world_size > 1 else []

    def compile(self) -> None:
        """Compile the update, once for each shape."""
        self.update = torch.compile(muon_update, dynamic=False, fullgraph=True)

    @staticmethod
    def new_state(p: Tensor) -> dict[str, Tensor | None]:
        mantissa = torch.zeros_like(p, dtype=torch.uint16) if p.dtype == torch.bfloat16 else None
        return dict(momentum_buffer=torch.zeros_like(p, dtype=torch.float32), mantissa=mantissa)

    def state_of(self, p: Tensor) -> dict[str, Tensor | None]:
        """The state of a parameter of this rank, made at its first update."""
        if p not in self.state:
            self.state[p] = self.new_state(p)
        return self.state[p]

    @torch.no_grad()
    def step(self) -> None:
        gathers = []
        for group in self.param_groups:
            numbers = [torch.tensor(group[name], dtype=torch.float64) for name in ("momentum", "lr", "weight_decay")]
            for start in range(0, len(group["params"]), self.world_size):
                parameters = group["params"][start : start + self.world_size]
                if self.rank < len(parameters):
                    p = parameters[self.rank]
                    self.update(p, p.grad, *self.state_of(p).values(), *numbers)
                if self.world_size > 1:
                    outputs = parameters + group["spare"][len(parameters) :]
                    gathers.append(dist.all_gather(outputs, outputs[self.rank], async_op=True))
        for gather in gathers:
            gather.wait()


def make_optimizers(model: GPT, rank: int, world_size: int) -> tuple[torch.optim.AdamW, Muon]:
    """AdamW for embeddings, head and scalars, the same on every rank; Muon for the blocks' matrices, sharded."""
    embeddings = [*model.embed.parameters(), *model.value_embeds.parameters()]
    adamw = torch.optim.AdamW(
        [dict(params=[model.lm_head_w], lr=1 / 320), dict(params=embeddings, lr=0.3), dict(params=[model.scalars], lr=0.015)],
        betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True,
    )
    attention = [block.attn.qkvo_w for block in model.blocks if block.attn is not None]
    muon_groups = [
        dict(params=attention, weight_decay=0.01),
        dict(params=[block.mlp.fc_w for block in model.blocks], weight_decay=0.02),
        dict(params=[block.mlp.proj_w for block in model.blocks], weight_decay=0.02),
    ]
    muon = Muon(muon_groups, lr=0.025, rank=rank, world_size=world_size)
    for group in adamw.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return adamw, muon


# -----------------------------------------------------------------------------
# Schedules, by step: the number of updates already made


def lr_scale(step: int, num_iterations: int, cooldown_frac: float) -> float:
    """What all learning rates are multiplied by: 1, then linearly down to 0 over the last cooldown_frac of the steps."""
    x = step / num_iterations
    return 1.0 if x < 1 - cooldown_frac else (1 - x) / cooldown_frac


def muon_momentum(step: int) -> float:
    """Linear from 0.85 at step 0 to 0.95 at step 300."""
    fraction = min(step / 300, 1)
    return (1 - fraction) * 0.85 + fraction * 0.95


def window_blocks(step: int, num_iterations: int) -> int:
    """The long window, in blocks of 128 tokens: a cubic of the progress, from 1 to 27 blocks (3456 tokens)."""
    x = step / num_iterations
    return max(1, math.ceil(3456 * (4 * x**3 - 6 * x**2 + 3 * x) / BLOCK_SIZE))


@lru_cache(maxsize=1)
def window_tensor(blocks: int, device: torch.device) -> Tensor:
    """The window as the model takes it; cached, because a copy to the GPU in every step would make it wait."""
    return torch.tensor(blocks, dtype=torch.int32, device=device)


def set_schedules(optimizers: tuple[torch.optim.AdamW, Muon], step: int, hp: Hyperparameters) -> None:
    adamw, muon = optimizers
    for group in adamw.param_groups + muon.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale(step, hp.num_iterations, hp.cooldown_frac)
    for group in muon.param_groups:
        group["momentum"] = muon_momentum(step)


# -----------------------------------------------------------------------------
# Checkpoint

COMPILED_PREFIX = "_orig_mod."  # the published script saved its compiled module, whose names begin so


def read_checkpoint(path: str, model: GPT) -> dict[str, Tensor]:
    """The weights in a checkpoint under the model's names. ValueError: no checkpoint, or one that does not fit the model."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        weights = {name.removeprefix(COMPILED_PREFIX): w for name, w in checkpoint["model"].items()}
    except Exception as error:
        fix = "name a torch.save of a dict with the weights under 'model'"
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({type(error).__name__}); {fix}") from None
    expected = model.state_dict()
    fix = "it must come from a model of the same value_embeddings, vocab_size and model_dim"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{path}: parameter {missing[0]} is missing ({len(missing)} in all); {fix}")
    if extra := [name for name in weights if name not in expected]:
        raise ValueError(f"{path}: parameter {extra[0]} is not in this model ({len(extra)} in all); {fix}")
    for name, w in weights.items():
        if not isinstance(w, Tensor) or w.shape != expected[name].shape:
            found = list(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"{path}: parameter {name} is {found} instead of {list(expected[name].shape)}; {fix}")
        if not (w.is_floating_point() and w.layout == torch.strided and w.device.type == "cpu" and w.isfinite().all()):
            raise ValueError(f"{path}: parameter {name} is no plain tensor of finite numbers ({w.dtype}); take another checkpoint")
    return weights


def sync_folder(folder: Path) -> None:
    """Have the disk keep what was renamed in a folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unfinished_path(path: Path) -> Path:
    """Where a checkpoint is written before it is renamed; a crash can leave it."""
    return path.with_name(path.name + ".unfinished")


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """A file under this name is always whole and on the disk: it is written under another one and renamed. OSError: it cannot be written."""
    unfinished = unfinished_path(path)
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.__context__ or error}") from None


class Resume(NamedTuple):
    """Where an interrupted run goes on; what its checkpoint says besides the tensors."""

    step: int  # updates made
    train_time_ms: float
    log_bytes: int  # what the log held
    world_size: int
    with_optimizers: bool  # not in the final weights, which need no more steps


MAY_CHANGE = {"description", "log_dir", "save_checkpoint", "checkpoint_every", "step_timeout"}  # keys that an interrupted run may go on with


def read_interrupted(path: Path, hp: Hyperparameters, code: str) -> dict[str, Any] | None:
    """The checkpoint of an interrupted run, None where there is none. ValueError: it is damaged or of another run than this one."""
    if not os.path.lexists(path):
        return None
    fix = "move it and its log away to start this run anew, or use another run_id"
    try:
        if (damaged := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        theirs, resume = json.loads(checkpoint["configuration"]), Resume(*checkpoint["resume"])
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that a run can go on from ({type(error).__name__}: {error}); {fix}") from None
    mine = asdict(hp)
    if changed := [name for name in mine if name not in MAY_CHANGE and mine[name] != theirs.get(name)]:
        was = ", ".join(f"{name} = {json.dumps(theirs.get(name))}" for name in changed)
        raise ValueError(f"{path}: the run began with another configuration; set {was} again, or {fix}")
    if checkpoint["device"] != (here := "cuda" if torch.cuda.is_available() else "cpu"):
        raise ValueError(f"{path}: the run began on {checkpoint['device']} and this is {here}, whose weights have another form; go on there, or {fix}")
    if checkpoint["code"] != code:
        raise ValueError(f"{path}: the run began with another text of the program, which its log begins with; put that back, or {fix}")
    if checkpoint["next_batch"] != (found := batch_place(open_shards(hp.train_files), hp, resume.step)):
        raise ValueError(f"{path}: train_files: the run was to go on at {checkpoint['next_batch']}, now that is {found}; put the shards back, or {fix}")
    return checkpoint


# -----------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; the only one where it was started without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool

    @classmethod
    def from_environment(cls) -> "Ranks":
        if not dist.is_torchelastic_launched():
            return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, launched=False)
        numbers = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        return cls(*numbers, launched=True)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def open_stores(self) -> tuple[dist.Store, dist.Store]:
        """Two key-value stores that the ranks share: the launch's, and one of each start and restart by torchrun of its own
        (one node: see `check_keys_together`)."""
        if not self.launched:
            return dist.HashStore(), dist.HashStore()
        store, _, _ = next(dist.rendezvous("env://"))
        return store, dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def describe_device(self) -> str:
        """What the computation runs on, for the user and the log."""
        ranks = counted(self.world_size, "rank")
        if self.device.type == "cuda":
            return f"device: {ranks}, {torch.cuda.get_device_name(self.device)}, bf16, compiled FlexAttention, NCCL"
        return f"device: {ranks}, CPU with {counted(torch.get_num_threads(), 'thread')} a rank, fp32, dense masked attention, gloo"


# -----------------------------------------------------------------------------
# Checks: what a user can get wrong, found before anything starts


def fitting_ranks(hp: Hyperparameters) -> list[int]:
    """The numbers of ranks that can share a step's sequences and the validation's evenly."""
    shares = math.gcd(hp.sequences_per_step, hp.val_tokens // hp.val_seq_len)
    return [n for n in range(1, min(shares, 1024) + 1) if shares % n == 0]


def suggest_ranks(hps: Sequence[Hyperparameters]) -> str:
    """How many ranks to start on this machine for these runs: as many of its GPUs, or else CPU cores, as can share the work of each. `run.sh` reads this."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here, kind = (torch.cuda.device_count(), "GPUs") if torch.cuda.is_available() else (cores, "CPU cores")
    fitting = sorted(set.intersection(*(set(fitting_ranks(hp)) for hp in hps)))
    best = max(n for n in fitting if n <= here)
    return f"ranks: {best} of {here} {kind} here ({', '.join(map(str, fitting))} can share the sequences evenly)"


def check_keys_together(hp: Hyperparameters, ranks: Ranks) -> None:
    """ValueError where keys do not fit each other, the number of ranks or the node."""
    if hp.model_dim != HEAD_DIM * hp.num_heads:
        raise ValueError(f"model_dim: {hp.model_dim} is not 128 * num_heads; use {HEAD_DIM * hp.num_heads} with num_heads {hp.num_heads}")
    if hp.val_tokens % hp.val_seq_len:
        raise ValueError(f"val_tokens: {hp.val_tokens} is not divisible by val_seq_len {hp.val_seq_len}; "
                         f"use {-(-hp.val_tokens // hp.val_seq_len) * hp.val_seq_len}")
    val_sequences = hp.val_tokens // hp.val_seq_len
    fix = f"start {' or '.join(map(str, fitting_ranks(hp)))} ranks (torchrun --nproc_per_node), or change the key"
    if hp.sequences_per_step % ranks.world_size:
        raise ValueError(f"sequences_per_step: {hp.sequences_per_step} sequences cannot be divided among {ranks.world_size} ranks; {fix}")
    if val_sequences % ranks.world_size:
        sequences = f"{val_sequences} validation sequences of {hp.val_seq_len} tokens"
        raise ValueError(f"val_tokens: {sequences} cannot be divided among {ranks.world_size} ranks; {fix}")
    if hp.fast_paths and torch.cuda.is_available() and triton is None:
        raise ValueError("fast_paths: needs Triton, which is not installed; install it or leave the key out")
    # The nodes' torchruns count restarts each for itself, so that restarted ranks would wait for each other for ever.
    if ranks.world_size > ranks.local_world_size and ranks.launched and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError("torchrun cannot restart this program on several nodes; use --max-restarts=0")
    if torch.cuda.is_available() and ranks.local_world_size > torch.cuda.device_count():
        raise ValueError(f"torchrun started {ranks.local_world_size} ranks on a node with {torch.cuda.device_count()} GPUs; "
                         f"use --nproc_per_node={torch.cuda.device_count()} or fewer")


def log_path(hp: Hyperparameters, config: Path, run_id: int) -> Path:
    """ValueError where it would be outside log_dir."""
    if config.stem in (".", ".."):
        raise ValueError(f"{config}: its logs would be outside log_dir, in {hp.log_dir}/{config.stem}; rename the config")
    return Path(hp.log_dir) / config.stem / f"{run_id:03d}.txt"


def is_taken(log: Path) -> bool:
    """Whether a run has this log's number: a log or a checkpoint of it is there."""
    return os.path.lexists(log) or os.path.lexists(log.with_suffix(".ckpt"))


def is_finished(log: Path) -> bool:
    """Whether a run wrote its log to the end."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 1000))
        tail = file.read()
    return re.search(rb"^peak memory \w+: \d+ MiB.*\n", tail, re.MULTILINE) is not None


def choose_run_id(hp: Hyperparameters, config: Path) -> int:
    """The run's number: as asked for, or the first free one. ValueError: that run is finished, or no log can be written."""
    folder = log_path(hp, config, 0).parent
    parent = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"log_dir: cannot write logs below {parent}; set log_dir to a folder that you can write to")
    if hp.run_id is None:
        free = (run_id for run_id in range(1000) if not is_taken(log_path(hp, config, run_id)))
        if (run_id := next(free, None)) is None:
            raise ValueError(f"log_dir: all run_ids from 0 to 999 are taken in {folder}; move logs away or set log_dir")
        return run_id
    log = log_path(hp, config, hp.run_id)
    if not log.exists() and is_taken(log):
        raise ValueError(f"run_id: run {hp.run_id} has a checkpoint in {folder} but no log; put the log back or use another run_id")
    if log.exists() and is_finished(log):
        raise ValueError(f"run_id: run {hp.run_id} is finished in {folder}, and a log is never overwritten; use another run_id or leave it out")
    return hp.run_id


def check_run(hp: Hyperparameters, config: Path, ranks: Ranks) -> None:
    """ValueError for the first thing that would stop this run: its message names the file, the key and the fix."""
    with blame(str(config)):
        check_keys_together(hp, ranks)
        choose_run_id(hp, config)
        if hp.init_from:
            with blame("init_from"):
                read_checkpoint(hp.init_from, model_on_meta(hp))
        step_tokens = hp.sequences_per_step * hp.train_seq_len
        shards = fineweb_shards_needed(hp.num_iterations, step_tokens)
        with blame("train_files"), suggest_fetching(hp.train_files, shards):
            check_stream(hp.train_files, hp.vocab_size, step_tokens, hp.num_iterations, f"num_iterations = {hp.num_iterations}")
        with blame("val_files"), suggest_fetching(hp.val_files, shards if is_fineweb(hp.train_files) else 0):
            val_sequences = hp.val_tokens // hp.val_seq_len  # of one shard, to which fetching adds none
            check_stream(hp.val_files, hp.vocab_size, hp.val_seq_len, val_sequences, f"val_tokens = {hp.val_tokens}", more=ValueError)


class Plan(NamedTuple):
    """A checked command line."""

    config: Path
    hp: Hyperparameters
    only_check: bool


def plan_runs(arguments: Sequence[str], ranks: Ranks) -> list[Plan]:
    """The runs that the command line asks for, several only to check them. ValueError for whatever would stop one.

    With --check, the number of ranks that the run will have can be given in the environment, as WORLD_SIZE.
    """
    configs, overrides, only_check = parse_command_line(arguments)
    if only_check and (intended := os.environ.get("WORLD_SIZE", "")).isdecimal() and int(intended) > 0:
        ranks = replace(ranks, world_size=int(intended))
    plans = [Plan(config, load_hyperparameters(config, overrides), only_check) for config in configs]
    folder_of: dict[Path, Path] = {}
    for plan in plans:
        folder = log_path(plan.hp, plan.config, 0).parent
        if (other := folder_of.setdefault(folder, plan.config)) is not plan.config:
            raise ValueError(f"{plan.config}: its logs would go to {folder}, as those of {other} do; rename one of the configs, or name it once")
        check_run(plan.hp, plan.config, ranks)
    return plans


def describe_run(hp: Hyperparameters) -> str:
    """The map as a drawing and the parameter counts, for the user to look at before anything starts."""
    counts = parameter_counts(model_on_meta(hp))
    width = max(len(f"{n:,}") for n in counts.values())
    fast = [f"fast paths, on CUDA: {', '.join(hp.fast_paths)}"] if hp.fast_paths else []
    return "\n".join([draw_map(hp.value_embeddings), "parameters:", *(f"  {n:>{width},}  {name}" for name, n in counts.items()), *fast])


# -----------------------------------------------------------------------------
# Log


def say(text: str) -> None:
    """A line on standard output, above a progress bar if there is one. A run goes on when nobody listens any more."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


LOCK_WAIT_S = 10  # a rank whose launcher was killed ends sooner than that


class RunLog:
    """Rank 0's log file and standard output; on the other ranks (path None) it writes nothing.

    Every line is in the file as soon as it is written. OSError: FileExistsError where the file is there though it
    should be new, or it cannot be written.
    """

    def __init__(self, path: Path | None, new: bool = True):
        self.path = path
        self.file = None if path is None else open(path, "x" if new else "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        self.bar: tqdm | None = None

    def lock(self) -> None:
        """Keep other processes from the run until this one's end. ValueError: another one is at it."""
        for _ in range(10 * LOCK_WAIT_S):
            try:
                return fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a filesystem without locks
                return
        raise ValueError(f"{self.path}: another process is at this run; wait for its end or use another run_id")

    def size(self) -> int:
        """Bytes."""
        return os.fstat(self.file.fileno()).st_size

    def keep_aside(self) -> None:
        """Copy what there is to <run_id>.txt.interrupted, the first free one of these, before the run starts over."""
        numbered = (self.path.with_name(f"{self.path.name}.interrupted{number or ''}") for number in itertools.count())
        shutil.copyfile(self.path, next(path for path in numbered if not path.exists()))

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes. ValueError: there are fewer."""
        if self.size() < size:
            raise ValueError(f"{self.path}: shorter than when the run's checkpoint was written; put the log back, or use another run_id")
        os.ftruncate(self.file.fileno(), size)

    def show_progress(self, num_iterations: int, step: int) -> None:
        """From now on a bar takes the place of the training lines, where standard output is a terminal."""
        if self.file is not None and sys.stdout.isatty():
            self.bar = tqdm(total=num_iterations, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def to_file(self, text: str) -> None:
        if self.file is not None:
            self.file.write(f"{text}\n")

    def line(self, text: str) -> None:
        """A line for the file and, always, for standard output."""
        if self.file is not None:
            self.to_file(text)
            say(text)

    def train_line(self, text: str) -> None:
        """The line of a training step: for the file, and for standard output or its progress bar."""
        if self.bar is None:
            self.line(text)
        else:
            self.to_file(text)
            self.bar.update()

    def hide_progress(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        self.hide_progress()
        if self.file is not None:
            self.file.close()


def val_line(step: int, num_iterations: int, val_loss: float, train_time_ms: float) -> str:
    """A validation's line, to the letter as published logs have it."""
    step_avg_ms = train_time_ms / max(step, 1)
    return f"step:{step}/{num_iterations} val_loss:{val_loss:.6f} train_time:{train_time_ms:.0f}ms step_avg:{step_avg_ms:.2f}ms"


def train_line(step: int, num_iterations: int, train_time_ms: float) -> str:
    """A training step's line, to the letter as published logs have it; `step` counts the updates made."""
    return f"step:{step}/{num_iterations} train_time:{train_time_ms:.0f}ms step_avg:{train_time_ms / step:.2f}ms"


def describe_environment() -> str:
    """Versions and, with CUDA, what nvidia-smi says."""
    lines = [
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {platform.platform()}",
    ]
    if torch.cuda.is_available():
        try:
            lines.append(subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout)
        except OSError as error:
            lines.append(f"nvidia-smi: {error}")
    return "\n".join(lines)


def write_log_header(log: RunLog, code: str, hp: Hyperparameters, ranks: Ranks) -> None:
    """Program text, resolved configuration (TOML) and environment: what it takes to repeat the run."""
    if log.file is None:
        return
    rule = "=" * 100
    config = "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in asdict(hp).items())
    log.to_file("\n".join([code, rule, config, rule, describe_environment(), ranks.describe_device(), describe_run(hp), rule]))


def peak_memory(device: torch.device) -> str:
    """The log's last line, in MiB: of the GPU as the published logs have it, else of this process."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
        return f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return f"peak memory resident: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20} MiB"


# -----------------------------------------------------------------------------
# Training


class Clock:
    """Time spent on training. It runs only between `start` and `stop`, and each of these waits for all ranks and the GPU."""

    def __init__(self, device: torch.device, stopped_ms: float = 0.0):
        self.device = device
        self.stopped_ms = stopped_ms
        self.started_at = 0.0

    def wait_for_all(self) -> None:
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        self.wait_for_all()
        self.started_at = time.perf_counter()

    def stop(self) -> None:
        self.wait_for_all()
        self.stopped_ms = self.running_ms()

    def running_ms(self) -> float:
        """Milliseconds up to now, of a running clock; the GPU may be a little behind."""
        return self.stopped_ms + 1000 * (time.perf_counter() - self.started_at)


class Stop(NamedTuple):
    """A signal, and the step at which all ranks stop for it."""

    step: int
    signal: int


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8 (n,): a form that every backend can send."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of the CPU's generator and of the GPU's. After the weights are made nothing is drawn any more; they are kept for ideas that do."""
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(kind: str, state: Tensor, device: torch.device) -> None:
    if kind == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class Trainer:
    """The model, its optimizers and the step; one on each rank.

    A step is the same function for every world size: each rank adds up the gradients of its share of the
    sequences, every loss weighted by 1 / sequences_per_step, and the all-reduce adds up the ranks', in the
    parameters' dtypes.
    """

    def __init__(self, hp: Hyperparameters, ranks: Ranks):
        self.hp, self.ranks, self.device = hp, ranks, ranks.device
        if not can_run_kernels(self.device):
            hp = replace(hp, fast_paths=[])
        torch.manual_seed(hp.seed)
        with self.device:
            self.raw_model = GPT(hp)
        if self.device.type == "cuda":
            self.raw_model.use_bf16()
        if hp.init_from:
            self.raw_model.load_state_dict(read_checkpoint(hp.init_from, self.raw_model))
        for p in self.raw_model.parameters():
            dist.broadcast(p.detach(), 0)
        self.val_shards = open_shards(hp.val_files)  # once, so that data made anew during a run does not change it
        self.optimizers = make_optimizers(self.raw_model, ranks.rank, ranks.world_size)
        self.loss_weight = torch.tensor(1 / hp.sequences_per_step, device=self.device)
        self.step: int | None = None  # updates made; None before the training
        self.work_done = 0  # sequences; what `Watch` looks at
        self.stop: Stop | None = None  # set by `Watch`
        self.model: nn.Module = self.raw_model
        if self.device.type == "cuda":
            torch._inductor.config.coordinate_descent_tuning = hp.coordinate_descent_tuning
            self.optimizers[1].compile()
            if "blocks" in hp.fast_paths:
                self.raw_model.compile_parts()
            else:
                self.model = torch.compile(self.raw_model, dynamic=False)

    def window(self, step: int) -> Tensor:
        return window_tensor(window_blocks(step, self.hp.num_iterations), self.device)

    def train_step(self, step: int, inputs: Tensor, targets: Tensor) -> None:
        """Update the weights from this rank's sequences, (n, train_seq_len) each."""
        for sequence, sequence_targets in zip(inputs, targets):
            self.model(sequence, sequence_targets, self.window(step)).backward(gradient=self.loss_weight)
            self.work_done += 1
        reductions = [
            [dist.all_reduce(p.grad, async_op=True) for group in optimizer.param_groups for p in group["params"]]
            for optimizer in self.optimizers
        ]
        set_schedules(self.optimizers, step, self.hp)
        for optimizer, works in zip(self.optimizers, reductions):
            for work in works:
                work.wait()
            optimizer.step()
        self.raw_model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """The mean loss over the validation sequences, the same for every world size."""
        losses = torch.zeros(self.hp.val_tokens // self.hp.val_seq_len, device=self.device)
        for number, inputs, targets in val_sequences(self.val_shards, self.hp, self.ranks.rank, self.ranks.world_size, self.device):
            losses[number] = self.model(inputs, targets, self.window(step))
            self.work_done += 1
        dist.all_reduce(losses)
        return losses.double().mean().item()

    def warm_up(self) -> None:
        """Compile and warm every kernel on random tokens, then restore everything: weights, optimizer and random states."""
        hp = self.hp
        if hp.warmup_steps == 0:
            return
        weights = deepcopy(self.raw_model.state_dict())
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            def random_sequences(count: int, seq_len: int) -> tuple[Tensor, Tensor]:
                tokens = torch.randint(hp.vocab_size, (count * seq_len + 1,), dtype=torch.int32)
                return to_inputs_and_targets(tokens, seq_len, self.device)

            for _ in range(hp.warmup_steps):
                self.train_step(0, *random_sequences(hp.sequences_per_step // self.ranks.world_size, hp.train_seq_len))
            # Validation too: what it lacks, memory above all, shows now and not at the end of the run.
            inputs, targets = random_sequences(1, hp.val_seq_len)
            with torch.no_grad():
                self.model(inputs[0], targets[0], self.window(0))
        self.raw_model.load_state_dict(weights)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def named_states(self) -> Iterator[tuple[str, dict[str, Tensor | None], int | None]]:
        """(parameter's name, its optimizer's state, the rank that has it, None: all ranks) for each parameter.

        A rank that lacks a state gets one of the same form; what is received into it is not kept.
        """
        adamw, muon = self.optimizers
        for name, p in self.raw_model.named_parameters():
            if p in muon.owner:
                yield name, muon.state_of(p) if muon.owner[p] == self.ranks.rank else muon.new_state(p), muon.owner[p]
                continue
            if not adamw.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=self.device)
                adamw.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            yield name, adamw.state[p], None

    @torch.no_grad()
    def collect(self, with_optimizers: bool) -> dict[str, Any]:
        """Weights, optimizer states of all ranks and random states, copied to rank 0's memory; {} on the other ranks."""
        is_first = self.ranks.rank == 0
        states: dict[str, dict[str, Tensor]] = {}
        for name, state, owner in self.named_states() if with_optimizers else ():
            for key, tensor in state.items():
                if tensor is None:
                    continue
                if owner is not None:
                    dist.broadcast(as_bytes(tensor), owner)
                if is_first:
                    states.setdefault(name, {})[key] = tensor.to("cpu", copy=True)
        if not is_first:
            return {}
        weights = {COMPILED_PREFIX + name: w.to("cpu", copy=True) for name, w in self.raw_model.state_dict().items()}
        return dict(model=weights, optimizer_states=states, random_states=random_states(self.device))

    @torch.no_grad()
    def restore(self, checkpoint: dict[str, Any], with_optimizers: bool) -> None:
        """The inverse of `collect`, on every rank, from what rank 0 has."""
        is_first = self.ranks.rank == 0
        for name, p in self.raw_model.named_parameters():
            if is_first:
                p.copy_(checkpoint["model"][COMPILED_PREFIX + name])
            dist.broadcast(p.detach(), 0)
        for name, state, _ in self.named_states() if with_optimizers else ():
            for key, tensor in state.items():
                if tensor is None:
                    continue
                if is_first:
                    tensor.copy_(checkpoint["optimizer_states"][name][key])
                dist.broadcast(as_bytes(tensor), 0)
        states = checkpoint["random_states"] if is_first else random_states(self.device)
        for kind, state in states.items():
            state = state.to(self.device)
            dist.broadcast(state, 0)
            set_random_state(kind, state.cpu(), self.device)
        checkpoint.clear()  # its memory map would keep the file from being freed


class RunFailed(Exception):
    """The run cannot go on; its message is for the user. Every rank raises it."""


class Stopped(Exception):
    """The run was asked to end, by the signal of this number, and can go on later. Every rank raises it."""


class Checkpoints:
    """The checkpoints of a run, on rank 0; the other ranks take part in collecting.

    Collecting copies everything to rank 0's memory while the clock stands still; the file is written by a thread
    meanwhile the training goes on.
    """

    def __init__(self, trainer: Trainer, log: RunLog, code: str):
        self.trainer, self.log, self.code = trainer, log, code
        self.path = None if log.path is None else log.path.with_suffix(".ckpt")
        self.shards = [] if self.path is None else open_shards(trainer.hp.train_files)  # once: see `train_batches`
        self.writer: threading.Thread | None = None
        self.written_step: int | None = None  # of the file that is there

    def is_due(self, step: int) -> bool:
        every = self.trainer.hp.checkpoint_every
        return every > 0 and step % every == 0

    def save(self, step: int, train_time_ms: float, with_optimizers: bool = True) -> None:
        """RunFailed where the weights are not finite: the checkpoint before stays."""
        self.wait()
        hp = self.trainer.hp
        if not torch.stack([p.isfinite().all() for p in self.trainer.raw_model.parameters()]).all():
            raise RunFailed(f"the weights are not finite at step {step}")
        checkpoint = self.trainer.collect(with_optimizers)
        if self.path is not None:
            resume = Resume(step, train_time_ms, self.log.size(), self.trainer.ranks.world_size, with_optimizers)
            checkpoint |= dict(
                step=step, code=self.code, device=self.trainer.device.type, resume=tuple(resume), configuration=json.dumps(asdict(hp)),
                next_batch=batch_place(self.shards, hp, step),
            )
            self.writer = threading.Thread(target=self.write, args=(checkpoint,))
            self.writer.start()

    def write(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint that cannot be written does not end the run."""
        try:
            os.fsync(self.log.file.fileno())
            write_checkpoint(self.path, checkpoint)
            self.written_step = checkpoint["step"]
        except OSError as error:
            self.log.line(f"no checkpoint of step {checkpoint['step']}: {error}; the one before it stays, if there is one")

    def wait(self) -> None:
        """Until the file is written."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None

    def remove(self) -> None:
        self.wait()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            unfinished_path(self.path).unlink(missing_ok=True)


def train(trainer: Trainer, log: RunLog, checkpoints: Checkpoints, start: Resume | None = None) -> float:
    """Validate and train, step by step, with the clock running over training only; returns its last time in ms.

    RunFailed: the loss or the weights are not finite. Stopped: at `trainer.stop`.
    """
    if start is not None and not start.with_optimizers:  # its last validation is in the log
        return start.train_time_ms
    hp, first_step = trainer.hp, start.step if start else 0
    clock = Clock(trainer.device, start.train_time_ms if start else 0.0)
    batches = train_batches(hp, trainer.ranks.rank, trainer.ranks.world_size, trainer.device, first_step)
    log.show_progress(hp.num_iterations, first_step)
    trainer.step = first_step
    clock.start()
    for step in range(first_step, hp.num_iterations + 1):
        is_last = step == hp.num_iterations
        if is_last or (hp.val_loss_every and step % hp.val_loss_every == 0):
            clock.stop()
            val_loss = trainer.validate(step)
            log.line(val_line(step, hp.num_iterations, val_loss, clock.stopped_ms))
            if not math.isfinite(val_loss):
                raise RunFailed(f"the validation loss is {val_loss} at step {step}")
            clock.start()
        if not is_last:
            trainer.train_step(step, *next(batches))
            trainer.step = step + 1
            log.train_line(train_line(step + 1, hp.num_iterations, clock.running_ms()))
            is_stop = trainer.stop is not None and trainer.stop.step == step + 1
            if checkpoints.is_due(step + 1) or is_stop:
                clock.stop()
                checkpoints.save(step + 1, clock.stopped_ms)
                if is_stop:
                    checkpoints.wait()
                    dist.barrier()  # the launcher ends all ranks when the first is gone
                    raise Stopped(trainer.stop.signal)
                clock.start()
    log.hide_progress()
    return clock.stopped_ms


# -----------------------------------------------------------------------------
# Watch: what the training thread cannot see itself

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # unless, as nohup has it, ignored
POLL_S = 0.5
GRACE_S = 5.0  # for the other ranks to answer, or to print their stacks
START_TIMEOUT_S = 3600  # without progress, before the first step is done: the compiler is at work


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Watch(threading.Thread):
    """A thread of each rank that ends the rank, or the run, when it should not go on.

    - SIGTERM, SIGINT, SIGHUP: with checkpoints, all ranks agree on a step a little ahead and stop there. The rank that got
      the signal says so in the store; each rank that reads it there answers with the step that it can stop at; the
      largest of these it is. Without checkpoints, before the first step, or where a rank does not answer, it ends at once.
    - no progress for `step_timeout` seconds: every thread's stack is printed and the rank ends.
    - the launcher is gone: the rank ends, for nobody else would end it.
    """

    def __init__(self, trainer: Trainer, store: dist.Store):
        super().__init__(daemon=True)
        self.trainer, self.store, self.ranks = trainer, store, trainer.ranks
        self.launcher, self.run_sh = os.getppid(), int(os.environ.get("RUN_SH_PID", "0"))
        self.signal = 0
        self.seen, self.seen_at = -1, time.monotonic()
        self.armed_at = 0.0
        self.last_step, self.fastest = 0, 0  # and the most steps between two looks: the mean pace has the validations in it
        self.began: tuple[float, int] | None = None  # when the training was first seen, and its step
        self.over = threading.Event()

    def __enter__(self) -> "Watch":
        # The bytes that signals write to a pipe are seen by this thread also while the training thread waits in a library.
        self.signals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        faulthandler.cancel_dump_traceback_later()
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def run(self) -> None:
        try:
            self.watch()
        except BaseException as error:  # a rank must not go on unwatched
            self.end(1, f"{type(error).__name__}: {error}")

    def watch(self) -> None:
        while not self.over.is_set():
            if select.select([self.signals], [], [], POLL_S)[0]:
                self.signal = os.read(self.signals, 1)[0]
            if self.over.is_set():
                return
            if self.ranks.launched and (os.getppid() != self.launcher or self.run_sh and not is_alive(self.run_sh)):
                self.end(1, "the launcher is gone")
            if self.trainer.step is not None:
                if self.began is None:
                    self.began, self.last_step = (time.monotonic(), self.trainer.step), self.trainer.step
                self.fastest = max(self.fastest, self.trainer.step - self.last_step)
                self.last_step = self.trainer.step
            self.look_at_progress()
            try:
                self.look_for_stop()
            except RuntimeError as error:  # of the store, whose server the launcher is
                self.end(1, f"the launcher does not answer ({error})")

    def end(self, status: int, why: str) -> None:
        """End this process at once."""
        step = self.trainer.step or 0
        try:
            if self.ranks.rank == 0 or not self.signal:
                print(f"train_gpt_medium.py: rank {self.ranks.rank} ends at step {step}: {why}", file=sys.stderr, flush=True)
        finally:  # also where nobody listens any more
            os._exit(status)

    def look_at_progress(self) -> None:
        now = time.monotonic()
        has_begun = self.began is not None and self.trainer.step > self.began[1]
        limit = self.trainer.hp.step_timeout if has_begun else START_TIMEOUT_S
        if self.trainer.work_done != self.seen:
            self.seen, self.seen_at = self.trainer.work_done, now
        elif now - self.seen_at > limit:
            print(f"rank {self.ranks.rank} has made no progress for {limit} s; its stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr)
            time.sleep(GRACE_S)
            self.end(1, f"no progress for {limit} s, as the stacks above show; step_timeout sets the limit")
        if now - self.armed_at > limit / 10:  # for when a library keeps this thread from running too
            self.armed_at = now
            faulthandler.dump_traceback_later(limit + 2 * GRACE_S, exit=True)

    def look_for_stop(self) -> None:
        if self.trainer.stop is not None:
            return
        if self.signal:
            if not self.trainer.hp.checkpoint_every or self.began is None:
                self.end(128 + self.signal, f"signal {self.signal}, and nothing to write a checkpoint of")
            self.store.set("stop", str(self.signal))
        if self.store.check(["stop"]):
            self.signal = int(self.store.get("stop"))
            self.agree()

    def agree(self) -> None:
        """Set the step at which all ranks stop, far enough ahead that no rank has passed it when it learns of it."""
        if self.began is None:
            self.end(128 + self.signal, f"signal {self.signal}")
        since, first_step = self.began
        seconds_per_step = (time.monotonic() - since) / max(1, self.trainer.step - first_step)
        ahead = 2 + max(math.ceil(4 * POLL_S / seconds_per_step), 4 * self.fastest)
        self.store.set(f"stop/{self.ranks.rank}", str(self.trainer.step + ahead))
        answers = [f"stop/{rank}" for rank in range(self.ranks.world_size)]
        deadline = time.monotonic() + GRACE_S
        while not self.store.check(answers):
            if time.monotonic() > deadline:
                self.end(128 + self.signal, f"signal {self.signal}, and another rank does not answer")
            time.sleep(0.05)
        stop = Stop(max(int(self.store.get(answer)) for answer in answers), self.signal)
        if self.trainer.step >= stop.step:  # the others would wait for this rank for ever
            self.end(128 + self.signal, f"signal {self.signal}, and the step to stop at has passed")
        self.trainer.stop = stop


# -----------------------------------------------------------------------------
# Main


def attempt(function, *arguments) -> tuple[Any, str]:
    """A function's result and "", or None and its complaint in one line."""
    try:
        return function(*arguments), ""
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        return None, text.encode(errors="backslashreplace").decode()  # file names can be of any bytes


def all_well(store: dist.Store, ranks: Ranks, question: str, problem: str) -> bool:
    """Whether no rank has a problem; each distinct one is printed once, by rank 0, before any rank returns.

    A rank that ended on its own would make torchrun end the others, perhaps before any of them had told the
    user why. So each rank leaves its problem ("" for none) in the store, and rank 0 reads and prints them.
    """
    store.set(f"{question}/{ranks.rank}", problem)
    if ranks.rank == 0:
        answers = (store.get(f"{question}/{rank}").decode() for rank in range(ranks.world_size))
        problems = [answer for answer in dict.fromkeys(answers) if answer]
        for text in problems:
            print(f"train_gpt_medium.py: {text}", file=sys.stderr, flush=True)
        store.set(question, "problems" if problems else "well")
    return store.get(question) == b"well"


def differing_keys(store: dist.Store, ranks: Ranks, plan: Plan) -> str:
    """A complaint where this rank's configuration is not rank 0's, as when two nodes have two versions of a file; else ""."""
    mine = asdict(plan.hp)
    if ranks.rank == 0:
        store.set("configuration", json.dumps(mine))
    theirs = json.loads(store.get("configuration"))
    differing = [name for name in mine if mine[name] != theirs[name]]
    if not differing:
        return ""
    return f"{plan.config}: {', '.join(differing)} of rank {ranks.rank} differ from rank 0's; give every node the same config and options"


class Claim(NamedTuple):
    """A run that is this process's: its number, its open log and, where it was interrupted, its checkpoint."""

    run_id: int
    log: RunLog
    checkpoint: dict[str, Any] | None


def resolve(hp: Hyperparameters, run_id: int) -> Hyperparameters:
    """The keys that a run's number decides."""
    return replace(hp, run_id=run_id, seed=run_id if hp.seed is None else hp.seed)


def claim_run(hp: Hyperparameters, config: Path, code: str) -> Claim:
    """Open and lock the run's log; of an interrupted run, cut it to where the checkpoint was written, or to nothing. ValueError: see
    `choose_run_id`, `read_interrupted`, `RunLog`."""
    while True:
        run_id = choose_run_id(hp, config)
        path = log_path(hp, config, run_id)
        with blame(f"{config}: log_dir: cannot write a log, set log_dir to a folder that you can write to"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                log = RunLog(path, new=hp.run_id is None)
            except FileExistsError:  # another run has taken the number since we looked
                continue
        with blame(f"{config}: run_id"):
            log.lock()
            choose_run_id(replace(hp, run_id=run_id), config)  # again, now that nobody else can be at it
            checkpoint = read_interrupted(path.with_suffix(".ckpt"), resolve(hp, run_id), code)
            if checkpoint is None and re.search(rb"^step:", path.read_bytes(), re.MULTILINE):
                log.keep_aside()
            log.cut(Resume(*checkpoint["resume"]).log_bytes if checkpoint else 0)
        return Claim(run_id, log, checkpoint)


def start_process_group(ranks: Ranks, store: dist.Store) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
        # An hour, not ten minutes: ranks whose compile caches differ reach the first collective minutes apart.
        dist.init_process_group("nccl", store=store, rank=ranks.rank, world_size=ranks.world_size,
                                device_id=ranks.device, timeout=timedelta(hours=1))
    else:
        dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world_size)


def describe_resume(start: Resume, ranks: Ranks) -> str:
    """The line of the log where a run goes on."""
    then = "" if start.world_size == ranks.world_size else f" (until here {counted(start.world_size, 'rank')}, so that train_time is of both)"
    return f"resumed at step {start.step} after {start.train_time_ms:.0f}ms of training; {ranks.describe_device()}{then}"


def run(hp: Hyperparameters, ranks: Ranks, store: dist.Store, claim: Claim, start: Resume | None, code: str) -> None:
    """The run itself, all checks passed. RunFailed, Stopped: see `train`."""
    log = claim.log
    start_process_group(ranks, store)
    trainer = Trainer(hp, ranks)
    with Watch(trainer, store):
        log.line(f"warm-up: {counted(hp.warmup_steps, 'step')}, not timed, then undone")
        trainer.warm_up()
        if start is not None:
            trainer.restore(claim.checkpoint or {}, start.with_optimizers)
        checkpoints = Checkpoints(trainer, log, code)
        try:
            train_time_ms = train(trainer, log, checkpoints, start)
            if hp.save_checkpoint:
                checkpoints.save(hp.num_iterations, train_time_ms, with_optimizers=False)
        finally:
            checkpoints.wait()  # also where the run fails: what was good is not lost
        if hp.save_checkpoint and checkpoints.path is not None:
            if checkpoints.written_step != hp.num_iterations:
                raise OSError(f"the final weights could not be written to {checkpoints.path}; make room and start the same config and run_id again")
            log.line(f"checkpoint: {checkpoints.path}")
        log.line(peak_memory(trainer.device))
        if not hp.save_checkpoint:
            checkpoints.remove()
        log.close()
        dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str]) -> int:
    """Check, then run. Returns the exit status: 2 where the user has something to mend, which has been printed."""
    code = Path(__file__).read_text(encoding="utf-8")
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    ranks = Ranks.from_environment()
    launch, store = ranks.open_stores()
    plans, problem = attempt(plan_runs, arguments, ranks)
    if not all_well(store, ranks, "plan", problem):
        return 2
    if ranks.rank == 0:
        for plan in plans:
            say(f"{describe_run(plan.hp)}\n{ranks.describe_device()}\nlogs: {log_path(plan.hp, plan.config, 0).parent}")
    plan = plans[0]
    if plan.only_check:
        if not ranks.launched:
            say(suggest_ranks([plan.hp for plan in plans]))
        return 0

    if not all_well(store, ranks, "one config", differing_keys(store, ranks, plan)):
        return 2
    if ranks.rank == 0 and plan.hp.run_id is None and launch.check(["run_id"]):  # torchrun has restarted a run
        plan = plan._replace(hp=replace(plan.hp, run_id=int(launch.get("run_id"))))
    claim, problem = attempt(claim_run, plan.hp, plan.config, code) if ranks.rank == 0 else (Claim(0, RunLog(None), None), "")
    if not all_well(store, ranks, "log", problem):
        return 2
    if ranks.rank == 0:
        launch.set("run_id", str(claim.run_id))
        store.set("claim", json.dumps([claim.run_id, claim.checkpoint and claim.checkpoint["resume"]]))
    run_id, resume = json.loads(store.get("claim"))
    hp, start = resolve(plan.hp, run_id), Resume(*resume) if resume else None
    if start is None:
        write_log_header(claim.log, code, hp, ranks)
    else:
        claim.log.line(describe_resume(start, ranks))
    claim.log.line(f"log: {claim.log.path}")
    return run_and_report(hp, ranks, store, claim, start, code)


def run_and_report(hp: Hyperparameters, ranks: Ranks, store: dist.Store, claim: Claim, start: Resume | None, code: str) -> int:
    """The run's exit status; what has ended it before its time stands in one line on standard error and, if it can be written, in the log."""
    log, status = claim.log, 1
    try:
        run(hp, ranks, store, claim, start, code)
        return 0
    except RunFailed as error:
        why, is_ours = str(error), ranks.rank == 0
    except Stopped as error:
        status = 128 + error.args[0]
        why, is_ours = "stopped, with a checkpoint; start the same config and run_id again to go on", ranks.rank == 0
    except (ValueError, OSError) as error:
        why, is_ours = " ".join(str(error).split()), True
    except BaseException:  # ours, or the GPU's: what the interpreter would do on its way out could wait for ranks that are gone
        traceback.print_exc()
        os._exit(1)
    log.hide_progress()
    with suppress(OSError):
        if is_ours:
            print(f"train_gpt_medium.py: {log.path or f'rank {ranks.rank}'}: {why}", file=sys.stderr, flush=True)
    with suppress(OSError):
        log.to_file(f"ended: {why}")
    os._exit(status)  # without the process group's farewell, for which ranks that are gone would be waited for


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before there is anything to save needs no traceback
    sys.exit(main(sys.argv[1:]))
