"""data/cached_fineweb10B.py against a Hub on loopback that sends damaged files, refuses and is slow, and kill -9."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data import cached_fineweb10B as fetcher
from data.shards import write_shard

VAL, *TRAIN = NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in (1, 2, 3, 4))]
REPOSITORY, COMMIT = "kjj0/fineweb10B-gpt2", "c0ffee" + 34 * "0"
COMMAND = f"{sys.executable} data/cached_fineweb10B.py"
PATHS = re.compile(rf"/(?:api/)?datasets/{REPOSITORY}/(revision|tree|resolve)/(?:main|[0-9a-f]{{40}})/?.*|/(blobs)/.*")


class Hub(ThreadingHTTPServer):
    """The part of the Hub that fetching a dataset needs, with faults to order: a test changes the attributes.

    It lists one dataset with sizes and SHA-256, and redirects requests for files to another host name, as to a CDN.
    """
    daemon_threads = True
    handle_error = lambda *_: None  # of killed clients
    commit = COMMIT
    delay = 0  # seconds before every 10,000 bytes of an answer

    def __init__(self, files, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.requests, self.sent = f"http://127.0.0.1:{self.server_port}", [], 0  # sent: bytes
        self.files, self.served, self.folder = files, {}, folder  # name -> bytes: listed, sent instead; the client's
        self.status = {}  # beginning of a path -> status of every answer, a page in HTML as for a login

    def fetched(self):
        """Return the files fetched since the last call."""
        paths, self.requests = self.requests, []
        return sorted(path.removeprefix("/blobs/") for path in paths if path.startswith("/blobs/"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        for position in range(0, len(body) if self.command != "HEAD" else 0, 10_000):
            time.sleep(self.server.delay)
            self.server.sent += self.wfile.write(body[position : position + 10_000])

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(path)
        found, name = PATHS.fullmatch(path), path.rpartition("/")[2]
        status = next((status for beginning, status in hub.status.items() if path.startswith(beginning)), None)
        hashes = {listed: hashlib.sha256(content).hexdigest() for listed, content in hub.files.items()}
        if status or not found:
            self.answer(status or 404, b"<html>please log in</html>", Content_Type="text/html")
        elif found[2]:
            self.answer(200, hub.served.get(name, hub.files[name]))
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


def test_a_number_means_the_validation_shard_and_that_many(fetch, hub, tmp_path):
    """None means all. A call for complete shards needs no network, nor does --check. A baseline's step takes 2**19."""
    write_shard(tmp_path / "shard", np.zeros(2 * 2**19 + 2))
    hub.files |= dict.fromkeys(TRAIN[:2], (tmp_path / "shard").read_bytes())
    for arguments, names in ([0], [VAL]), ([2], NAMES[:3]):
        assert fetch(*arguments)[0] == "" and there(hub.folder) == {name: hub.files[name] for name in names}
    hub.requests.clear()
    assert fetch(2)[0] == fetch(0)[0] == ""
    error, output = fetch("--check")
    assert error == "" and f"commit {COMMIT}, 3 of 3 shards intact, enough for 4 steps of" in output
    assert f"{TRAIN[2]}: missing; fetch again: {COMMAND} 3" in fetch("--check", 3)[0]
    assert "NUM_SHARDS is 5; use 0 (only the validation shard) to 4" in fetch(5)[0] and hub.requests == []
    (hub.folder / TRAIN[0]).unlink()
    assert f"{TRAIN[0]}: missing" in fetch("--check")[0] and hub.requests == []
    assert fetch()[0] == "" and there(hub.folder) == hub.files


def test_only_missing_shards_are_fetched_and_from_the_recorded_commit(fetch, hub):
    """Also beside shards that are older than the record. A damaged record is asked for again."""
    hub.folder.mkdir(parents=True)
    (hub.folder / TRAIN[0]).write_bytes(hub.files[TRAIN[0]])
    (hub.folder / "revision.json").write_text('{"revision": "ma')
    assert fetch(2)[0] == "" and hub.fetched() == [TRAIN[1], VAL]
    assert json.loads((hub.folder / "revision.json").read_text())["commit"] == COMMIT
    hub.commit = 40 * "b"
    assert fetch(3)[0] == "" and not any("/main" in path for path in hub.requests) and hub.fetched() == [TRAIN[2]]


