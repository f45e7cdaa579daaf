"""Check keys against each other, the map, the ranks and the data; draw the map and count parameters.

An entry of the map is a list of layers, which stands for a table with a row per token, or an inline table:
{layers = [1, 2], source = "bigram", rows = 251520, heads = 8}. Only `layers` is required.
"""

import json
import math
import os
from collections import Counter
from string import ascii_letters
from typing import Any, NamedTuple

from configs.config import error_context
from data.cached_fineweb10B import num_shards_needed
from data.loader import check_stream
from data.shards import count_documents, fingerprint
from logs.run_log import plural

NUM_LAYERS = 16
NO_ATTENTION_LAYER = 7  # it has no values to which a value embedding could be added
PUBLISHED_HEADS = 8
MIN_VAL_DOCUMENTS = 32


class Source(NamedTuple):
    """An entry of the map: one source of values. None stands for a default."""
    layers: list[int]
    source: str = "token"
    rows: int | None = None  # of a hashed table
    heads: int | None = None  # the source adds to this many heads, the first ones


def read_entry(entry: list | dict) -> Source:
    return Source(**entry) if isinstance(entry, dict) else Source(entry)


def max_heads(num_heads: int, scale: str) -> int:
    """Return the heads that an entry's `heads` is a share of: the published 8 under a smaller scale."""
    return max(PUBLISHED_HEADS, num_heads) if scale else num_heads


