"""Read logs: which files are logs, what each one says, and which runs belong to one configuration."""

import itertools
import math
import os
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from logs.log_format import ROOT, RUN_KEYS, Header, StepLine, differences, parse_step_lines, split_log, syntax

# A resumed run can diverge and be resumed again: the line counts only if no step line follows it.
DIVERGED = re.compile(r"^diverged at step (\d{1,12})\b(?!.*^step:)", re.MULTILINE | re.DOTALL | re.ASCII)
RESUMED = re.compile(r"^resumed at step ", re.MULTILINE)
SESSION = re.compile(r"^(?:resumed at step .* on (\S+); )?device: (\d+ ranks?, .*)(?:\nstarted: .* on (\S+))?$",
                     re.MULTILINE)
PUBLISHED_VALIDATION = {"val_tokens": 10_485_760, "val_seq_len": 262_144}  # taken for logs without a configuration


class Curve(NamedTuple):
    """Validations in the order of their steps: losses in nats per token, training time in seconds."""
    steps: np.ndarray
    losses: np.ndarray
    seconds: np.ndarray


class Result(NamedTuple):
    """What one log says."""
    path: Path
    header: Header
    num_iterations: int
    curve: Curve
    step_avg_ms: float  # as the last line states it
    diverged_at: int | None  # step
    end: int  # the step whose loss is compared: num_iterations, or an earlier one
    machines: frozenset[str]  # of all sessions: the device as its line describes it, and the host; or "not stated"

    @property
    def finished(self) -> bool:
        """Whether the end was validated and the run did not diverge before it."""
        return (self.diverged_at is None or self.diverged_at > self.end) and self.end in self.curve.steps

    def cut(self, step: int) -> "Result":
        """Return the run as it was at an earlier step."""
        curve = Curve(*(column[self.curve.steps <= step] for column in self.curve))
        step_avg_ms = 1000 * curve.seconds[-1] / curve.steps[-1] if curve.steps.any() else math.nan
        return self._replace(curve=curve, end=step, step_avg_ms=step_avg_ms)


def count_runs(header: Header, results: str) -> int:
    """Count the runs joined in a log: another starts where steps fall without a resume. Unparsable "code" is logs."""
    earlier = header.code if syntax(header.code) == header.code else ""
    steps = [[line.step for line in parse_step_lines(part)] for part in RESUMED.split(f"{earlier}\n{results}")]
    return 1 + sum(b < a for part in steps for a, b in zip(part, part[1:]))


