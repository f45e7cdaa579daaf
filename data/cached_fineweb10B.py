"""Fetch FineWeb as shards of 100M tokens from the Hugging Face Hub: python data/cached_fineweb10B.py [NUM_SHARDS]

Brings the validation shard and the first NUM_SHARDS training shards, without a number all 103, of
https://huggingface.co/datasets/kjj0/fineweb10B-gpt2 into data/fineweb10B/.

- revision.json there records the commit, with each file's size and SHA-256; every later call uses that commit.
- A file has a shard's name only once it is whole. Before, it grows in .unfinished/, where a later call goes on with
  it; there it is compared with the Hub's size and SHA-256 and looked at as a shard, and then it is renamed.
- A shard that is there already is compared in the same way and fetched again where it is damaged. Where all are
  whole, the network is not used.
- Any number of calls can run at once, also on several nodes with one disk: each shard is locked by the call that
  fetches it, and the others take other shards meanwhile. Where the disk has no locks, each call fetches for itself.
"""

import argparse
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages load needs no traceback

try:
    from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub import constants as hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: of the HTTP library that this version of the hub's builds on
    from huggingface_hub.utils import build_hf_headers
except Exception as error:  # it reads HF_ENDPOINT and other variables while it is imported
    sys.exit(f"cached_fineweb10B.py: huggingface_hub cannot be loaded ({type(error).__name__}: {error}); install requirements.txt, check HF_ENDPOINT")
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_gpt_medium import CommandLine, Hyperparameters, counted, largest_token_id, num_batches, open_shard, say  # noqa: E402

REPOSITORY = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).resolve().parent / "fineweb10B"
RECORD = "revision.json"
UNFINISHED = ".unfinished"
SHARD_NAME = re.compile(r"fineweb_(train|val)_\d{6}\.bin")

RETRY_AFTER_S = (0.5, 1, 2, 4, 8)  # a failure that passes is retried so often in a row
START_LANES, MAX_LANES = 4, 16  # downloads side by side
RAMP_S = 2.0  # for so long the rate of a number of lanes is taken, after half of that to come up to it
RAMP_GAIN = 1.1  # twice the lanes must bring so much more
POLL_S = 0.2

# -----------------------------------------------------------------------------
# The record: which commit, and what its files are


class HubFile(NamedTuple):
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Record:
    """What revision.json holds."""

    repository: str
    revision: str  # as it was asked for: a branch, a tag or a commit
    commit: str  # what it was then
    files: dict[str, HubFile]  # the shards by name

    def first(self, num_shards: int | None) -> list[str]:
        """The validation shards and the first training shards, None: all. ValueError: there are not so many."""
        train, val = (sorted(name for name in self.files if name.startswith(f"fineweb_{kind}_")) for kind in ("train", "val"))
        if num_shards is not None and num_shards > len(train):
            raise ValueError(f"{num_shards} training shards asked for, but {self.repository} has {len(train)}; ask for at most {len(train)}")
        return val + train[:num_shards]


def read_record(folder: Path) -> Record | None:
    """The folder's record; None where it has none. ValueError: it cannot be read."""
    path = folder / RECORD
    try:
        values = json.loads(path.read_bytes())
        files = {name: HubFile(int(size), str(sha256)) for name, (size, sha256) in values["files"].items() if SHARD_NAME.fullmatch(name)}
        if not files:
            raise ValueError("no files")
        return Record(str(values["repository"]), str(values["revision"]), str(values["commit"]), files)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not a record that can be read ({type(error).__name__}); remove it and start again") from None


def ask_hub(revision: str) -> Record:
    """The commit that a revision is now, and its shards, as the Hub has them. ValueError: this is not the Hub's answer."""
    try:
        info = persist(lambda: HfApi().dataset_info(REPOSITORY, revision=revision, files_metadata=True, timeout=hub.HF_HUB_DOWNLOAD_TIMEOUT))
    except UnicodeError:
        raise ValueError("HF_TOKEN has characters that no access token has; correct it or unset it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{hub.ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT and whether a proxy wants a log-in") from None
    files = {
        file.rfilename: HubFile(file.lfs.size, file.lfs.sha256)
        for file in info.siblings or () if file.lfs is not None and SHARD_NAME.fullmatch(file.rfilename)
    }
    if not files:
        raise ValueError(f"{REPOSITORY} has no shards with a SHA-256 at revision {revision} on {hub.ENDPOINT}; use another --revision")
    return Record(REPOSITORY, revision, info.sha, files)


