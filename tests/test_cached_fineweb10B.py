"""Fetching: data/cached_fineweb10B.py against a Hub on loopback that drops, lies, refuses and is slow, and against kill -9."""

import json
import multiprocessing
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, random_tokens, write_shard
from hub import COMMIT, serve

sys.path.insert(0, str(ROOT / "data"))

import cached_fineweb10B as fetcher  # noqa: E402

VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3, 4)]


def shard_bytes(folder, tokens, **bad):
    write_shard(folder / "shard", tokens, **bad)
    return (folder / "shard").read_bytes()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A validation shard and four training shards of different lengths: name -> bytes."""
    folder = tmp_path_factory.mktemp("shards")
    return {name: shard_bytes(folder, random_tokens(150_000 + 20_000 * seed, seed, vocab_size=50_257)) for seed, name in enumerate([VAL, *TRAIN])}


@pytest.fixture
def hub(shards):
    with serve(shards) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path, monkeypatch, hub):
    """Where the fetcher of this process puts shards, from the hub on loopback, without long waits."""
    monkeypatch.setattr(fetcher, "FOLDER", tmp_path / "data" / "fineweb10B")
    monkeypatch.setattr(fetcher.hub, "ENDPOINT", hub.url)
    monkeypatch.setattr(fetcher.hub, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(fetcher, "RETRY_AFTER_S", (0.01, 0.01, 0.01, 0.01))
    return tmp_path / "data" / "fineweb10B"


@pytest.fixture
def fetch(folder, capsys):
    """Runs the command in this process; returns (exit status, lines on standard error, lines on standard output)."""

    def run(*arguments):
        status = fetcher.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.err.splitlines(), captured.out.splitlines()

    return run


def there(folder):
    """The files under shards' names: name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.glob("fineweb_*")}


def assert_one_line(result, *fragments):
    status, errors, _ = result
    assert status == 2 and len(errors) == 1, errors
    for fragment in fragments:
        assert fragment in errors[0]


def file_requests(hub):
    return [path.rpartition("/")[2] for role, path, _ in hub.requests if role == "cdn"]


def unfinished_path(folder, hub, name):
    """Where the fetcher keeps what it has of a shard."""
    (folder / ".unfinished").mkdir(parents=True, exist_ok=True)
    sha256 = next(file["lfs"]["sha256"] for file in hub.listing(COMMIT)["siblings"] if file["rfilename"] == name)
    return folder / ".unfinished" / f"{name}.{sha256[:16]}"


# -----------------------------------------------------------------------------
# What is fetched


@pytest.mark.parametrize("arguments, names", [([2], [VAL, *TRAIN[:2]]), ([0], [VAL]), ([], [VAL, *TRAIN])])
def test_a_number_is_the_validation_shard_and_so_many_and_nothing_is_all(fetch, folder, shards, arguments, names):
    assert fetch(*arguments)[:2] == (0, [])
    assert there(folder) == {name: shards[name] for name in names}


def test_what_is_there_and_whole_needs_no_network(fetch, folder, hub):
    fetch(3)
    hub.requests.clear()
    assert fetch(3)[:2] == fetch(2)[:2] == (0, [])
    assert hub.requests == []


def test_a_larger_number_fetches_what_is_lacking(fetch, folder, hub, shards):
    fetch(1)
    hub.requests.clear()
    assert fetch(3)[0] == 0
    assert sorted(file_requests(hub)) == TRAIN[1:3] and len(there(folder)) == 4


def test_shards_that_were_there_before_are_kept_where_they_are_the_hubs(fetch, folder, hub, shards):
    """As after a fetch by the speedrun's own script."""
    folder.mkdir(parents=True)
    (folder / TRAIN[0]).write_bytes(shards[TRAIN[0]])
    assert fetch(2)[0] == 0
    assert sorted(file_requests(hub)) == [TRAIN[1], VAL]


