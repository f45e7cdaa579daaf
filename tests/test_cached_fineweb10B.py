"""data/cached_fineweb10B.py against a Hub on loopback that sends damaged files, refuses and is slow, and kill -9."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data import cached_fineweb10B as fetcher
from data.shards import write_shard

VAL, *TRAIN = NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3, 4))]
REPOSITORY, COMMIT = "kjj0/fineweb10B-gpt2", "c0ffee" + 34 * "0"
PATHS = re.compile(rf"/(?:api/)?datasets/{REPOSITORY}/(revision|tree|resolve)/(?:main|[0-9a-f]{{40}})/?.*|/(blobs)/.*")


class Hub(ThreadingHTTPServer):
    """The part of the Hub that fetching a dataset needs, with faults to order: a test changes the attributes.

    It lists one dataset with sizes and SHA-256, and redirects requests for files to another host name, as to a CDN.
    """
    daemon_threads = True
    handle_error = lambda *_: None  # of killed clients
    commit = COMMIT
    rate = None  # bytes per second of one connection

    def __init__(self, files, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.requests, self.sent = f"http://127.0.0.1:{self.server_port}", [], defaultdict(int)
        self.files, self.served, self.folder = files, {}, folder  # name -> bytes: listed, sent instead; the client's
        self.status = {}  # beginning of a path -> status of every answer, a page in HTML as for a login

    def fetched(self):
        return sorted(path.removeprefix("/blobs/") for path in self.requests if path.startswith("/blobs/"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

    def answer(self, status, body=b"", name=None, **headers):
        """Send an answer at the server's rate; add the bytes sent to those of the file `name`."""
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        size = self.server.rate // 20 if self.server.rate else 2**16
        for position in range(0, len(body) if self.command != "HEAD" else 0, size):
            time.sleep(size / self.server.rate if self.server.rate else 0)
            count = self.wfile.write(body[position : position + size])
            if name:
                self.server.sent[name] += count

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(path)
        found, name = PATHS.fullmatch(path), path.rpartition("/")[2]
        status = next((status for beginning, status in hub.status.items() if path.startswith(beginning)), None)
        hashes = {listed: hashlib.sha256(content).hexdigest() for listed, content in hub.files.items()}
        if status or not found:
            self.answer(status or 404, b"<html>please log in</html>", Content_Type="text/html")
        elif found[2]:
            self.answer(200, hub.served.get(name, hub.files[name]), name)
        elif found[1] == "resolve":
            self.answer(302, Location=f"http://localhost:{hub.server_port}/blobs/{name}?signature=secret",
                        X_Repo_Commit=hub.commit, X_Linked_Size=str(len(hub.files[name])), X_Linked_Etag=hashes[name])
        else:  # each entry has the names of both of the Hub's interfaces
            tree = [{"type": "file", "path": listed, "rfilename": listed, "size": len(content), "oid": 40 * "0",
                     "blobId": 40 * "0", "lfs": {"size": len(content), "oid": hashes[listed], "sha256": hashes[listed],
                                                 "pointerSize": 134}} for listed, content in hub.files.items()]
            info = {"id": REPOSITORY, "sha": hub.commit, "siblings": tree, "private": False, "tags": [], "downloads": 0}
            self.answer(200, json.dumps(tree if found[1] == "tree" else info).encode())

    do_HEAD = do_GET


def there(folder):
    return {path.name: path.read_bytes() for path in folder.glob("fineweb_*")}


@pytest.fixture
def hub(tmp_path):
    """A hub with shards of different lengths, and the `folder` where `fetch` and `start` put them."""
    for number, name in enumerate(NAMES):
        write_shard(tmp_path / name, np.random.default_rng(number).integers(0, 50_257, 150_000 + 20_000 * number))
    with Hub(there(tmp_path), tmp_path / "data" / "fineweb10B") as hub:
        threading.Thread(target=hub.serve_forever, args=[0.05], daemon=True).start()
        yield hub
        hub.shutdown()


