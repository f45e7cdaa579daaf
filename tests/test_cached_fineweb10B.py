"""Fetching: data/cached_fineweb10B.py against a Hub on loopback that drops, lies, refuses and is slow, and kill -9."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from hub import COMMIT, serve

from data import cached_fineweb10B as fetcher
from data.shards import write_shard

VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3, 4)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A validation shard and four training shards of different lengths: name -> bytes."""
    path, rng = tmp_path_factory.mktemp("shards") / "shard", np.random.default_rng(0)
    content = {}
    for number, name in enumerate([VAL, *TRAIN]):
        write_shard(path, rng.integers(0, 50_257, 150_000 + 20_000 * number))
        content[name] = path.read_bytes()
    return content


@pytest.fixture
def hub(shards):
    with serve(shards) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path, monkeypatch, hub):
    """Where the fetcher of this process puts shards, from the hub on loopback, without long waits."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(fetcher, "ENDPOINT", hub.url)
    monkeypatch.setattr(fetcher, "FINEWEB_FOLDER", tmp_path / "fineweb10B")
    monkeypatch.setattr(fetcher, "FINEWEB_SHARDS", 4)
    return tmp_path / "fineweb10B"


@pytest.fixture
def fetch(folder, capsys):
    """Runs the command in this process; returns (exit status, its lines on standard error, on standard output)."""

    def run(*arguments):
        try:
            status = fetcher.main([*map(str, arguments)])
        except SystemExit as error:  # argparse's
            status = error.code
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("cached_fineweb10B.py: ")]
        return status, errors, captured.out.splitlines()

    return run


def there(folder):
    """The files under shards' names: name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.glob("fineweb_*")}


def assert_one_line(result, *fragments):
    status, errors, _ = result
    assert status == 2 and len(errors) == 1, errors
    assert "secret" not in errors[0]  # the signature in the CDN's addresses
    for fragment in fragments:
        assert fragment in errors[0]


def fetched(hub):
    """The files asked of the CDN."""
    return sorted(path.rpartition("/")[2] for role, path in hub.requests if role == "cdn")


# -----------------------------------------------------------------------------
# What is fetched


@pytest.mark.parametrize("arguments, names", [([2], [VAL, *TRAIN[:2]]), ([0], [VAL]), ([], [VAL, *TRAIN])])
def test_a_number_is_the_validation_shard_and_that_many_and_nothing_is_all(fetch, folder, shards, arguments, names):
    assert fetch(*arguments)[:2] == (0, [])
    assert there(folder) == {name: shards[name] for name in names}


def test_what_is_there_and_whole_needs_no_network(fetch, hub):
    fetch(3)
    hub.requests.clear()
    assert fetch(3)[:2] == fetch(2)[:2] == fetch("--check")[:2] == (0, [])
    assert hub.requests == []


def test_only_what_is_missing_is_fetched(fetch, folder, hub, shards):
    """Also beside shards that were there before the record, as after a fetch by the speedrun's own script."""
    folder.mkdir()
    (folder / TRAIN[0]).write_bytes(shards[TRAIN[0]])
    assert fetch(2)[0] == 0 and fetched(hub) == [TRAIN[1], VAL]
    hub.requests.clear()
    assert fetch(3)[0] == 0 and fetched(hub) == [TRAIN[2]]


@pytest.mark.parametrize("arguments, fragment", [
    ([5], "NUM_SHARDS is 5; use 0 (only the validation shard) to 4"),
    ([-1], "NUM_SHARDS is -1"),
    (["--revison=x"], "unrecognized arguments: --revison=x"),
])
def test_a_mistake_on_the_command_line_is_one_line(fetch, hub, arguments, fragment):
    assert_one_line(fetch(*arguments), fragment)
    assert hub.requests == []


# -----------------------------------------------------------------------------
# Revisions


def test_the_commit_is_recorded_and_later_calls_use_it(fetch, folder, hub):
    assert fetch(0)[0] == 0 and json.loads((folder / "revision.json").read_text())["commit"] == COMMIT
    hub.commits["main"] = 40 * "b"
    hub.requests.clear()
    assert fetch(1)[0] == fetch(2, "--revision", COMMIT)[0] == fetch(3, "--revision", "main")[0] == 0
    assert hub.requests and not any("main" in path or 40 * "b" in path for _, path in hub.requests)