def num_source_heads(source: Source, num_heads: int, scale: str) -> int:
    """Return a source's heads, which shrink in proportion under a scale with fewer than the published 8."""
    most = max_heads(num_heads, scale)
    return -(-(source.heads or most) * num_heads // most)


def check_layers(layers: list) -> list[int]:
    """Return a list of attention layers. Raises ValueError for an impossible or repeated layer."""
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < NUM_LAYERS:
            shown = json.dumps(layer, default=str)
            raise ValueError(f"layer {shown} does not exist; use integers from 0 to {NUM_LAYERS - 1}")
        if layer == NO_ATTENTION_LAYER:
            raise ValueError(f"layer {layer} has no attention; remove it")
        if layers.count(layer) > 1:
            raise ValueError(f"layer {layer} is listed twice; remove one")
    return layers


def check_betas(betas: list) -> list[float]:
    """Return AdamW's two betas. Raises ValueError unless they are two numbers from 0 to below 1."""
    if len(betas) != 2 or not all(type(beta) in (int, float) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"{json.dumps(betas, default=str)} is not two numbers from 0 to below 1; "
                         "use two such numbers, as in [0.8, 0.95]")
    return [float(beta) for beta in betas]


def check_entry(entry: list | dict, has_rows: dict[str, bool]) -> list | dict:
    """Return an entry without defaults and in a fixed order; a plain table is its list of layers.

    `has_rows` tells for each kind of source whether an entry may set its rows. Raises ValueError for a mistake.
    """
    table = entry if isinstance(entry, dict) else {"layers": entry}
    if unknown := [name for name in table if name not in Source._fields]:
        raise ValueError(f"unknown key {unknown[0]}; use {', '.join(Source._fields)}")
    if "layers" not in table:
        raise ValueError("layers is missing; list the layers, as in {layers = [0, 13]}")
    layers, kind = table["layers"], table.get("source", "token")
    if kind not in list(has_rows):  # a list: an unhashable kind is unknown too
        raise ValueError(f"source {json.dumps(kind, default=str)} does not exist; use {' or '.join(has_rows)}")
    if "rows" in table and not has_rows[kind]:
        raise ValueError(f"rows: a {kind} source has no choice of rows; remove rows")
    for name, least, most in (("rows", 2, 2**31), ("heads", 1, 256)):
        if type(value := table.get(name, least)) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {json.dumps(value, default=str)}; use an integer from {least} to {most}")
    if not isinstance(layers, list) or not layers:
        shown = json.dumps(layers, default=str)
        raise ValueError(f"{shown} is not a list of layers; list the layers that use it, as in [0, 13]")
    check_layers(layers)
    values = Source(**table)._asdict().items()
    short = {name: value for name, value in values if value != Source._field_defaults.get(name)}
    return layers if len(short) == 1 else short


def check_entries(entries: list, has_rows: dict[str, bool]) -> list[list | dict]:
    """Return the map with each entry as from `check_entry`. Raises ValueError for an impossible entry."""
    if entries and all(isinstance(entry, int) for entry in entries):
        raise ValueError(f"{entries} is a list of layers, not of tables; for one table write [{entries}]")
    checked = []
    for k, entry in enumerate(entries):
        with error_context(f"entry {k}"):
            checked.append(check_entry(entry, has_rows))
    return checked


def check_sources(entries: list, only: list[int], num_heads: int, scale: str) -> None:
    """Raise ValueError if a source has too many heads, or if a layer would have no values at all."""
    most, sources = max_heads(num_heads, scale), [read_entry(entry) for entry in entries]
    for k, source in enumerate(sources):
        if (source.heads or 1) > most:
            raise ValueError(f"value_embeddings: entry {k}: heads is {source.heads}; use at most {most}")
    for layer in only:
        if not any(layer in source.layers for source in sources):
            raise ValueError(f"value_embeddings_only: layer {layer} would have no values; add it to value_embeddings, "
                             "or remove it here")


def draw_map(entries: list, only: list[int], num_heads: int, scale: str) -> str:
    """Draw the layers from first to last, a column per source: its letter where a layer uses it, | between its uses."""
    sources = [read_entry(entry) for entry in entries]
    letters: dict[str, str] = {}
    for kind in dict.fromkeys(source.source for source in sources):
        free = (c for c in kind + ascii_letters if c not in ("o", *letters.values()))
        letters[kind] = "o" if kind == "token" else next(free)
    noun, legend = "table", ""
    if set(letters) - {"token"}:
        noun, legend = "source", f" ({', '.join(f'{letter} {kind}' for kind, letter in letters.items())})"
    lines = [f"value embeddings: {plural(len(sources), noun)}{legend}"]
    heads = [num_source_heads(source, num_heads, scale) for source in sources]
    lines += [f"  {noun} {k} adds to {n} of {num_heads} heads" for k, n in enumerate(heads) if n < num_heads]
    for layer in range(NUM_LAYERS):
        cells = [letters[s.source] if layer in s.layers else "|" if min(s.layers) < layer < max(s.layers) else " "
                 for s in sources]
        used = [str(k) for k, source in enumerate(sources) if layer in source.layers]
        note = f"{noun if len(used) == 1 else noun + 's'} {', '.join(used)}" if used else ""
        note = "no attention" if layer == NO_ATTENTION_LAYER else note + ", no values of its own" * (layer in only)
        lines.append(f"  layer {layer:2d}  {' '.join(cells)}  {note}".rstrip())
    return "\n".join(lines)


def count_parameters(groups: list[dict[str, Any]]) -> str:
    """Count the parameters of each name of the optimizers' groups, and the memory of the tables."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group["name"]] += sum(p.numel() for p in group["params"])
    table_mb = 4 * 2e-6 * counts["value_embeds.*.weight"]
    lines = [f"{count:>15,}  {name}" for name, count in counts.items() if count]
    return "\n".join([f"parameters: {counts.total():,}", *lines,
                      f"tables: {table_mb:,.1f} MB per GPU in bf16, with gradients and AdamW's two states"])


def check_sizes(model_dim: int, width: int, val_tokens: int, val_seq_len: int) -> None:
    """Raise ValueError unless model_dim is the heads' total width and val_seq_len divides val_tokens."""
    if model_dim != width:
        raise ValueError(f"model_dim: {model_dim} is not 128 * num_heads; use {width} with num_heads {width // 128}")
    if val_tokens % val_seq_len:
        raise ValueError(f"val_tokens: {val_tokens} is not divisible by val_seq_len {val_seq_len}; "
                         f"use {-(-val_tokens // val_seq_len) * val_seq_len}")


def warn_of_lengths(train_seq_len: int, val_seq_len: int, max_window: int) -> str:
    """Return a line if validation would use distances, in tokens, on which the model is not trained, else ""."""
    if (reach := min(max_window, val_seq_len)) <= train_seq_len:
        return ""
    return (f"\nwarning: validation attends over {reach} tokens, training over {train_seq_len}: the loss would depend "
            f"on distances that training never shows; set val_seq_len to {train_seq_len}")


def warn_of_documents(num_val_documents: int) -> str:
    """Return a line if a validation reads few documents, else ""."""
    if num_val_documents >= MIN_VAL_DOCUMENTS:
        return ""
    return (f"\nwarning: validation reads only {plural(num_val_documents, 'document')}: the loss would say little "
            "about other text; raise val_tokens, or make val_files from shuffled, shorter documents")


def valid_world_sizes(sequences_per_step: int, num_val_sequences: int) -> list[int]:
    """Return every number of ranks that divides the sequences of a step and of a validation."""
    shares = math.gcd(sequences_per_step, num_val_sequences)
    return [n for n in range(1, 1025) if shares % n == 0]


def check_world_size(world_size: int, sequences_per_step: int, num_val_sequences: int, run_id: int | None) -> None:
    """Raise ValueError if the ranks cannot share the sequences evenly, or torchrun may restart an unnumbered run."""
    if run_id is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise ValueError("run_id: torchrun can restart only a numbered run; give --run_id or --max-restarts=0")
    for name, count in (("sequences_per_step", sequences_per_step), ("val_tokens", num_val_sequences)):
        if count % world_size:
            valid = " or ".join(map(str, valid_world_sizes(sequences_per_step, num_val_sequences)))
            raise ValueError(f"{name}: {count} sequences cannot be divided among {world_size} ranks; "
                             f"start {valid} ranks (torchrun --nproc_per_node), or change the key")


def check_streams(vocab_size: int, end_of_text: int, train_files: str, step_tokens: int, num_iterations: int,
                  val_files: str, val_seq_len: int, num_val_sequences: int) -> dict[str, Any]:
    """Check the training and validation shards; return their fingerprints as `train_data` and `val_data`, and
    `val_documents`, the number of documents that start in a validation's tokens.

    Raises MissingShardsError, with the command that fetches the data if there is one, or ValueError.
    """
    if end_of_text >= vocab_size:
        raise ValueError(f"end_of_text: {end_of_text} is not a token id; use at most {vocab_size - 1}")
    fingerprints, fineweb_shards = {}, num_shards_needed(num_iterations, step_tokens)
    for name, files, batch_tokens, count, purpose in (
        ("train", train_files, step_tokens, num_iterations, f"num_iterations = {num_iterations}"),
        ("val", val_files, val_seq_len, num_val_sequences, f"val_tokens = {num_val_sequences * val_seq_len}"),
    ):
        with error_context(f"{name}_files"):
            shards = check_stream(files, vocab_size, end_of_text, batch_tokens, count, purpose, fineweb_shards)
            fingerprints[f"{name}_data"] = fingerprint(shards, batch_tokens, count)
    val_documents = count_documents(shards, val_seq_len, num_val_sequences, end_of_text)
    if shared := [shard[0] for shard in fingerprints["val_data"] if shard in fingerprints["train_data"]]:
        raise ValueError(f"val_files: {shared[0]} is training data too; validate on other shards")
    return fingerprints | {"val_documents": val_documents}