@pytest.mark.parametrize("bad", [  # truncated, one bit wrong
    lambda content: content[: len(content) // 2],
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
    assert f"{TRAIN[1]}: " in error and error.endswith("SHA-256; fetch again: " + COMMAND + " 2")
    assert there(hub.folder)[TRAIN[1]] == bad(hub.files[TRAIN[1]]) and hub.requests == []
    assert fetch(2)[0] == "" and hub.fetched() == [TRAIN[1]] and there(hub.folder)[TRAIN[1]] == hub.files[TRAIN[1]]


@pytest.mark.parametrize("fault, line", [
    (dict(status={"/api/datasets/": 401}), "answers 401: no access with this token; log in (hf auth login)"),
    (dict(status={"/datasets/": 404}), "answers 404: no such dataset, commit or file; check HF_ENDPOINT"),
    (dict(status={"/api/datasets/": 503}), "answers 503: rerun later"),
    (dict(status={"/blobs/": 403}), "answers 403: no access with this token"),
    (dict(status={"/": 200}), "no valid answer from http://127.0.0.1:"),
    (dict(url="http://127.0.0.1:9"), "check the network, HF_ENDPOINT, HF_TOKEN"),
    (dict(files={}), f"has no {TRAIN[0]} in commit {COMMIT}; ask for fewer shards"),
    (dict(folder=Path("/dev/null")), "File exists: '/dev/null'; check space and permissions of")], ids=str)
@pytest.mark.parametrize("is_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_refusal_is_one_line(fetch, hub, fault, line, is_first):
    """At the first call and at a later one, which leaves the shards as they are."""
    if not is_first and "files" not in fault:
        fetch(0)
    vars(hub).update(fault)
    before, (error, _) = there(hub.folder), fetch(1)
    assert line in error and there(hub.folder) == before


def test_complete_shards_in_a_read_only_folder_need_no_lock_and_no_record(fetch, hub, monkeypatch):
    fetch(2)
    (hub.folder / ".lock").unlink()
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert fetch(2)[0] == ""
    (hub.folder / "revision.json").unlink()
    assert fetch(2)[0] == fetch("--check")[0] == "" and there(hub.folder) == {n: hub.files[n] for n in NAMES[:3]}
    assert "Permission denied; check space and permissions of" in fetch(3)[0]


@pytest.mark.parametrize("name, target", [(TRAIN[0], "/unmounted/shard"), ("revision.json", "revision.json")])
def test_a_file_that_cannot_be_read_is_named_and_stays(fetch, hub, name, target):
    """A link to a volume that is not mounted, or to itself. Nothing is fetched in its place."""
    fetch(2)
    (hub.folder / name).unlink()
    (hub.folder / name).symlink_to(target)
    hub.requests.clear()
    for argument in ("--check", 2):
        error, _ = fetch(argument)
        assert f"{name}: cannot be read: " in error and "; check its path, permissions and disk" in error
    assert (hub.folder / name).is_symlink() and hub.requests == []


@pytest.fixture
def start(tmp_path, hub):
    """Start the fetcher of a copy of data/ without shards."""
    shards = shutil.ignore_patterns("fineweb10B", "local_text*")
    copied = shutil.copytree(Path(fetcher.__file__).parent, tmp_path / "data", ignore=shards)
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": f"{tmp_path}/hf", "PYTHONPATH": ""}
    return lambda: subprocess.Popen([sys.executable, copied / "cached_fineweb10B.py", "4"], env=env, text=True,
                                    stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_it_leaves_no_bad_shard_and_no_remains(start, hub, number):
    """It does not wait for running downloads. A later call fetches the rest."""
    hub.delay, rng = 0.05, random.Random(0)
    for _ in range(2):
        missing = sum(len(content) for name, content in hub.files.items() if name not in there(hub.folder))
        process, goal = start(), hub.sent + rng.randrange(1, missing * 3 // 4)
        while hub.sent < goal:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate()[1]
        assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in errors
        assert number == signal.SIGKILL or errors.endswith("cached_fineweb10B.py: interrupted\n")
        assert there(hub.folder).items() < hub.files.items()
    hub.delay = 0
    last = start()
    assert last.communicate() and last.returncode == 0
    assert there(hub.folder) == hub.files and list(hub.folder.rglob("*.incomplete")) == []


@pytest.mark.slow
def test_of_two_at_once_one_fetches(start, hub):
    hub.delay = 0.025
    assert [process.communicate() and process.returncode for process in [start(), start()]] == [0, 0]
    assert there(hub.folder) == hub.files and hub.fetched() == sorted(NAMES)