def test_a_folder_takes_one_revision_only(fetch, folder, hub):
    hub.commits["other"] = 40 * "0"
    assert fetch(0, "--revision", "other")[0] == 0
    assert_one_line(fetch(2, "--revision", "main"), "--revision main", "has revision other", "move the folder away")
    assert_one_line(fetch(2, "--revision", "nowhere"), "has revision other")
    assert set(there(folder)) == {VAL}


def test_a_damaged_record_is_asked_for_again(fetch, folder):
    fetch(1)
    (folder / "revision.json").write_text('{"revision": "ma')
    assert fetch(1)[:2] == (0, []) and len(there(folder)) == 2
    assert json.loads((folder / "revision.json").read_text())["commit"] == COMMIT


def test_a_commit_without_a_shard_is_named(fetch, hub):
    del hub.files[TRAIN[1]]
    assert_one_line(fetch(2), f"has no {TRAIN[1]} in commit {COMMIT}", "--revision")


# -----------------------------------------------------------------------------
# What is damaged, refused or full

BAD_COPIES = {
    "truncated": lambda content: content[: len(content) // 2],
    "one byte longer": lambda content: content + b"x",
    "one bit wrong": lambda content: content[:70_000] + bytes([content[70_000] ^ 1]) + content[70_001:],
}


@pytest.mark.parametrize("bad", BAD_COPIES.values(), ids=BAD_COPIES)
def test_a_shard_that_is_damaged_on_disk_is_fetched_again(fetch, folder, hub, shards, bad):
    fetch(2)
    (folder / TRAIN[1]).write_bytes(bad(shards[TRAIN[1]]))
    hub.requests.clear()
    assert_one_line(fetch("--check"), f"{TRAIN[1]}: ", "python data/cached_fineweb10B.py 2")
    assert there(folder)[TRAIN[1]] == bad(shards[TRAIN[1]]) and hub.requests == []
    status, _, lines = fetch(2)
    assert status == 0 and any(line.startswith(f"{TRAIN[1]}: ") for line in lines)
    assert fetched(hub) == [TRAIN[1]] and there(folder)[TRAIN[1]] == shards[TRAIN[1]]


@pytest.mark.parametrize("bad", BAD_COPIES.values(), ids=BAD_COPIES)
def test_a_shard_that_arrives_damaged_is_never_under_its_name(fetch, folder, hub, shards, bad):
    hub.serve[TRAIN[0]] = bad(shards[TRAIN[0]])
    assert_one_line(fetch(2))
    assert there(folder) == {name: shards[name] for name in (VAL, TRAIN[1])}
    assert fetched(hub).count(TRAIN[0]) == len(fetcher.RETRY_AFTER_S)
    hub.serve.clear()
    assert fetch(2)[0] == 0 and there(folder)[TRAIN[0]] == shards[TRAIN[0]]


@pytest.mark.parametrize("path, status", [("/datasets/", 500), ("/datasets/", 429), ("/blobs/", 503)])
def test_a_server_that_is_busy_twice_is_asked_again(fetch, folder, hub, shards, path, status):
    hub.status[path] = [status, status]
    assert fetch(0)[:2] == (0, [])
    assert there(folder) == {VAL: shards[VAL]}


@pytest.mark.parametrize("path, status, fragments", [
    ("/api/datasets/", 401, ["401", "no access", "hf auth login"]),
    ("/datasets/", 403, ["403", "no access", "HF_TOKEN"]),
    ("/datasets/", 404, ["404", "no such dataset, revision or file", "HF_ENDPOINT"]),
    ("/api/datasets/", 503, ["503", "start again"]),
    ("/blobs/", 403, ["403", "no access", "HF_TOKEN"]),
    ("/blobs/", 503, ["503", "start again"]),
])
def test_what_fails_for_good_is_one_line(fetch, folder, hub, path, status, fragments):
    hub.status[path] = [status, None]
    assert_one_line(fetch(0), *fragments)
    assert there(folder) == {}


def test_no_network(fetch, monkeypatch):
    monkeypatch.setattr(fetcher, "ENDPOINT", "http://127.0.0.1:9")
    assert_one_line(fetch(1), "no answer from http://127.0.0.1:9", "check the network")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_page_to_log_in_on_is_not_the_hub(fetch, folder, hub, is_first):
    assert is_first or fetch(0)[0] == 0
    shards, hub.portal = there(folder), True
    assert_one_line(fetch(1), f"{hub.url} does not answer as the Hub does", "HF_ENDPOINT")
    assert there(folder) == shards


def test_a_folder_that_cannot_be_made(fetch, folder):
    folder.symlink_to("/nowhere/at/all")
    assert_one_line(fetch(0), str(folder))


# -----------------------------------------------------------------------------
# --check


def test_check_counts_steps_as_the_stream_cuts_them(fetch, hub, tmp_path):
    """A step of the baseline has 524,288 tokens."""
    write_shard(tmp_path / "shard", np.zeros(2 * 524_288 + 2))
    hub.files[TRAIN[0]] = hub.files[TRAIN[1]] = (tmp_path / "shard").read_bytes()
    fetch(2)
    status, errors, lines = fetch("--check")
    assert (status, errors) == (0, []) and f"commit {COMMIT}, 3 of 3 shards whole, good for 4 steps of" in lines[-1]


@pytest.mark.parametrize("arguments, missing", [([], TRAIN[:2]), ([4], [TRAIN[0], TRAIN[1], TRAIN[3]])])
def test_check_names_what_is_missing(fetch, folder, arguments, missing):
    fetch(3)
    for name in TRAIN[:2]:
        (folder / name).unlink()
    result = fetch("--check", *arguments)
    assert_one_line(result, *missing, "python data/cached_fineweb10B.py")
    assert TRAIN[2] not in result[1][0]


# -----------------------------------------------------------------------------
# As a process: killed, interrupted, twice at once, without space


@pytest.fixture
def start(tmp_path, hub):
    """Starts the fetcher of a copy of data/ that has no shards yet; returns the process, with its `folder`."""
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*/", "fineweb10B", "local_text"))
    (tmp_path / "logs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "logs" / "log_file.py", tmp_path / "logs")
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}

    def start(*arguments, **options):
        command = [sys.executable, "data/cached_fineweb10B.py", *map(str, arguments)]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, **options)
        process.folder = tmp_path / "data" / "fineweb10B"
        return process

    return start