def read_result(path: Path) -> Result:
    """Read a log. Raises ValueError if it has no results or if its training time falls."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "\n")  # a crash can leave NUL bytes
    header, results = split_log(text)
    if (count := count_runs(header, results)) > 1:
        raise ValueError(f"{path}: skipped, contains {count} runs; split it into one log per run")
    place = (lambda line: (line.step, line.val_loss is not None))  # the validation at a step follows its training
    lines: list[StepLine] = []
    for line in parse_step_lines(results):
        while lines and place(lines[-1]) >= place(line):
            lines.pop()  # a resumed run has repeated it
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: skipped, no results (such as step:1/2 val_loss:4.3 train_time:9ms step_avg:9.00ms)")
    rows = [(line.step, line.val_loss, line.train_time_ms / 1000) for line in lines if line.val_loss is not None]
    curve = Curve(*np.array(rows, float).reshape(-1, 3).T)
    if (np.diff(curve.seconds) < 0).any():
        raise ValueError(f"{path}: skipped, its train_time falls between validations")
    diverged = min(map(int, [*curve.steps[~np.isfinite(curve.losses)], *DIVERGED.findall(results)]), default=None)
    total = lines[-1].num_iterations
    tuned = ", tuned kernels" * bool(header.configuration.get("coordinate_descent_tuning"))
    machines = frozenset(f"{device} on {resumed_on or started_on}{tuned}"
                         for resumed_on, device, started_on in SESSION.findall(text)) or frozenset({"not stated"})
    return Result(path, header, total, curve, lines[-1].step_avg_ms, diverged, total, machines)


def list_changes(then: Result, now: Result) -> list[str]:
    """Describe how the configuration of `now` differs: keys with both values, the code, the data, the length."""
    one_sided = [part for part, a, b in zip(Header._fields, then.header, now.header) if bool(a) != bool(b)]
    old, new = ({"code": run.header.code, **run.header.configuration, "num_iterations": run.num_iterations}
                for run in (then, now))
    unknown = {"code"} & {*one_sided} | (old.keys() ^ new.keys() if "configuration" in one_sided else set())
    return [f"only one log records the {part}" for part in one_sided] + differences(old, new, RUN_KEYS | unknown)


def validate_alike(one: Result, other: Result) -> bool:
    """Tell whether two runs validate on the same sequences, as far as both logs say."""
    keys, others = (run.header.configuration or PUBLISHED_VALIDATION for run in (one, other))
    known = keys.keys() & others.keys() & {"val_data", "val_tokens", "val_seq_len"}
    return all(keys[key] == others[key] for key in known)


def known_keys(name: str, run: Result) -> dict[str, Any]:
    """Return a configuration's keys: those of the header or, for bare lines, of the config of that name, if any.

    The published folders' names can end in the number of steps, or in _ttest.
    """
    if any(run.header):
        return run.header.configuration
    own, keys = name.split("/")[-1], {}
    stems = [own, re.sub(r"_(5\d{3}|ttest)$", "", own)]
    config = next((path for path in (ROOT / f"configs/{stem}.toml" for stem in stems) if path.is_file()), None)
    for path in (config.with_stem("baseline"), config) if config else ():
        try:
            keys |= tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; correct this file: {name} has no header and takes its keys") from None
    return keys


def files_below(folder: Path) -> list[Path]:
    """Return the sorted files below a folder: follow links, visit each folder once, leave out hidden names."""
    found, seen, level = [], set(), [folder]
    while level:  # of several paths to one folder the shortest counts and, among those, one that is not a link
        children = []
        for root in level:
            with suppress(OSError):
                children += [] if os.path.realpath(root) in seen else root.iterdir()
            seen.add(os.path.realpath(root))
        visible = [path for path in children if path.name[0] != "."]
        found += [path for path in visible if not os.path.isdir(path)]
        level = sorted(filter(os.path.isdir, visible), key=lambda path: (path.is_symlink(), path))
    return sorted(found)


def find_logs(paths: list[Path]) -> tuple[dict[Path, set[Path]], list[str]]:
    """Return {folder: its logs}, or {log: {log}} for a log given by itself, and a line on each thing skipped.

    Logs in a folder and one level below it count; if there are none, those of the next level that has some.
    """
    found: dict[Path, set[Path]] = defaultdict(set)
    notes, seen = [], set()
    for given in paths:
        path = Path(os.path.realpath(given))
        logs = [log for log in (files_below(path) if path.is_dir() else [path])
                if log.suffix in (".txt", ".log") and log.name != "requirements.txt" and log.is_file()]
        depths = [max(2, len(log.relative_to(path).parts)) for log in logs]
        near = [log for log, depth in zip(logs, depths) if depth == min(depths)]
        for log in sorted(near, key=Path.is_symlink):  # a log before the links to it
            if (real := os.path.realpath(log)) not in seen:
                seen.add(real)
                found[log.parent if path.is_dir() else log].add(log)
        if not near:
            notes.append(f"{given}: {'skipped, no logs (*.txt, *.log)' if path.exists() else 'no such file'}")
        if len(near) < len(logs):
            notes.append(f"{given}: skipped {len(logs) - len(near)} logs in deeper folders; name their folder")
    return found, notes


def shortest_names(paths: list[Path]) -> list[str]:
    """Name each path by the shortest end that is unique; a numbered log's name includes its folder's."""
    parts = [path.with_suffix("").parts if path.is_file() else path.parts for path in paths]
    names = []
    for path, own in zip(paths, parts):
        depths = range(2 if path.is_file() and path.stem.isdecimal() else 1, len(own) + 1)
        ends = (own[-depth:] for depth in depths if sum(other[-depth:] == own[-depth:] for other in parts) == 1)
        names.append("".join(c if c.isprintable() else "?" for c in "/".join(next(ends, path.parts[1:]))))
    return names


def read_configurations(paths: list[Path]) -> tuple[dict[str, list[Result]], list[str]]:
    """Return {name: runs} and a line on everything skipped. Runs of one folder that differ are split and noted."""
    found, notes = find_logs(paths)
    configurations: dict[str, list[Result]] = {}
    names = shortest_names(list(found))
    for folder, logs in zip(names, found.values()):
        groups: dict[str, list[Result]] = {}
        for log in sorted(logs):
            try:
                run = read_result(log)
            except (ValueError, OSError) as error:
                notes.append(str(error))
                continue
            changes = {name: list_changes(group[0], run) for name, group in groups.items()}
            name = next((name for name in groups if not changes[name]), folder)
            if changes.get(name):  # it differs from every group so far
                free = (f"{folder}:{n}" for n in itertools.count(2))
                name = next(n for n in free if n not in {*names, *groups})
                notes.append(f"{name} ({log.name}) is split from {folder}: {'; '.join(changes[folder])}")
            groups.setdefault(name, []).append(run)
        configurations |= groups
    return configurations, notes
