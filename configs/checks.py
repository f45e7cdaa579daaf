"""Check more than single keys: the map of value embeddings, the number of ranks, the data. Draw the map."""

import json
import math
from pathlib import Path

from configs.config import error_context
from data.cached_fineweb10B import num_shards_needed
from data.loader import check_stream
from data.shards import fingerprint, open_shards

NUM_LAYERS = 16
NO_ATTENTION_LAYER = 7  # it has no values to which a value embedding could be added


def check_value_embeddings(tables: list) -> list[list[int]]:
    """Return the map, a list of layers for each table. Raises ValueError for an impossible table or layer."""
    if tables and all(isinstance(table, int) for table in tables):
        raise ValueError(f"{tables} is a list of layers, not of tables; for one table write [{tables}]")
    for k, table in enumerate(tables):
        if not isinstance(table, list) or not table:
            shown = json.dumps(table, default=str)
            raise ValueError(f"table {k} is {shown}; list the layers that use it, for example [0, 13]")
        for layer in table:
            if type(layer) is not int or not 0 <= layer < NUM_LAYERS:
                shown = json.dumps(layer, default=str)
                raise ValueError(f"table {k}: layer {shown} does not exist; use integers from 0 to {NUM_LAYERS - 1}")
            if layer == NO_ATTENTION_LAYER:
                raise ValueError(f"table {k}: layer {layer} has no attention; remove it from the table")
            if table.count(layer) > 1:
                raise ValueError(f"table {k}: layer {layer} is listed twice; remove one")
    return tables


def draw_map(tables: list[list[int]]) -> str:
    """Draw the layers from first to last, a column per table: o where a layer uses it, | between its uses."""
    lines = [f"value embeddings: {len(tables)} table{'' if len(tables) == 1 else 's'}"]
    for layer in range(NUM_LAYERS):
        cells = ["o" if layer in table else "|" if min(table) < layer < max(table) else " " for table in tables]
        used = [str(k) for k, table in enumerate(tables) if layer in table]
        note = f"table{'s' * (len(used) > 1)} {', '.join(used)}" if used else ""
        note = "no attention" if layer == NO_ATTENTION_LAYER else note
        lines.append(f"  layer {layer:2d}  {' '.join(cells)}  {note}".rstrip())
    return "\n".join(lines)


def valid_world_sizes(sequences_per_step: int, num_val_sequences: int) -> list[int]:
    """Return every number of ranks that divides the sequences of a step and of a validation."""
    shares = math.gcd(sequences_per_step, num_val_sequences)
    return [n for n in range(1, min(shares, 1024) + 1) if shares % n == 0]


def check_world_size(world_size: int, sequences_per_step: int, num_val_sequences: int) -> None:
    """Raises ValueError if so many ranks cannot share the sequences evenly."""
    for name, count in (("sequences_per_step", sequences_per_step), ("val_tokens", num_val_sequences)):
        if count % world_size:
            valid = " or ".join(map(str, valid_world_sizes(sequences_per_step, num_val_sequences)))
            raise ValueError(f"{name}: {count} sequences cannot be divided among {world_size} ranks; "
                             f"start {valid} ranks (torchrun --nproc_per_node), or change the key")


def check_streams(config: Path, vocab_size: int, train_files: str, step_tokens: int, num_iterations: int,
                  val_files: str, val_seq_len: int, num_val_sequences: int) -> dict[str, list]:
    """Check the training and validation shards; return their fingerprints as `train_data` and `val_data`.

    Raises MissingShardsError, with the command that fetches the data if there is one, or ValueError.
    """
    fingerprints, fineweb_shards = {}, num_shards_needed(num_iterations, step_tokens)
    for name, files, batch_tokens, count, purpose in (
        ("train", train_files, step_tokens, num_iterations, f"num_iterations = {num_iterations}"),
        ("val", val_files, val_seq_len, num_val_sequences, f"val_tokens = {num_val_sequences * val_seq_len}"),
    ):
        with error_context(f"{config}: {name}_files"):
            check_stream(files, vocab_size, batch_tokens, count, purpose, fineweb_shards)
            fingerprints[f"{name}_data"] = fingerprint(open_shards(files), batch_tokens, count)
    return fingerprints