@pytest.fixture
def fetch(hub, monkeypatch, capsys):
    """Run the command in this process; return its error line, "" for success, and its standard output."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between the library's retries
    def run(*arguments):
        for name, value in dict(ENDPOINT=hub.url, FINEWEB_FOLDER=hub.folder, TRAIN_NAMES=TRAIN).items():
            monkeypatch.setattr(fetcher, name, value)
        try:
            status = fetcher.main([*map(str, arguments)]) or 0
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("cached_fineweb10B.py: ")]
        assert (status, len(errors)) in ((0, 0), (2, 1)) and "secret" not in "".join(errors)  # no signed address
        return "".join(errors), captured.out
    return run


@pytest.mark.parametrize("arguments, names", [([2], NAMES[:3]), ([0], [VAL]), ([], NAMES)])
def test_a_number_means_the_validation_shard_and_that_many(fetch, hub, arguments, names):
    """None means all. A second call needs no network, nor does --check."""
    assert fetch(*arguments)[0] == "" and there(hub.folder) == {name: hub.files[name] for name in names}
    hub.requests.clear()
    assert fetch(*arguments)[0] == fetch("--check")[0] == "" and hub.requests == []


def test_only_missing_shards_are_fetched_and_from_the_recorded_commit(fetch, hub):
    """Also beside shards that are older than the record. A damaged record is asked for again."""
    hub.folder.mkdir(parents=True)
    (hub.folder / TRAIN[0]).write_bytes(hub.files[TRAIN[0]])
    (hub.folder / "revision.json").write_text('{"revision": "ma')
    assert fetch(2)[0] == "" and hub.fetched() == [TRAIN[1], VAL]
    assert json.loads((hub.folder / "revision.json").read_text())["commit"] == COMMIT
    hub.commit = 40 * "b"
    hub.requests.clear()
    assert fetch(3)[0] == "" and hub.fetched() == [TRAIN[2]] and not any("/main" in path for path in hub.requests)


@pytest.mark.parametrize("bad", [  # truncated, one byte longer, one bit wrong
    lambda content: content[: len(content) // 2], lambda content: content + b"x",
    lambda content: content[:70_000] + bytes([content[70_000] ^ 1]) + content[70_001:]])
def test_a_shard_damaged_on_disk_or_on_its_way_is_fetched_again(fetch, hub, bad):
    """--check names it and leaves it alone. One that arrives damaged does not keep its name."""
    hub.served[TRAIN[0]] = bad(hub.files[TRAIN[0]])
    assert fetch(2)[0] and TRAIN[0] not in there(hub.folder)
    hub.served.clear()
    assert fetch(2)[0] == "" and there(hub.folder) == {name: hub.files[name] for name in NAMES[:3]}
    (hub.folder / TRAIN[1]).write_bytes(bad(hub.files[TRAIN[1]]))
    hub.requests.clear()
    error, _ = fetch("--check")
    assert f"{TRAIN[1]}: " in error and error.endswith("SHA-256; fetch again: python data/cached_fineweb10B.py 2")
    assert there(hub.folder)[TRAIN[1]] == bad(hub.files[TRAIN[1]]) and hub.requests == []
    assert fetch(2)[0] == "" and hub.fetched() == [TRAIN[1]] and there(hub.folder)[TRAIN[1]] == hub.files[TRAIN[1]]


@pytest.mark.parametrize("fault, fragments", [
    (dict(status={"/api/datasets/": 401}), ["401", "no access", "hf auth login"]),
    (dict(status={"/datasets/": 403}), ["403", "no access", "HF_TOKEN"]),
    (dict(status={"/datasets/": 404}), ["404", "no such dataset, commit or file", "HF_ENDPOINT"]),
    (dict(status={"/api/datasets/": 503}), ["503", "rerun later"]),
    (dict(status={"/blobs/": 403}), ["403", "no access", "HF_TOKEN"]),
    (dict(status={"/blobs/": 503}), ["503", "rerun later"]),
    (dict(status={"/": 200}), ["no valid answer from http://127.0.0.1:", "HF_ENDPOINT"]),
    (dict(url="http://127.0.0.1:9"), ["no valid answer from http://127.0.0.1:9 (", "check the network"]),
    (dict(files={}), [f"has no {TRAIN[0]} in commit {COMMIT}; ask for fewer"]),
    (dict(folder=Path("/dev/null")), ["File exists: ", "/dev/null"])], ids=str)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_refusal_is_one_line(fetch, hub, fault, fragments, is_first):
    """At the first call and at a later one, which leaves the shards as they are."""
    if not is_first and "files" not in fault:
        fetch(0)
    vars(hub).update(fault)
    before, (error, _) = there(hub.folder), fetch(1)
    assert [fragment for fragment in fragments if fragment not in error] == [] and there(hub.folder) == before, error


def test_complete_shards_in_a_read_only_folder_need_no_lock_and_no_record(fetch, hub, monkeypatch):
    fetch(2)
    shutil.rmtree(hub.folder / ".cache")
    (hub.folder / ".lock").unlink()
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    for record in (True, False):
        record or (hub.folder / "revision.json").unlink()
        assert fetch(2)[0] == fetch("--check")[0] == "" and there(hub.folder) == {n: hub.files[n] for n in NAMES[:3]}
    assert "Permission denied; check space and permissions of" in fetch(3)[0]


@pytest.mark.parametrize("name, target", [(TRAIN[0], "/unmounted/shard"), (TRAIN[0], TRAIN[0]),
                                          ("revision.json", "revision.json")])
def test_a_file_that_cannot_be_read_is_named_and_stays(fetch, hub, name, target):
    """A link to a volume that is not mounted, or to itself. Nothing is fetched in its place."""
    fetch(2)
    (hub.folder / name).unlink()
    (hub.folder / name).symlink_to(target)
    hub.requests.clear()
    for arguments in (["--check"], [2], [1]):
        error, _ = fetch(*arguments)
        assert f"{name}: cannot be read: " in error and "; check its path, permissions and disk" in error
    assert (hub.folder / name).is_symlink() and hub.requests == []


@pytest.mark.parametrize("argument, fault", [
    (5, "NUM_SHARDS is 5; use 0 (only the validation shard) to 4"), (-1, "NUM_SHARDS is -1"),
    ("--revison=x", "unrecognized arguments: --revison=x")])
def test_a_mistake_on_the_command_line_is_one_line(fetch, hub, argument, fault):
    assert fault in fetch(argument)[0] and hub.requests == []


def test_check_counts_steps_and_names_what_is_missing(fetch, hub, tmp_path):
    """A step of the baseline has 524,288 tokens."""
    write_shard(tmp_path / "shard", np.zeros(2 * 524_288 + 2))
    hub.files |= dict.fromkeys(TRAIN[:2], (tmp_path / "shard").read_bytes())
    fetch(2)
    error, output = fetch("--check")
    assert error == "" and f"commit {COMMIT}, 3 of 3 shards intact, enough for 4 steps of" in output
    (hub.folder / TRAIN[0]).unlink()
    assert f"{TRAIN[0]}: missing; fetch again" in fetch("--check")[0]
    assert f"{TRAIN[2]}: missing" in fetch("--check", 3)[0]


@pytest.fixture
def start(tmp_path, hub):
    """Start the fetcher of a copy of data/ without shards."""
    data, shards = Path(fetcher.__file__).parent, shutil.ignore_patterns("fineweb10B", "local_text")
    copied = shutil.copytree(data, tmp_path / "data", ignore=shards)
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": f"{tmp_path}/hf", "PYTHONPATH": ""}
    return lambda number, **options: subprocess.Popen([sys.executable, copied / "cached_fineweb10B.py", str(number)],
                                                      env=env, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_at_any_moment_it_leaves_no_bad_shard_and_no_remains(start, hub, number, times):
    """It does not wait for running downloads. A later call fetches the rest."""
    hub.rate, rng = 200_000, random.Random(0)
    for _ in range(times):
        process, before = start(4), sum(hub.sent.values())
        missing = sum(len(content) for name, content in hub.files.items() if name not in there(hub.folder))
        goal = before + rng.randrange(1, missing * 3 // 4)
        while sum(hub.sent.values()) < goal:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate()[1]
        assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in errors
        assert number == signal.SIGKILL or errors.endswith("cached_fineweb10B.py: interrupted\n")
        assert there(hub.folder).items() < hub.files.items()
    hub.rate = None
    last = start(4)
    assert last.communicate() and last.returncode == 0
    assert there(hub.folder) == hub.files and list(hub.folder.rglob("*.incomplete")) == []


@pytest.mark.slow
def test_of_two_at_once_one_fetches(start, hub):
    hub.rate = 400_000
    assert [process.communicate() and process.returncode for process in [start(4), start(4)]] == [0, 0]
    assert there(hub.folder) == hub.files and hub.sent == {name: len(hub.files[name]) for name in NAMES}


@pytest.mark.slow
def test_a_full_disk_is_one_line(start, hub):
    process = start(1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    errors = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in errors and there(hub.folder) == {}
    assert "File too large; check space and permissions of " in errors.splitlines()[-1]
