"""Fetch FineWeb as shards of 100M tokens from the Hugging Face Hub: python data/cached_fineweb10B.py [NUM_SHARDS]

Brings the validation shard and the first NUM_SHARDS of 103 training shards (default: all) of the dataset
https://huggingface.co/datasets/kjj0/fineweb10B-gpt2 to data/fineweb10B/. revision.json there records the commit, which
later calls use, and the SHA-256 of each file, by which every call finds and fetches what is missing or damaged.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\ncached_fineweb10B.py: interrupted\n"), os._exit(130)))

from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download

from data.shards import FINEWEB_FOLDER, FINEWEB_SHARDS, HEADER_BYTES, num_batches, shard_number

REPOSITORY = "kjj0/fineweb10B-gpt2"
ENDPOINT = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
RETRY_AFTER_S = (2, 4, 8, 16)
ACCESS = "no access with this token; log in (hf auth login) or correct HF_TOKEN"
FIXES = {401: ACCESS, 403: ACCESS, 404: "no such dataset, revision or file; check --revision and HF_ENDPOINT"}


def ask_hub(revision: str) -> dict:
    """`revision`, the `commit` that it is now on the Hub, and its large `files`, name -> [bytes, SHA-256]."""
    try:
        info = HfApi(endpoint=ENDPOINT).dataset_info(REPOSITORY, revision=revision, files_metadata=True, timeout=30)
        files = {file.rfilename: [file.lfs.size, file.lfs.sha256] for file in info.siblings if file.lfs is not None}
    except (json.JSONDecodeError, UnicodeError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT, HF_TOKEN, proxies") from None
    return {"revision": revision, "commit": info.sha, "files": files}


def find_record(revision: str | None) -> dict:
    """What `ask_hub` returned to the folder's first call. Raises ValueError if that was for another revision."""
    path, new = FINEWEB_FOLDER / "revision.json", FINEWEB_FOLDER / "revision.new"
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none, or a damaged one
        record = ask_hub(revision or "main")
        new.write_text(json.dumps(record, indent=1))
        new.replace(path)
    if revision not in (None, record["revision"], record["commit"]):
        raise ValueError(f"--revision {revision}: {path} has revision {record['revision']}, commit {record['commit']}; "
                         f"leave --revision out, or move the folder away and start again")
    return record


def find_damage(names: list[str], files: dict[str, list]) -> dict[str, str]:
    """Those of the shards that are missing or damaged, with the reason."""
    damage = {}
    for name in names:
        try:
            content = (FINEWEB_FOLDER / name).read_bytes()  # 200 MB
            if hashlib.sha256(content).hexdigest() != files[name][1]:
                damage[name] = f"{len(content):,} bytes, not of the Hub's SHA-256"
        except OSError as error:
            damage[name] = str(error.strerror)
    return damage


def bring(names: list[str], revision: str | None, only_check: bool) -> None:
    """Fetch what is missing or damaged of the shards. Raises ValueError if that fails, or with `only_check` at once."""
    files = (record := find_record(revision))["files"]
    if unknown := sorted(set(names) - files.keys()):
        raise ValueError(f"{REPOSITORY} has no {unknown[0]} in commit {record['commit']}; use another --revision")
    damage = find_damage(names, files)
    tokens = [(files[name][0] - HEADER_BYTES) // 2 for name in names if shard_number(name) and name not in damage]
    print(f"{FINEWEB_FOLDER}: commit {record['commit']}, {len(names) - len(damage)} of {len(names)} shards "
          f"whole, good for {num_batches(tokens, 8 * 65536):,} steps of the baseline")
    if damage and not only_check:
        ask_hub(record["commit"])  # its errors say more than those of snapshot_download
        damage = fetch(damage, record)
    if damage:
        complaints = "; ".join(f"{name}: {what}" for name, what in damage.items())
        raise ValueError(f"{complaints}; fetch again: python data/cached_fineweb10B.py {shard_number(names[-1])}")


def fetch(damage: dict[str, str], record: dict) -> dict[str, str]:
    """Fetch missing and damaged shards, a few times over; returns those that are not whole then."""
    shutil.rmtree(FINEWEB_FOLDER / ".cache", ignore_errors=True)  # a killed call leaves unfinished files there
    for wait_s in (*RETRY_AFTER_S, None):
        for name in damage:
            if (path := FINEWEB_FOLDER / name).exists():
                print(f"{name}: {damage[name]}; removed")
                path.unlink()
        if not damage or wait_s is None:
            return damage
        try:
            snapshot_download(REPOSITORY, repo_type="dataset", revision=record["commit"], allow_patterns=list(damage),
                              local_dir=FINEWEB_FOLDER, max_workers=8, endpoint=ENDPOINT)  # a kill loses at most 8
        except Exception as error:  # also the errors of its HTTP library and of Xet, which have no common base
            if getattr(error, "errno", None) or wait_s == RETRY_AFTER_S[-1]:
                raise
            print(f"{explain(error)} (trying again)")
            time.sleep(wait_s)
        damage = find_damage(list(damage), record["files"])


def explain(error: Exception) -> str:
    """What is wrong and what the user can do."""
    response = getattr(error, "response", getattr(error.__cause__, "response", None))
    if response is not None:
        return f"{ENDPOINT} answers {response.status_code}: {FIXES.get(response.status_code, 'start again in a while')}"
    if (number := getattr(error, "errno", None)) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space in {FINEWEB_FOLDER} ({error.strerror}); make room or ask for fewer shards"
    if number is not None or isinstance(error, ValueError):
        return str(error)
    if type(error) is OSError:  # the library's check of sizes, whose text has a signed address
        return f"{ENDPOINT} sends a file of another size than it lists; start again in a while"
    return f"no answer from {ENDPOINT} ({type(error).__name__}: {error}); check the network and HF_ENDPOINT"


def main(arguments: list[str]) -> int:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"cached_fineweb10B.py: {message}; see --help\n")
    parser.add_argument("num_shards", nargs="?", type=int, metavar="NUM_SHARDS", help="default: all")
    parser.add_argument("--revision", help="branch, tag or commit (default: the folder's, else main)")
    parser.add_argument("--check", action="store_true", help="fetch nothing; say for how many steps the shards last")
    options = parser.parse_args(arguments)
    there = max((shard_number(path.name) for path in FINEWEB_FOLDER.glob("*.bin")), default=0)
    count = options.num_shards if options.num_shards is not None else there if options.check else FINEWEB_SHARDS
    if not 0 <= count <= FINEWEB_SHARDS:
        parser.error(f"NUM_SHARDS is {count}; use 0 (only the validation shard) to {FINEWEB_SHARDS}")
    names = [f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1)]
    try:
        FINEWEB_FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"{FINEWEB_FOLDER}: comparing, once no other process fetches there")
        with FileLock(FINEWEB_FOLDER / ".lock"):
            bring(["fineweb_val_000000.bin", *names], options.revision, options.check)
    except Exception as error:  # as in `fetch`
        print(f"cached_fineweb10B.py: {' '.join(explain(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
