"""The text format of a run's log: its header, its step lines, and the comparison of two headers.

A log holds code, configuration, environment and results, with a rule after each of the first three. This module has
the only writer and the only parser of each.
"""

import ast
import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# With the keys, these files decide the numbers.
CODE_FILES = ("train_gpt_medium.py", "configs/checks.py", "data/loader.py", "data/shards.py")
# Keys that change no number:
BOOKKEEPING_KEYS = {"description", "log_dir", "save_checkpoint", "checkpoint_every", "step_timeout", "target_loss",
                    "val_documents"}
RUN_KEYS = BOOKKEEPING_KEYS | {"seed", "run_id"}  # may differ between the runs of one configuration
RULE = "=" * 100
RULE_LINE = re.compile(f"^{RULE}$", re.MULTILINE)
ENVIRONMENT = re.compile(r"\s*Running (Python|PyTorch|pytorch)\b")
SETTING = re.compile(r"^(\w+) = (.*)\n", re.MULTILINE)
STEP_LINE = re.compile(
    r"^step:(\d{1,12})/(\d{1,12})(?: val_loss:(\d{1,12}\.\d{1,12}|-?nan|-?inf))?"
    r" train_time:(\d{1,15})ms step_avg:(\d+\.\d+|nan|inf)ms(?: \w+:\S+)*$", re.MULTILINE | re.ASCII)


class StepLine(NamedTuple):
    step: int  # updates made
    num_iterations: int
    val_loss: float | None  # nats per token; None after a training step
    train_time_ms: int
    step_avg_ms: float


class Header(NamedTuple):
    code: str  # "" in a log of bare results
    configuration: dict[str, Any]  # JSON values, with train_data and val_data; {} in the speedrun's own logs


def format_step_line(step: int, num_iterations: int, train_time_ms: float, val_loss: float | None = None) -> str:
    """Return the line of a training step or, with `val_loss`, of a validation; the format is the published logs'."""
    loss = "" if val_loss is None else f" val_loss:{val_loss:.6f}"
    times = f"train_time:{train_time_ms:.0f}ms step_avg:{train_time_ms / max(step, 1):.2f}ms"
    return f"step:{step}/{num_iterations}{loss} {times}"


def parse_step_lines(text: str) -> Iterator[StepLine]:
    """Yield a text's complete step lines in order. Further fields after step_avg are ignored."""
    for step, total, val_loss, time_ms, step_avg_ms in STEP_LINE.findall(text):
        yield StepLine(int(step), int(total), float(val_loss) if val_loss else None, int(time_ms), float(step_avg_ms))


def program_text() -> str:
    """Return the text of CODE_FILES, each under its name."""
    return "\n".join(f"# {name}\n{(ROOT / name).read_text(encoding='utf-8')}" for name in CODE_FILES)


def format_header(code: str, configuration: dict[str, Any], *descriptions: str) -> str:
    """Return a header: the code, the resolved configuration as TOML with JSON values, and descriptions."""
    settings = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in configuration.items()]
    return "\n".join([code, RULE, *settings, RULE, *descriptions, RULE])


def split_log(text: str) -> tuple[Header, str]:
    """Split a log into its header and its results.

    The code can hold rules and results too, so parts are counted from the environment, or from the end without one.
    """
    parts, configuration = RULE_LINE.split(text), {}
    end = max((i for i, part in enumerate(parts) if ENVIRONMENT.match(part)), default=len(parts) - 1)
    settings = parts[end - 1][1:] if end > 1 else ""  # the part begins with the newline of the rule
    with suppress(ValueError, RecursionError):  # not JSON: it is code, or damaged
        if SETTING.sub("", settings) == "":
            configuration = {name: json.loads(value) for name, value in SETTING.findall(settings)}
    code = RULE.join(parts[: end - bool(configuration)]).removesuffix("\n")
    return Header(code, configuration), RULE.join(parts[end + 1 :] or parts[end:])


def read_header(log: Path) -> Header:
    """Read a log's header. Raises ValueError if it has no readable configuration."""
    header, _ = split_log(log.read_text(encoding="utf-8", errors="replace"))
    if not header.configuration:
        raise ValueError(f"{log}: no readable configuration in its header; move the log away")
    return header


@lru_cache(maxsize=32)
def syntax(code: str) -> str:
    """Return a text's syntax tree without docstrings, other bare constants and what it raises.

    A text that does not parse is returned as it is.
    """
    try:
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise):
                node.exc = None
            if isinstance(getattr(node, "body", None), list):
                node.body = [s for s in node.body
                             if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        return ast.dump(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code


def differences(then: dict[str, Any], now: dict[str, Any], ignored: Collection[str]) -> list[str]:
    """Return a sentence for each key whose value changed. Values are compared as JSON, the key "code" as `syntax`."""
    changes = []
    for key in (key for key in then | now if key not in ignored):
        was, new = json.dumps(then.get(key)), json.dumps(now.get(key))
        if was == new:
            continue
        if key != "code":
            is_short = len(was + new) < 300 or key not in ("train_data", "val_data")  # a map is shown whole
            changes.append(f"{key} was {was} and is {new}" if is_short else f"{key} has changed")
        elif syntax(then.get(key, "")) != syntax(now.get(key, "")):
            changes.append("the code has changed")
    return changes