@pytest.mark.parametrize("arguments, fragment", [
    ([5], "5 training shards asked for, but kjj0/fineweb10B-gpt2 has 4"),
    ([-1], "NUM_SHARDS is -1"),
    (["x"], "invalid int value: 'x'"),
    ([1, 2], "unrecognized arguments: 2"),
    (["--revison=x"], "unrecognized arguments: --revison=x"),
])
def test_a_mistake_on_the_command_line_is_one_line(fetch, hub, arguments, fragment):
    assert_one_line(fetch(*arguments), fragment)
    assert file_requests(hub) == []


def test_the_access_token_goes_to_the_hub_and_not_on_to_its_cdn(fetch, hub, monkeypatch):
    monkeypatch.setattr(fetcher, "build_hf_headers", lambda: {"authorization": "Bearer secret"})
    fetch(0)
    sent = {(role, headers.get("authorization") or headers.get("Authorization")) for role, path, headers in hub.requests if VAL in path}
    assert sent == {("hub", "Bearer secret"), ("cdn", None)}


def test_only_names_of_shards_are_taken_from_the_hub(fetch, folder, hub, shards, tmp_path):
    hub.files |= {"fineweb_train_../../escape.bin": shards[VAL], "fineweb_train_1.bin": shards[VAL], "README.md": b"text"}
    assert fetch()[0] == 0
    assert set(there(folder)) == set(shards) and not list(tmp_path.rglob("*escape*"))


# -----------------------------------------------------------------------------
# Revisions


def test_the_commit_is_recorded_and_later_calls_use_it(fetch, folder, hub, shards):
    fetch(1)
    record = json.loads((folder / "revision.json").read_text())
    assert (record["revision"], record["commit"]) == ("main", COMMIT)
    hub.commits["main"] = "another" + 33 * "0"
    hub.requests.clear()
    assert fetch(2)[0] == 0
    assert {path.split("/")[-2] for role, path, _ in hub.requests if role == "hub"} == {COMMIT}


def test_another_revision_is_another_commit(fetch, folder, hub):
    hub.commits["old"] = "01d" + 37 * "0"
    assert fetch(0, "--revision", "old")[0] == 0
    assert json.loads((folder / "revision.json").read_text())["commit"] == hub.commits["old"]