def wait_until_sent(hub, process, size):
    while sum(hub.sent.values()) < size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_at_any_moment_it_leaves_no_bad_shard_and_no_rest(start, hub, shards, number, times):
    """It does not wait for what is being fetched. A later call brings the rest."""
    hub.rate, rng = 200_000, random.Random(0)
    for _ in range(times):
        process, before = start(4), sum(hub.sent.values())
        missing = sum(len(content) for name, content in shards.items() if name not in there(process.folder))
        wait_until_sent(hub, process, before + rng.randrange(1, missing * 3 // 4))
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in errors
        assert number == signal.SIGKILL or errors.endswith("cached_fineweb10B.py: interrupted\n")
        assert there(process.folder).items() < shards.items()
    hub.rate = None
    process = start(4)
    process.communicate()
    assert process.returncode == 0 and there(process.folder) == shards
    assert list(process.folder.rglob("*.incomplete")) == []


@pytest.mark.slow
def test_of_two_at_once_one_fetches(start, hub, shards):
    hub.rate = 400_000
    processes = [start(4) for _ in range(2)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert there(process.folder) == shards
    assert hub.sent == {name: len(content) for name, content in shards.items()}


@pytest.mark.slow
def test_a_full_disk_is_one_line(start, hub):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    process = start(1, preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 2 and "Traceback" not in errors and there(process.folder) == {}
    assert "no space in" in errors.splitlines()[-1] and "fewer shards" in errors.splitlines()[-1]