def write_record(folder: Path, record: Record) -> None:
    """Written elsewhere and linked to its name, so that it is whole, unless another process was first."""
    path = folder / UNFINISHED / f"{RECORD}.{socket.gethostname()}.{os.getpid()}"
    path.write_text(json.dumps(asdict(record), indent=1))
    try:
        os.link(path, folder / RECORD)
    except FileExistsError:
        pass
    except OSError:  # a filesystem without links
        path.rename(folder / RECORD)
    path.unlink(missing_ok=True)


def find_record(folder: Path, revision: str | None) -> Record:
    """The folder's record, made from the Hub's answer where there is none. ValueError: it is of another revision."""
    if (record := read_record(folder)) is None:
        (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_record(folder, ask_hub(revision or "main"))
        record = read_record(folder)
    if revision not in (None, record.revision, record.commit):
        raise ValueError(f"--revision {revision}: {folder} holds revision {record.revision}, commit {record.commit}; "
                         f"leave --revision out, or move the folder away and start again")
    return record


# -----------------------------------------------------------------------------
# One file


class NoLocks(Exception):
    """The filesystem has no locks."""


@contextmanager
def locked(path: Path) -> Iterator[io.FileIO | None]:
    """The file at a path, made where there is none, locked until the end of the block or of the process; None: another process has it. NoLocks."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise NoLocks from None
            yield None
        else:
            yield file if is_at(file, path) else None


def is_at(file: io.FileIO, path: Path) -> bool:
    """Whether an open file is the one at a path, not, say, renamed since by another process."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def find_damage(path: Path, expected: HubFile | None) -> str:
    """What is wrong with a shard, "" for nothing: by the Hub's size and SHA-256, then by its header and a sample of its ids."""
    try:
        if expected is not None:
            if (size := path.stat().st_size) != expected.size:
                return f"{size:,} bytes instead of {expected.size:,}"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    return "its SHA-256 is not the Hub's"
        largest = largest_token_id(open_shard(str(path)))
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    vocab_size = Hyperparameters().vocab_size
    return f"holds token id {largest}, but the vocabulary has {vocab_size}" if largest >= vocab_size else ""


def is_passing(error: Exception) -> bool:
    """Whether a failure may be over in a moment: no answer, or the Hub's word that it is busy."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, HTTPError) and type(error).__name__ != "UnsupportedProtocol"  # an endpoint without http://


T = TypeVar("T")


def persist(action: Callable[[], T], progress: Callable[[], int] = int) -> T:
    """What `action` gives. A failure that may pass is waited for, longer each time that `progress()` has not grown since the last."""
    failures, best = 0, progress()
    while True:
        try:
            return action()
        except (HTTPError, OSError) as error:
            failures = 1 if progress() > best else failures + 1
            best = progress()
            if not is_passing(error) or failures > len(RETRY_AFTER_S):
                raise
        time.sleep(RETRY_AFTER_S[failures - 1])


def receive(file: io.FileIO, url: str, size: int) -> None:
    """Append to the file what it lacks of the `size` bytes at the URL. ValueError: this is not the Hub's answer."""
    start = file.seek(0, os.SEEK_END)
    if start >= size:
        return
    headers = build_hf_headers() | {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=hub.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code == 416:  # what is there is shorter; the comparison will tell
            return
        hf_raise_for_status(response)
        if response.status_code != 206:  # all of it, though only the rest was asked for
            if start and response.headers.get("Content-Length") != str(size):
                raise ValueError(f"{hub.ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT and whether a proxy wants a log-in")
            file.seek(0)
        for chunk in response.iter_bytes():  # as they come: chunks of a given size would be lost with the connection
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            if file.tell() > size:
                return


class Damaged(Exception):
    """A file arrived damaged twice."""


def unfinished_path(folder: Path, record: Record, name: str) -> Path:
    """Where a shard grows; another content grows elsewhere."""
    return folder / UNFINISHED / f"{name}.{record.files[name].sha256[:16]}"


def fetch(folder: Path, record: Record, name: str) -> bool:
    """Bring one shard under its name. False: another process has it locked. Damaged; ValueError, HTTPError, OSError: see `explain`."""
    unfinished = unfinished_path(folder, record, name)
    for _ in range(2):
        try:
            with locked(unfinished) as file:
                if file is None:
                    return False
                damage = fetch_into(file, unfinished, folder, record, name)
        except NoLocks:  # a file of this call's own: it costs only what others fetch too, and what is left of it
            own = unfinished.with_name(f"{unfinished.name}.{socket.gethostname()}.{os.getpid()}")
            with open(own, "w+b", buffering=0) as file:
                damage = fetch_into(file, own, folder, record, name)
        if not damage:
            return True
    raise Damaged(f"{name}: fetched twice and damaged each time: {damage}; start again later, or with another --revision in an empty folder")


def fetch_into(file: io.FileIO, path: Path, folder: Path, record: Record, name: str) -> str:
    """Fetch a shard into an open file, and rename that; what is wrong with what has arrived, "" for nothing."""
    expected, final = record.files[name], folder / name
    if final.exists():
        if not find_damage(final, expected):
            path.unlink()
            return ""
        final.unlink(missing_ok=True)
    url = hf_hub_url(record.repository, name, repo_type="dataset", revision=record.commit)
    persist(lambda: receive(file, url, expected.size), progress=lambda: os.fstat(file.fileno()).st_size)
    damage = find_damage(path, expected)
    if damage:
        path.unlink()
    else:
        os.fsync(file)
        path.rename(final)
    return damage


# -----------------------------------------------------------------------------
# All files, side by side


class Lanes:
    """Threads that work through names side by side; they end with the program, whatever they are at.

    `work(name)` returns False where the name's turn has not come yet. A Damaged file leaves the others to be
    worked on; any other error ends the work.
    """

    def __init__(self, work: Callable[[str], bool], names: list[str]):
        self.work = work
        self.waiting = deque(names)
        self.done: list[str] = []
        self.busy: set[str] = set()
        self.damaged: list[Damaged] = []
        self.error: Exception | None = None
        self.threads: list[threading.Thread] = []
        self.allowed = 0

    def allow(self, count: int) -> None:
        """Go on with so many threads. Those too many end after the file that they are at."""
        self.allowed = count
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        for number in range(len(self.threads), count if self.waiting else 0):
            self.threads.append(threading.Thread(target=self.run, args=(number,), daemon=True))
            self.threads[-1].start()

    def run(self, number: int) -> None:
        while number < self.allowed and self.error is None:
            try:
                name = self.waiting.popleft()
            except IndexError:
                return
            try:
                if self.work(name):
                    self.done.append(name)
                else:
                    self.busy.add(name)
                    self.waiting.append(name)
                    time.sleep(POLL_S)
            except Damaged as error:
                self.damaged.append(error)
            except Exception as error:
                self.error = error

    def at_work(self) -> bool:
        """Whether anything goes on, after a moment's wait. Raises the error that has ended the work."""
        for thread in self.threads:
            thread.join(POLL_S)
            if thread.is_alive():
                break
        if self.error is not None:
            raise self.error
        return bool(self.waiting) or any(thread.is_alive() for thread in self.threads)


class Ramp:
    """How many lanes: twice as many as long as the last doubling raised the rate by a tenth, then no more than paid."""

    def __init__(self, now: float):
        self.lanes, self.best_rate, self.settled = START_LANES, 0.0, False
        self.changed_at, self.since = now, None

    def observe(self, now: float, received: int) -> int:
        """The number of lanes to go on with, from the time in seconds and the bytes that are there by now."""
        if self.settled or now < self.changed_at + RAMP_S / 2:
            return self.lanes
        if self.since is None:
            self.since = now, received
        elif now >= self.since[0] + RAMP_S:
            self.decide(rate=(received - self.since[1]) / (now - self.since[0]))
            self.changed_at, self.since = now, None
        return self.lanes

    def decide(self, rate: float) -> None:
        if rate < RAMP_GAIN * self.best_rate:
            self.lanes, self.settled = self.lanes // 2, True
        elif self.lanes == MAX_LANES:
            self.settled = True
        else:
            self.lanes, self.best_rate = 2 * self.lanes, rate


def on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def gigabytes(n: float) -> str:
    return f"{n / 1e9:,.2f} GB"


class Progress:
    """Bytes, rate and time left of the whole job: a bar on a terminal, else a line for each shard."""

    def __init__(self, folder: Path, record: Record, names: list[str]):
        self.folder, self.record, self.names = folder, record, names
        self.total = sum(record.files[name].size for name in names)
        self.start, self.start_bytes = time.monotonic(), self.bytes_there()
        self.bar = tqdm(total=self.total, initial=self.start_bytes, unit="B", unit_scale=True, desc=counted(len(names), "shard"),
                        disable=not on_terminal(), dynamic_ncols=True, mininterval=0)

    def bytes_there(self) -> int:
        """Of the job's shards, by whomever they were fetched."""
        return sum(self.bytes_of(name) for name in self.names)

    def bytes_of(self, name: str) -> int:
        final = self.folder / name
        for path in (final, unfinished_path(self.folder, self.record, name), final):  # again, for what is renamed meanwhile
            try:
                return path.stat().st_size
            except FileNotFoundError:
                continue
        return 0

    def show(self) -> None:
        if not self.bar.disable:
            self.bar.update(self.bytes_there() - self.bar.n)

    def line(self, name: str, number: int) -> None:
        """A shard is there, the job's `number`th."""
        if self.bar.disable:
            there, seconds = self.bytes_there(), time.monotonic() - self.start
            rate = (there - self.start_bytes) / seconds
            left = f"{(self.total - there) / rate:,.0f} s left" if rate > 0 else "time left unknown"
            say(f"{name}: {number} of {len(self.names)}, {gigabytes(there)} of {gigabytes(self.total)}, {rate / 1e6:,.1f} MB/s, {left}")


def check_space(folder: Path, missing: int) -> None:
    """OSError where the disk has no room for so many bytes."""
    if (free := shutil.disk_usage(folder).free) < missing:
        raise OSError(errno.ENOSPC, f"{gigabytes(missing)} are missing and {gigabytes(free)} are free", str(folder))


def fetch_all(folder: Path, record: Record, names: list[str]) -> list[Damaged]:
    """Fetch the shards; returns those that arrived damaged. HTTPError, OSError: see `explain`."""
    progress = Progress(folder, record, names)
    check_space(folder, progress.total - progress.start_bytes)
    lanes, ramp = Lanes(lambda name: fetch(folder, record, name), names), Ramp(time.monotonic())
    lanes.allow(ramp.lanes)
    shown, told = 0, set()
    with progress.bar:
        while lanes.at_work() or shown < len(lanes.done):
            progress.show()
            for name in lanes.done[shown:]:
                shown += 1
                progress.line(name, shown)
            for name in lanes.busy - told:
                told.add(name)
                say(f"{name}: another process is fetching it")
            lanes.allow(ramp.observe(time.monotonic(), progress.bytes_there()))
        progress.show()
    return lanes.damaged


def look_at(folder: Path, files: dict[str, HubFile | None]) -> dict[str, str]:
    """What is wrong with each of the shards that are there, "" for nothing."""
    damage: dict[str, str] = {}

    def look(name: str) -> bool:
        damage[name] = find_damage(folder / name, files[name])
        return True

    names = [name for name in files if os.path.lexists(folder / name)]
    lanes = Lanes(look, names)
    lanes.allow(min(len(names), os.cpu_count() or 1))
    with tqdm(total=len(names), unit="shard", desc="comparing", disable=not on_terminal(), dynamic_ncols=True, leave=False) as bar:
        while lanes.at_work():
            bar.update(len(damage) - bar.n)
    return damage


# -----------------------------------------------------------------------------
# The two commands


def bring(folder: Path, num_shards: int | None, revision: str | None) -> list[str]:
    """Have the shards in the folder; returns complaints, one a shard that could not be had. ValueError, HTTPError, OSError."""
    record = find_record(folder, revision)
    names = record.first(num_shards)
    damage = look_at(folder, {name: record.files[name] for name in names})
    for name, what in damage.items():
        if what:
            say(f"{name}: {what}; it is fetched again")
    missing = [name for name in names if damage.get(name) != ""]
    say(f"{folder}: commit {record.commit}, {len(names) - len(missing)} of {counted(len(names), 'shard')} whole")
    if not missing:
        return []
    (folder / UNFINISHED).mkdir(exist_ok=True)
    damaged = fetch_all(folder, record, missing)
    say(f"{folder}: {sum((folder / name).exists() for name in names)} of {counted(len(names), 'shard')} whole")
    return [str(error) for error in damaged]


def complain(names: list[str], record: Record | None, num_shards: int | None) -> list[str]:
    """What is missing among the shards with these names, and what should not be there."""
    if record is None:
        asked_for = [f"fineweb_train_{number:06d}.bin" for number in range(1, (num_shards or 0) + 1)]
        foreign = []
    else:
        last = max((n for n, name in enumerate(record.first(None)) if name in names), default=0)
        asked_for = record.first(None)[: last + 1] if num_shards is None else record.first(num_shards)
        foreign = [f"{name}: not one of this commit's shards; move it away" for name in names if name not in record.files]
    return foreign + [f"{name}: missing; fetch it: python data/cached_fineweb10B.py NUM_SHARDS" for name in asked_for if name not in names]


def check(folder: Path, num_shards: int | None) -> list[str]:
    """Print what is in the folder and what it is good for; returns complaints, one a shard. ValueError."""
    record, names = read_record(folder), sorted(path.name for path in folder.glob("fineweb_*.bin"))
    if not names:
        raise ValueError(f"{folder}: no shards; fetch them: python data/cached_fineweb10B.py NUM_SHARDS")
    if record is None:
        say(f"{folder}: no {RECORD}, so that headers and samples of ids are checked, but no SHA-256")
    else:
        say(f"{folder}: commit {record.commit} of {record.repository} ({record.revision})")
    damage = look_at(folder, {name: record.files.get(name) if record else None for name in names})
    complaints = complain(names, record, num_shards)
    complaints += [f"{name}: {what}; fetch it again: python data/cached_fineweb10B.py NUM_SHARDS" for name, what in damage.items() if what]
    tokens = {name: len(open_shard(str(folder / name))) for name in names if not damage[name]}
    train, val = ([n for name, n in tokens.items() if name.startswith(f"fineweb_{kind}_")] for kind in ("train", "val"))
    hp = Hyperparameters()
    steps = num_batches(train, hp.sequences_per_step * hp.train_seq_len)
    say(f"training: {counted(len(train), 'shard')}, {sum(train):,} tokens, good for {counted(steps, 'step')} of the baseline")
    say(f"validation: {counted(len(val), 'shard')}, {sum(val):,} tokens")
    return complaints


def explain(error: Exception, folder: Path) -> str:
    """What has ended the work and what the user can do, in one line."""
    go_on = "then start again: it goes on where it stopped"
    if isinstance(error, HfHubHTTPError):
        status, url = error.response.status_code, str(error.response.url).partition("?")[0]  # a query can hold a signature
        if status in (401, 403):
            return f"the Hub answers {status} for {url}: no access with this token; log in (hf auth login) or correct HF_TOKEN, {go_on}"
        if status == 404:
            return f"the Hub answers 404 for {url}: there is no such dataset, revision or file; check --revision and HF_ENDPOINT"
        return f"the Hub answers {status} for {url}; wait a while, {go_on}"
    if isinstance(error, HTTPError):
        return f"no answer from {hub.ENDPOINT} ({type(error).__name__}: {error}); check the network and HF_ENDPOINT, {go_on}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space in {folder} ({error.strerror}); make room or ask for fewer shards, {go_on}"
    if isinstance(error, ImportError):
        return f"{error}; unset the proxy variables (ALL_PROXY, HTTPS_PROXY) or install what it names"
    return str(error)


def parse_command_line(arguments: list[str]) -> argparse.Namespace:
    """ValueError: something that it does not know."""
    parser = CommandLine(prog="cached_fineweb10B.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("num_shards", nargs="?", type=int, metavar="NUM_SHARDS", help="training shards (default: all)")
    parser.add_argument("--revision", help="branch, tag or commit (default: the folder's, else main)")
    parser.add_argument("--check", action="store_true", help="fetch nothing; compare what is there and say what it is good for")
    options = parser.parse_args(arguments)
    if options.check and options.revision is not None:
        raise ValueError("--check compares with the revision that was fetched; leave --revision out")
    if options.num_shards is not None and options.num_shards < 0:
        raise ValueError(f"NUM_SHARDS is {options.num_shards}; use 0 (only the validation shard) or more")
    return options


def main(arguments: list[str]) -> int:
    """Returns the exit status: 2 where the user has something to mend, which has been printed; 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = parse_command_line(arguments)
        complaints = check(FOLDER, options.num_shards) if options.check else bring(FOLDER, options.num_shards, options.revision)
    except (ValueError, HTTPError, OSError, ImportError) as error:
        complaints = [" ".join(explain(error, FOLDER).split())]
    except KeyboardInterrupt:
        print("cached_fineweb10B.py: interrupted; start again: it goes on where it stopped", file=sys.stderr)
        return 130
    for complaint in complaints:
        print(f"cached_fineweb10B.py: {complaint}", file=sys.stderr)
    return 2 if complaints else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
