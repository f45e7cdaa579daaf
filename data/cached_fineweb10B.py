"""Fetch FineWeb's validation shard and first NUM_SHARDS training shards (default: all 103); see data/README.md."""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\ncached_fineweb10B.py: interrupted\n"), os._exit(130)))
from data.shards import HEADER_BYTES, num_batches, reading

FINEWEB_FOLDER, SHARD_TOKENS = Path(__file__).resolve().parent / "fineweb10B", 100_000_000
TRAIN_NAMES = [f"fineweb_train_{number:06d}.bin" for number in range(1, 104)]
REPOSITORY, ENDPOINT = "kjj0/fineweb10B-gpt2", os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
FIXES = dict.fromkeys((401, 403), "no access with this token; log in (hf auth login) or correct HF_TOKEN")
FIXES[404] = "no such dataset, commit or file; check HF_ENDPOINT and revision.json"


def shard_number(path: str) -> int:
    """Return the number of a FineWeb training shard, from its name; 0 for any other file."""
    return TRAIN_NAMES.index(name) + 1 if (name := os.path.basename(path)) in TRAIN_NAMES else 0


def num_shards_needed(num_iterations: int, step_tokens: int) -> int | None:
    """Return how many training shards hold the steps; None if all of them hold too few."""
    return next((n for n in range(1, 104) if num_batches(n * [SHARD_TOKENS], step_tokens) >= num_iterations), None)


def absent_shards(pattern: str, count: int, present: set[str]) -> list[str]:
    """Return the names of the first `count` training shards that match the pattern and are not in `present`."""
    return [name for name in TRAIN_NAMES[:count] if name not in present and Path(name).match(Path(pattern).name)]


def read_record(api) -> tuple[str, dict[str, list]]:
    """Return the commit and its large files, name -> [bytes, SHA-256], from revision.json, or first from the Hub."""
    path, record = FINEWEB_FOLDER / "revision.json", {}
    with reading(path), suppress(FileNotFoundError, ValueError):  # missing or damaged
        record = json.loads(path.read_bytes())
    if not record:
        info = api.dataset_info(REPOSITORY, revision="main", files_metadata=True, timeout=30)
        files = {file.rfilename: [file.lfs.size, file.lfs.sha256] for file in info.siblings if file.lfs}
        with suppress(OSError):  # in a read-only folder, each call asks the Hub
            path.write_text(json.dumps(record := {"revision": "main", "commit": info.sha, "files": files}, indent=1))
    return record["commit"], record["files"]


def find_damage(names: Iterable[str], files: dict[str, list]) -> dict[str, str]:
    """Return the missing and damaged shards, name -> fault."""
    damage = {}
    for name in names:
        with reading(path := FINEWEB_FOLDER / name):
            content = path.read_bytes() if os.path.lexists(path) else b""  # 200 MB
        if hashlib.sha256(content).hexdigest() != files[name][1]:
            damage[name] = f"{len(content):,} bytes, not the Hub's SHA-256" if content else "missing"
    return damage


def update(names: list[str], only_check: bool) -> None:
    """Fetch missing and damaged shards, except with `only_check`. Raises ValueError if any remain."""
    from filelock import FileLock
    from huggingface_hub import HfApi
    commit, files = read_record(api := HfApi(endpoint=ENDPOINT))
    if unknown := sorted(set(names) - files.keys()):
        raise ValueError(f"{REPOSITORY} has no {unknown[0]} in commit {commit}; ask for fewer shards")
    damage = find_damage(names, files)
    tokens = [(files[name][0] - HEADER_BYTES) // 2 for name in names if shard_number(name) and name not in damage]
    print(f"{FINEWEB_FOLDER}: commit {commit}, {len(names) - len(damage)} of {len(names)} shards intact, "
          f"enough for {num_batches(tokens, 8 * 65536):,} steps of the baseline", flush=True)
    if damage and not only_check:
        api.dataset_info(REPOSITORY, revision=commit, timeout=30)  # its errors say more than those of the next calls
        with FileLock(FINEWEB_FOLDER / ".lock"):
            shutil.rmtree(FINEWEB_FOLDER / ".cache", ignore_errors=True)  # a killed call leaves unfinished files there
            api.snapshot_download(REPOSITORY, repo_type="dataset", revision=commit, allow_patterns=list(damage),
                                  local_dir=FINEWEB_FOLDER)
            damage = find_damage(damage, files)
            for name in damage:
                (FINEWEB_FOLDER / name).unlink(missing_ok=True)
    if faults := "; ".join(f"{name}: {fault}" for name, fault in damage.items()):
        raise ValueError(f"{faults}; fetch again: {sys.executable} data/cached_fineweb10B.py {shard_number(names[-1])}")


def explain(error: Exception) -> str:
    """Return the fault and its fix."""
    if (response := getattr(error, "response", getattr(error.__cause__, "response", None))) is not None:
        return f"{ENDPOINT} answers {response.status_code}: {FIXES.get(response.status_code, 'rerun later')}"
    if type(error) is ValueError:
        return str(error)
    if getattr(error, "errno", None) is not None:
        return f"{error}; check space and permissions of {FINEWEB_FOLDER}"
    text = "wrong file size" if type(error) is OSError else error  # the library's text holds a signed address
    return f"no valid answer from {ENDPOINT} ({type(error).__name__}: {text}); check the network, HF_ENDPOINT, HF_TOKEN"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.error = lambda message: parser.exit(2, f"cached_fineweb10B.py: {message}; see --help\n")
    parser.add_argument("num_shards", nargs="?", type=int, metavar="NUM_SHARDS", help="default: all 103")
    parser.add_argument("--check", action="store_true", help="fetch nothing; say how many steps the shards hold")
    options = parser.parse_args(arguments)
    present = max((shard_number(path.name) for path in FINEWEB_FOLDER.glob("*.bin")), default=0)
    count = options.num_shards if options.num_shards is not None else present if options.check else len(TRAIN_NAMES)
    if not 0 <= count <= len(TRAIN_NAMES):
        parser.error(f"NUM_SHARDS is {count}; use 0 (only the validation shard) to {len(TRAIN_NAMES)}")
    try:
        FINEWEB_FOLDER.mkdir(parents=True, exist_ok=True)
        update(["fineweb_val_000000.bin", *TRAIN_NAMES[:count]], options.check)
    except Exception as error:  # the HTTP library's and Xet's errors have no common base
        parser.exit(2, f"cached_fineweb10B.py: {' '.join(explain(error).split())}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