@pytest.mark.parametrize("revision, taken", [("main", True), (COMMIT, True), ("other", False)])
def test_a_folder_takes_one_revision_only(fetch, folder, hub, revision, taken):
    hub.commits["other"] = "0" * 40
    fetch(0)
    result = fetch(1, "--revision", revision)
    if taken:
        assert result[0] == 0
    else:
        assert_one_line(result, "--revision other", "holds revision main", "move the folder away")
        assert set(there(folder)) == {VAL}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": []}', '{"revision": "main", "commit": "x", "repository": "y", "files": {"fineweb_train_000001.bin": 3}}', '{"revision": "main", "commit": "x", "repository": "y", "files": {}}', "Infinity", 100_000 * "["])
def test_a_damaged_record_is_named(fetch, folder, text):
    fetch(0)
    (folder / "revision.json").write_text(text)
    assert_one_line(fetch(0), "revision.json: not a record that can be read", "remove it")


# -----------------------------------------------------------------------------
# What arrives damaged or not at all


@pytest.mark.parametrize("drops", [1, 3, 20])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(fetch, folder, hub, shards, drops):
    hub.faults.drop_after, hub.faults.drops = 10_000, drops
    assert fetch(1)[:2] == (0, [])
    assert there(folder) == {name: shards[name] for name in (VAL, TRAIN[0])}
    assert hub.sent == {name: len(shards[name]) for name in (VAL, TRAIN[0])}
    assert len(file_requests(hub)) == 2 + drops


def test_a_later_call_goes_on_with_what_an_earlier_one_left(fetch, folder, hub, shards):
    unfinished_path(folder, hub, VAL).write_bytes(shards[VAL][:100_000])
    assert fetch(0)[0] == 0
    assert there(folder) == {VAL: shards[VAL]} and hub.sent == {VAL: len(shards[VAL]) - 100_000}


def test_a_server_that_sends_all_when_asked_for_a_part(fetch, folder, hub, shards):
    hub.faults.ignore_range = True
    unfinished_path(folder, hub, VAL).write_bytes(shards[VAL][:100_000])
    assert fetch(0)[0] == 0
    assert there(folder) == {VAL: shards[VAL]}


@pytest.mark.parametrize("left", [lambda b: b[:50_000] + b"x" + b[50_001:100_000], lambda b: b[:-1] + b"x", lambda b: b + b"x"])
def test_what_an_earlier_call_left_is_fetched_anew_where_it_is_damaged(fetch, folder, hub, shards, left):
    unfinished_path(folder, hub, VAL).write_bytes(left(shards[VAL]))
    assert fetch(0)[:2] == (0, [])
    assert there(folder) == {VAL: shards[VAL]}


BAD_COPIES = {
    "truncated": lambda b: b[: len(b) // 2],
    "one byte longer": lambda b: b + b"x",
    "one bit wrong": lambda b: b[:70_000] + bytes([b[70_000] ^ 1]) + b[70_001:],
    "empty": lambda b: b"",
}


@pytest.mark.parametrize("bad", BAD_COPIES.values(), ids=BAD_COPIES)
def test_a_shard_that_is_damaged_on_the_way_is_fetched_twice_then_named(fetch, folder, hub, shards, bad):
    """The other shards are had all the same."""
    hub.faults.serve[TRAIN[0]] = bad(shards[TRAIN[0]])
    assert_one_line(fetch(2), f"{TRAIN[0]}: fetched twice and damaged each time")
    assert there(folder) == {name: shards[name] for name in (VAL, TRAIN[1])}
    assert file_requests(hub).count(TRAIN[0]) == 2
    hub.faults.serve.clear()
    assert fetch(2)[0] == 0 and there(folder)[TRAIN[0]] == shards[TRAIN[0]]


@pytest.mark.parametrize("bad", BAD_COPIES.values(), ids=BAD_COPIES)
def test_a_shard_that_is_damaged_on_disk_later_is_fetched_again(fetch, folder, hub, shards, bad):
    fetch(2)
    (folder / TRAIN[1]).write_bytes(bad(shards[TRAIN[1]]))
    hub.requests.clear()
    status, errors, lines = fetch(2)
    assert (status, errors) == (0, []) and any(line.startswith(f"{TRAIN[1]}: ") and "fetched again" in line for line in lines)
    assert file_requests(hub) == [TRAIN[1]] and there(folder)[TRAIN[1]] == shards[TRAIN[1]]


@pytest.mark.parametrize("bad, fragment", [
    (dict(magic=1), "magic number 1"),
    (dict(version=2), "version 2"),
    (dict(count=7), "wrong length"),
    (dict(tokens=np.full(1000, 50_257)), "token id 50257"),
])
def test_a_file_that_is_the_hubs_and_yet_no_shard_is_named(fetch, folder, hub, tmp_path, bad, fragment):
    hub.files[TRAIN[0]] = shard_bytes(tmp_path, **{"tokens": np.zeros(1000)} | bad)
    assert_one_line(fetch(1), TRAIN[0], fragment)
    assert set(there(folder)) == {VAL}


# -----------------------------------------------------------------------------
# What the Hub refuses


@pytest.mark.parametrize("path", ["/api/datasets/", "/datasets/", "/blobs/"])
@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_server_that_is_busy_twice_is_asked_a_third_time(fetch, folder, hub, shards, path, status):
    hub.faults.status[path] = [status, status]
    assert fetch(0)[:2] == (0, [])
    assert there(folder) == {VAL: shards[VAL]}


@pytest.mark.parametrize("path", ["/api/datasets/", "/datasets/", "/blobs/"])
@pytest.mark.parametrize("status, tries, fragments", [
    (401, 1, ["401", "no access", "hf auth login"]),
    (403, 1, ["403", "no access", "HF_TOKEN"]),
    (404, 1, ["404", "no such dataset, revision or file", "HF_ENDPOINT"]),
    (503, 5, ["503", "wait a while", "start again"]),
])
def test_what_fails_for_good_is_one_line(fetch, folder, hub, path, status, tries, fragments):
    hub.faults.status[path] = [status, None]
    assert_one_line(result := fetch(0), *fragments)
    assert "secret" not in result[1][0]
    assert len([p for _, p, _ in hub.requests if p.startswith(path)]) == tries and there(folder) == {}


def test_no_such_revision(fetch):
    assert_one_line(fetch(1, "--revision", "nowhere"), "404", "nowhere", "--revision")


def test_no_network(fetch, monkeypatch):
    monkeypatch.setattr(fetcher.hub, "ENDPOINT", "http://127.0.0.1:9")
    assert_one_line(fetch(1), "no answer from http://127.0.0.1:9", "check the network")


def test_an_answer_that_is_not_the_hubs(fetch, hub):
    hub.faults.portal = True
    assert_one_line(fetch(1), f"{hub.url} does not answer as the Hub does", "HF_ENDPOINT")


def test_a_page_to_log_in_on_in_the_middle_costs_nothing_that_was_received(fetch, folder, hub, shards):
    fetch(0)
    path = unfinished_path(folder, hub, TRAIN[0])
    path.write_bytes(shards[TRAIN[0]][:90_000])
    hub.faults.portal = True
    assert_one_line(fetch(1), "does not answer as the Hub does")
    assert path.read_bytes() == shards[TRAIN[0]][:90_000]


def test_more_than_the_shard_is_not_received(fetch, hub, shards):
    hub.faults.serve[VAL] = shards[VAL] + bytes(50_000_000)
    assert_one_line(fetch(0), "damaged each time")
    assert hub.sent[VAL] < 20_000_000


def test_a_token_that_is_none(fetch, monkeypatch):
    monkeypatch.setattr(fetcher.HfApi, "dataset_info", lambda *_, **__: "hf_é".encode("ascii"))
    assert_one_line(fetch(1), "HF_TOKEN has characters")


def test_an_endpoint_without_http_is_not_tried_again(fetch, monkeypatch):
    monkeypatch.setattr(fetcher.hub, "ENDPOINT", "hub.example")
    monkeypatch.setattr(fetcher, "RETRY_AFTER_S", (60,))
    assert_one_line(fetch(1), "UnsupportedProtocol", "HF_ENDPOINT")


def test_a_shard_that_cannot_be_read_is_fetched_again(fetch, folder, hub, shards, monkeypatch):
    """As where the disk has lost a sector."""
    fetch(1)
    digest, path = fetcher.hashlib.file_digest, folder / TRAIN[0]
    bad = path.stat().st_ino

    def file_digest(file, name):
        if os.fstat(file.fileno()).st_ino == bad and len(hub.requests) == 0:
            raise OSError(5, "Input/output error")
        return digest(file, name)

    hub.requests.clear()
    monkeypatch.setattr(fetcher.hashlib, "file_digest", file_digest)
    status, errors, lines = fetch(1)
    assert f"{TRAIN[0]}: cannot be read (Input/output error); it is fetched again" in lines


def test_a_whole_folder_needs_no_writing(fetch, folder):
    fetch(1)
    shutil.rmtree(folder / ".unfinished")
    assert fetch(1)[0] == 0 and not (folder / ".unfinished").exists()


def test_no_space_is_seen_before_anything_is_fetched(fetch, hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_one_line(fetch(2), "no space", "are free", "fewer shards")
    assert file_requests(hub) == []


def test_a_disk_that_fills_up_while_it_is_written(fetch, folder, hub):
    """/dev/full answers each write as a full disk does."""
    unfinished_path(folder, hub, VAL).symlink_to("/dev/full")
    assert_one_line(fetch(0), "no space", "No space left on device", "start again")
    assert there(folder) == {}


def test_a_folder_that_cannot_be_made(fetch, folder):
    folder.parent.mkdir()
    folder.symlink_to("/nowhere/at/all")
    assert_one_line(fetch(0), str(folder))


# -----------------------------------------------------------------------------
# --check


def test_check_says_what_is_there_and_what_it_is_good_for(fetch, hub):
    """A step of the baseline has 524,288 tokens, more than each of these."""
    fetch(3)
    hub.requests.clear()
    status, errors, lines = fetch("--check")
    assert (status, errors, hub.requests) == (0, [], [])
    assert lines[-2:] == ["training: 3 shards, 570,000 tokens, good for 0 steps of the baseline", "validation: 1 shard, 150,000 tokens"]
    assert COMMIT in lines[0]


def test_check_counts_steps_as_the_stream_cuts_them(fetch, hub, tmp_path):
    hub.files[TRAIN[0]] = hub.files[TRAIN[1]] = shard_bytes(tmp_path, np.zeros(2 * 524_288 + 2))
    fetch(2)
    assert "good for 4 steps of the baseline" in fetch("--check")[2][-2]


@pytest.mark.parametrize("bad", BAD_COPIES.values(), ids=BAD_COPIES)
def test_check_names_a_damaged_shard_and_leaves_it(fetch, folder, shards, bad):
    fetch(2)
    (folder / TRAIN[0]).write_bytes(bad(shards[TRAIN[0]]))
    result = fetch("--check")
    assert_one_line(result, f"{TRAIN[0]}: ", "fetch it again")
    assert "training: 1 shard," in result[2][-2] and there(folder)[TRAIN[0]] == bad(shards[TRAIN[0]])


@pytest.mark.parametrize("arguments, missing", [(["--check"], [TRAIN[0], TRAIN[1]]), (["--check", "4"], [TRAIN[0], TRAIN[1], TRAIN[3]])])
def test_check_names_what_is_missing(fetch, folder, arguments, missing):
    fetch(3)
    (folder / TRAIN[0]).unlink()
    (folder / TRAIN[1]).unlink()
    status, errors, _ = fetch(*arguments)
    assert status == 2 and [line.split(": ")[1] for line in errors] == missing and all("missing" in line for line in errors)


def test_check_names_what_is_of_another_commit(fetch, folder, shards):
    fetch(1)
    (folder / "fineweb_train_000099.bin").write_bytes(shards[VAL])
    assert_one_line(fetch("--check"), "fineweb_train_000099.bin", "not one of this commit's")


def test_check_without_a_record_looks_at_headers_and_ids(fetch, folder, tmp_path):
    folder.mkdir(parents=True)
    write_shard(folder / TRAIN[0], np.zeros(1000))
    status, errors, lines = fetch("--check")
    assert (status, errors) == (0, []) and "no revision.json" in lines[0] and "no SHA-256" in lines[0]
    write_shard(folder / TRAIN[0], np.zeros(1000), magic=5)
    assert_one_line(fetch("--check"), TRAIN[0], "magic number 5")


def test_check_names_a_link_to_nowhere(fetch, folder):
    fetch(1)
    (folder / TRAIN[0]).unlink()
    (folder / TRAIN[0]).symlink_to("/nowhere")
    assert_one_line(fetch("--check"), TRAIN[0], "cannot be read")


def test_check_and_revision_exclude_each_other(fetch):
    assert_one_line(fetch("--check", "--revision", "x"), "leave --revision out")


def test_check_where_nothing_is(fetch, folder):
    assert_one_line(fetch("--check"), "no shards", "python data/cached_fineweb10B.py NUM_SHARDS")
    assert not folder.exists()


# -----------------------------------------------------------------------------
# As a process: killed, interrupted, twice at once, on a terminal


@pytest.fixture
def clone(tmp_path, hub):
    """A copy of the repository's files with no data, and the environment in which its fetcher meets the hub on loopback."""
    (tmp_path / "clone" / "data").mkdir(parents=True)
    for file in ("train_gpt_medium.py", "run.sh", "requirements.txt", "data/cached_fineweb10B.py", "data/local_text.py"):
        shutil.copy(ROOT / file, tmp_path / "clone" / file)
    return tmp_path / "clone", os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}


def start(clone, *arguments, **options):
    root, env = clone
    return subprocess.Popen([sys.executable, "data/cached_fineweb10B.py", *map(str, arguments)], cwd=root, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def fetch_in_child(url, folder):
    fetcher.FOLDER, fetcher.hub.ENDPOINT = folder, url
    fetcher.hub.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    sys.exit(fetcher.main([]))


@pytest.fixture
def in_child(hub, folder, monkeypatch):
    """Runs the fetcher in a process of its own, ended by kill -9 after so many seconds; returns its exit code."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_cached_fineweb10B"])

    def run(seconds):
        process = context.Process(target=fetch_in_child, args=(hub.url, folder))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    return run


@pytest.mark.slow
def test_killed_while_it_receives_it_goes_on_where_it_was(in_child, hub, folder, shards):
    """kill -9 twenty times; nothing that was received is received again, but for what was on its way in each connection."""
    hub.faults.rate, rng = 40_000, random.Random(0)
    for _ in range(20):
        in_child(rng.uniform(0, 0.8))
        assert all(content == shards[name] for name, content in there(folder).items())
    assert sum(hub.sent.values()) > 100_000
    hub.faults.rate = None
    assert in_child(60) == 0
    assert there(folder) == shards
    assert list((folder / ".unfinished").iterdir()) == []
    assert sum(hub.sent.values()) <= sum(map(len, shards.values())) + 20 * fetcher.START_LANES * 40_000 // 10


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_no_bad_file_under_a_shards_name(in_child, folder, shards):
    """kill -9 sixty times, from its start to after its end, with a shard lacking and one damaged before each."""
    began = time.monotonic()
    assert in_child(60) == 0
    undisturbed = time.monotonic() - began
    rng, codes, damaged_by_us = random.Random(0), [], set()
    for _ in range(60):
        lacking, damaged = rng.sample(TRAIN, 2)
        (folder / lacking).unlink(missing_ok=True)
        if (folder / damaged).exists():
            (folder / damaged).write_bytes(shards[damaged][:-1])
            damaged_by_us.add(damaged)
        codes.append(in_child(rng.uniform(0, 1.3 * undisturbed)))
        bad = {name for name, content in there(folder).items() if content != shards[name]}
        assert bad <= damaged_by_us and all(there(folder)[name] == shards[name][:-1] for name in bad)
        damaged_by_us = bad
    assert 0 < codes.count(0) < 60
    assert in_child(60) == 0 and there(folder) == shards


@pytest.mark.slow
@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_interrupted_it_ends_at_once_and_goes_on_later(clone, hub, shards, stop, status):
    folder = clone[0] / "data" / "fineweb10B"
    hub.faults.rate = 20_000
    process = start(clone, 1)
    wait_for(lambda: sum(hub.sent.values()) > 10_000)
    process.send_signal(stop)
    asked_at = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status and time.monotonic() - asked_at < 3
    assert "Traceback" not in errors and there(folder) == {}
    hub.faults.rate = None
    process = start(clone, 1)
    assert process.communicate()[1] == "" and there(folder) == {name: shards[name] for name in (VAL, TRAIN[0])}


@pytest.mark.slow
def test_several_at_once_share_the_work(clone, hub, shards):
    """Each shard crosses the network once, and every process ends well, when all are there."""
    hub.faults.rate = 100_000
    processes = [start(clone) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    assert there(clone[0] / "data" / "fineweb10B") == shards
    assert hub.sent == {name: len(content) for name, content in shards.items()}


@pytest.mark.slow
def test_several_at_once_do_no_damage_where_the_disk_has_no_locks(clone, hub, shards):
    """Each fetches for itself."""
    folder = clone[0] / "data" / "fineweb10B"
    hub.faults.rate = 300_000
    script = clone[0] / "data" / "cached_fineweb10B.py"
    text = script.read_text()
    no_locks = "import fcntl\n\n\ndef no_locks(*_):\n    raise OSError(38, 'no locks')\n\n\nfcntl.flock = no_locks\n"
    assert "import fcntl\n" in text
    script.write_text(text.replace("import fcntl\n", no_locks, 1))
    processes = [start(clone) for _ in range(3)]
    while any(process.poll() is None for process in processes):
        assert all(content == shards[name] for name, content in there(folder).items())
        time.sleep(0.01)
    assert [(process.returncode, process.communicate()[1]) for process in processes] == 3 * [(0, "")]
    assert there(folder) == shards


@pytest.mark.slow
def test_a_line_a_shard_where_the_output_is_no_terminal(clone, hub, shards):
    hub.faults.rate = 300_000
    output, errors = start(clone, 2).communicate()
    lines = [line for line in output.splitlines() if line.startswith("fineweb_")]
    assert errors == "" and len(lines) == 3 and {line.split(":")[0] for line in lines} == {VAL, *TRAIN[:2]}
    for number, line in enumerate(lines, 1):
        assert f"{number} of 3" in line and "MB/s" in line and line.endswith(" s left")


@pytest.mark.slow
def test_one_bar_for_the_whole_job_on_a_terminal(clone, hub):
    root, env = clone
    hub.faults.rate = 100_000
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    process = subprocess.Popen([sys.executable, "data/cached_fineweb10B.py", "2"], cwd=root, env=env, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    while True:
        try:
            output += os.read(leader, 65536)
        except OSError:  # how a terminal says that the other side has closed it
            break
    assert process.wait() == 0
    text = output.decode()
    assert "3 shards:" in text and "B/s" in text and "100%" in text and "fineweb_train" not in text


@pytest.mark.slow
def test_run_sh_fetches_what_a_config_needs_and_trains(clone, hub):
    """The shards on loopback are short, so the config's steps are too; a second run fetches nothing."""
    root, env = clone
    env = env | {"PATH": f"{os.path.dirname(sys.executable)}:{env['PATH']}"}
    keys = dict(num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=128, val_tokens=128, sequences_per_step=1, num_iterations=1, warmup_steps=0)
    (root / "short.toml").write_text("\n".join(f"{name} = {value}" for name, value in keys.items()))

    def run_sh(*arguments):
        return subprocess.run([root / "run.sh", "short.toml", *arguments], cwd=root, env=env, capture_output=True, text=True)

    only_check = run_sh("--check")
    assert only_check.returncode == 2 and "python data/cached_fineweb10B.py 1" in only_check.stderr and hub.requests == []
    first = run_sh()
    assert first.returncode == 0 and "step:1/1 val_loss:" in first.stdout, first.stderr
    assert set(there(root / "data" / "fineweb10B")) == {VAL, TRAIN[0]}
    hub.requests.clear()
    assert run_sh().returncode == 0 and hub.requests == []


# -----------------------------------------------------------------------------
# Side by side


@pytest.mark.parametrize("rate_of, lanes", [
    (lambda lanes: 50e6 * lanes, 16),
    (lambda lanes: 200e6, 4),
    (lambda lanes: min(50e6 * lanes, 420e6), 8),
    (lambda lanes: 50e6 * min(lanes, 8) - 10e6 * max(lanes - 8, 0), 8),
])
def test_lanes_are_doubled_as_long_as_the_rate_gains_by_it(rate_of, lanes):
    """A minute of a network with this rate (bytes a second) at so many lanes, each of which takes a while to come up to it."""
    ramp, received, at_lanes = fetcher.Ramp(0.0), 0.0, 0
    for now in np.arange(0, 60, 0.2):
        at_lanes = ramp.lanes if ramp.lanes == ramp.observe(now, int(received)) else 0
        received += 0.2 * rate_of(at_lanes or ramp.lanes // 2)
    assert (ramp.lanes, ramp.settled) == (lanes, True)


@pytest.mark.slow
@pytest.mark.parametrize("limit, rate, lanes", [("rate", 1_000_000, 16), ("total_rate", 10_000_000, 8)])
def test_more_connections_only_where_they_bring_more(fetch, hub, shards, monkeypatch, tmp_path, limit, rate, lanes):
    """Against a server that limits each connection, and one that limits all of them together (so that the first doubling brings nothing)."""
    large = shard_bytes(tmp_path, random_tokens(1_000_000, seed=9, vocab_size=50_257))
    hub.files |= {f"fineweb_train_{number:06d}.bin": large for number in range(5, 35)}
    setattr(hub.faults, limit, rate)
    monkeypatch.setattr(fetcher, "RAMP_S", 0.6)
    assert fetch()[0] == 0
    assert hub.most_at_once == lanes
