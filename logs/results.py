"""Reading: which files are logs, what a log says, and which runs are of one configuration."""

import glob
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from logs.log_file import BOOKKEEPING_KEYS

RESULT = re.compile(
    r"^step:(\d{1,12})/(\d{1,12})(?: val_loss:(\d{1,12}\.\d{1,12}|-?nan|-?inf))?"
    r" train_time:(\d{1,15})ms step_avg:(\d+\.\d+|nan|inf)ms$", re.MULTILINE | re.ASCII,
)
DIVERGED = re.compile(r"^diverged at step (\d{1,12})\b", re.MULTILINE | re.ASCII)
RULE = re.compile(r"^={100}$", re.MULTILINE)
ENVIRONMENT = re.compile(r"\s*Running (Python|PyTorch|pytorch) ")
SETTING = re.compile(r"(\w+) = (.*)")
WITHOUT_EFFECT = BOOKKEEPING_KEYS | {"seed", "run_id"}


class Curve(NamedTuple):
    """Validations in the order of their steps; losses in nats a token, training time in seconds."""
    steps: np.ndarray
    losses: np.ndarray
    seconds: np.ndarray


class Run(NamedTuple):
    """What one log says."""
    path: Path
    identity: dict[str, str]  # what runs of one configuration share: its keys, the program text, num_iterations
    num_iterations: int
    curve: Curve
    step_avg_ms: float  # as the last line states it
    diverged_at: int | None  # step

    @property
    def finished(self) -> bool:
        """Whether the last step has been validated and the run has not diverged."""
        return self.diverged_at is None and self.curve.steps[-1:].sum() >= self.num_iterations


def split_log(text: str) -> tuple[dict[str, str], str]:
    """The configuration, with the program text as one key more, and the results of a log.

    The program text can hold rules and results, so parts are counted from the environment, or from the log's end.
    """
    parts = RULE.split(text)
    end = max((i for i, part in enumerate(parts) if ENVIRONMENT.match(part)), default=len(parts) - 1)
    lines = parts[end - 1].strip().splitlines() if end > 1 else []
    settings = [match for line in lines if (match := SETTING.fullmatch(line))]
    has_settings = 0 < len(settings) == len(lines)  # else it is program text: the speedrun's logs have no configuration
    identity = {match[1]: match[2] for match in settings if has_settings and match[1] not in WITHOUT_EFFECT}
    identity["program text"] = "".join(parts[: end - has_settings])
    return identity, "\n".join(parts[end + 1 :] or parts[end:])


def read_run(path: Path) -> Run:
    """Read a log. Raises ValueError if it has no results, or if its training time falls."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "\n")  # a machine that stops can leave NULs
    identity, results = split_log(text)
    lines: list[tuple[int, bool, re.Match]] = []  # a step's validation (True) follows its training
    for match in RESULT.finditer(results):
        order = int(match[1]), match[3] is not None
        while lines and lines[-1][:2] >= order:
            lines.pop()  # a resumed run wrote it again
        lines.append((*order, match))
    if not lines:
        raise ValueError(f"{path}: no results in it (lines like step:1/2 val_loss:4.3 train_time:9ms step_avg:9.00ms)")
    rows = [(int(match[1]), float(match[3]), int(match[4]) / 1000) for _, validates, match in lines if validates]
    curve = Curve(*np.array(rows).reshape(-1, 3).T)
    if (np.diff(curve.seconds) < 0).any():
        raise ValueError(f"{path}: left out, its train_time falls between validations")
    last = lines[-1][2]
    diverged = [*curve.steps[~np.isfinite(curve.losses)], *(m[1] for m in DIVERGED.finditer(results, last.end()))]
    identity["num_iterations"] = last[2]
    return Run(path, identity, int(last[2]), curve, float(last[5]), min(map(int, diverged), default=None))


def find_logs(paths: list[Path]) -> tuple[dict[Path, set[Path]], list[str]]:
    """{folder: its logs}, or {log: {log}} for one given by itself, and lines on what was passed over.

    The logs in a folder and one level below are taken; where there are none, those of the next level that has some.
    """
    found: dict[Path, set[Path]] = defaultdict(set)
    without, notes = [], []
    for given in paths:
        path = Path(os.path.realpath(given))  # so that a log named twice is counted once
        names = sorted(glob.glob("**/*", root_dir=path, recursive=True)) if path.is_dir() else [""]
        files = {path / name: max(2, len(Path(name).parts)) for name in names if (path / name).is_file()}
        depths = {f: n for f, n in files.items() if f.suffix in (".txt", ".log") and f.name != "requirements.txt"}
        near = [log for log, depth in depths.items() if depth == min(depths.values())]
        for log in near:
            found[next((k for k, logs in found.items() if log in logs), log.parent if path.is_dir() else log)].add(log)
        without += [] if near else [str(given) if path.exists() else f"{given} (no such file)"]
        if len(near) < len(depths):
            notes.append(f"{given}: {len(depths) - len(near)} logs in deeper folders left out; name their folder")
    return found, notes + [f"passed over, no logs (*.txt, *.log): {', '.join(without)}"] * bool(without)


def shortest_names(paths: list[Path]) -> list[str]:
    """For each path as much of its end as tells it from the others; a numbered log's name goes with its folder's."""
    parts = [path.with_suffix("").parts if path.is_file() else path.parts for path in paths]
    names = []
    for path, own in zip(paths, parts):
        depths = range(2 if path.is_file() and path.stem.isdecimal() else 1, len(own) + 1)
        ends = (own[-depth:] for depth in depths if sum(other[-depth:] == own[-depth:] for other in parts) == 1)
        names.append("".join(c if c.isprintable() else "?" for c in "/".join(next(ends, path.parts[1:]))))
    return names


def split_runs(name: str, runs: list[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """{name: runs of one program, configuration and length}, and a line where that makes more than one name."""
    keys = {key: {run.identity.get(key) for run in runs} for run in runs for key in run.identity}
    differing = sorted(key for key, values in keys.items() if len(values) > 1)
    kinds: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        kinds[tuple(run.identity.get(key) for key in differing)].append(run)
    groups = {f"{name}:{i}" if i > 1 else name: group for i, group in enumerate(kinds.values(), 1)}
    members = "; ".join(f"{key} is {', '.join(run.path.name for run in group)}" for key, group in groups.items())
    return groups, [f"{name}: split, as its runs differ in {', '.join(differing)}: {members}"] * bool(differing)


def read_configurations(paths: list[Path]) -> tuple[dict[str, list[Run]], list[str]]:
    """{name: runs} of every configuration with results, and a line on everything that was split or left out."""
    found, notes = find_logs(paths)
    configurations: dict[str, list[Run]] = {}
    for name, logs in zip(shortest_names(list(found)), found.values()):
        runs: list[Run] = []
        for log in sorted(logs):
            try:
                runs.append(read_run(log))
            except (ValueError, OSError) as error:
                notes.append(str(error))
        groups, lines = split_runs(name, runs)
        configurations |= groups
        notes += lines
    return configurations, notes
