"""Read the keys of a frozen dataclass from TOML files and from `--KEY VALUE`.

Make each field of the dataclass with `key`, which states its meaning and its limits. Every mistake raises a ValueError
of one line: file or option, key, fault and fix.
"""

import difflib
import json
import math
import os
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from logs.log_format import ROOT

# A new type of key takes one line here: the name of its values, and their types. The key's own `check` checks a list's
# entries.
TYPES: dict[Any, tuple[str, set[type]]] = {
    int: ("an integer", {int}),
    int | None: ("an integer", {int}),
    float: ("a number", {int, float}),
    bool: ("true or false", {bool}),
    str: ("a string", {str}),
    list: ("a list", {list}),
}


def key(default: Any, meaning: str, *, min: float = -math.inf, max: float = math.inf, multiple_of: int = 1,
        check: Callable[[Any], Any] = lambda value: value, scale: bool = False) -> Any:
    """Make the field of a config key. `check` returns the value, normalized if need be, or raises ValueError.

    `scale` lets a scale file set the key.
    """
    metadata = dict(meaning=meaning, limits=(min, max, multiple_of), check=check, scale=scale)
    return field(default_factory=lambda: default, metadata=metadata)


@contextmanager
def error_context(source: str) -> Iterator[None]:
    """Put a file and key, or an option, in front of an error's message. Turns an OSError into a ValueError."""
    try:
        yield
    except ValueError as error:
        error.args = (f"{source}: {error}",)
        raise
    except OSError as error:
        raise ValueError(f"{source}: {error}") from None


def check_value(f: Field, value: Any) -> Any:
    """Return the normalized value of one key. Raises ValueError if its type or value is wrong."""
    name, types = TYPES[f.type]
    if type(value) not in types:
        raise ValueError(f"expected {name}, found {json.dumps(value, default=str)}")
    least, most, multiple_of = f.metadata["limits"]
    if isinstance(value, (int, float)):
        if not value >= least:  # NaN is outside every range
            raise ValueError(f"{value} is too small; use at least {least}")
        if value > most:
            raise ValueError(f"{value} is too large; use at most {most}")
        if isinstance(value, int) and value % multiple_of:
            rounded_up = -(-value // multiple_of) * multiple_of
            raise ValueError(f"{value} is not a multiple of {multiple_of}; use {rounded_up}")
    return f.metadata["check"](float(value) if f.type is float else value)


def expand_path(value: str) -> str:
    """Check a key that names files: refuse an empty one and expand ~."""
    if not value:
        raise ValueError("is empty; name a path, or omit the key for its default")
    return os.path.expanduser(value)


def check_log_dir(folder: Path) -> None:
    """Raise ValueError unless this user can write below a folder. The folder need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"log_dir: cannot write logs below {existing}; set log_dir to a writable folder")


def suggest(name: str, known: Sequence[str], form: str = "{}", otherwise: str = "") -> str:
    """Return the known name that is spelled similarly, written in `form`; if there is none, name all."""
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f"did you mean {form.format(*similar)}?" if similar else f"use one of {otherwise or ', '.join(known)}"


def read_config(cls: type, path: Path, is_scale: bool = False) -> dict[str, Any]:
    """Return the checked keys of a flat TOML file. Raises ValueError naming the file, the key and the fix."""
    if not path.is_file():
        folder = "configs/scales" if is_scale else "configs"
        known = [file.stem for file in (ROOT / folder).glob("*.toml")]
        raise ValueError(f"{path}: not a file; " + suggest(path.stem, known, folder + "/{}.toml", folder + "/*.toml"))
    with error_context(str(path)):
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a TOML file in UTF-8: {error}; an inline table takes one line") from None
    known = {f.name: f for f in fields(cls)}
    for name, value in values.items():
        with error_context(f"{path}: {name}"):
            if name not in known:
                raise ValueError(f"unknown key; {suggest(name, list(known))}")
            if is_scale and not known[name].metadata["scale"]:
                raise ValueError("a scale sets only size and data; move this key to the config")
            values[name] = check_value(known[name], value)
    return values


def read_override(f: Field, text: str) -> Any:
    """Return the checked value of `--NAME TEXT`. TEXT is a TOML value; a string needs no quotes."""
    with error_context(f"--{f.name}"):
        if f.type is str:
            return check_value(f, text)
        parsed = {}
        with suppress(ValueError, RecursionError):
            parsed = tomllib.loads(f"value = {text}")
        if list(parsed) != ["value"]:
            example = f"--{f.name} '{json.dumps(f.default_factory())}'"
            hint = f"; close its brackets and quote it: {example}" if text.startswith("[") else ""
            raise ValueError(f"expected {TYPES[f.type][0]}, found {json.dumps(text)}{hint}")
        return check_value(f, parsed["value"])


def scale_path(scale: str) -> Path:
    """Return the file of a scale: a path ending in .toml, or a name in configs/scales."""
    return Path(scale) if scale.endswith(".toml") else ROOT / "configs" / "scales" / f"{scale}.toml"


def load(cls: type, config: Path, overrides: dict[str, str]) -> Any:
    """Return an instance of `cls`: options win over the scale, the scale over the config, the config over defaults."""
    values = read_config(cls, config)
    options = {f.name: read_override(f, overrides[f.name]) for f in fields(cls) if f.name in overrides}
    if scale := options.get("scale", values.get("scale", "")):
        with error_context("--scale" if "scale" in options else f"{config}: scale"):
            values |= read_config(cls, scale_path(scale), is_scale=True)
    return cls(**values | options)


class OneLineParser(ArgumentParser):
    """Raise an ArgumentParser's complaints as ValueErrors, so that they are reported in one line, too."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; {' '.join(self.format_usage().split())}, see --help")


def parse_command_line(cls: type, arguments: Sequence[str], about: str) -> tuple[list[Path], dict[str, str], Namespace]:
    """Return the configs, the text of each overridden key, and the options `check`, `json` and `cpu_scale`.

    Raises ValueError for an unknown option, a missing config, or a word that is not a config. Answers --help and exits.
    """
    parser = OneLineParser(usage="%(prog)s CONFIG.toml [--KEY VALUE ...] [--check]", allow_abbrev=False,
                           description=about, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("configs", metavar="CONFIG.toml", nargs="+" if "--json" in arguments else 1, type=Path)
    parser.add_argument("--check", action="store_true", help="check config and data, draw the map, and exit")
    parser.add_argument("--json", action="store_true", help="check, and print a JSON object for each config")
    parser.add_argument("--cpu_scale", default="", help=SUPPRESS)  # with --json: for configs without a scale, on a CPU
    for f in fields(cls):
        default, meaning = f.default_factory(), f.metadata["meaning"]
        shown = "" if default in ("", None) else f" (default: {json.dumps(default)})"
        parser.add_argument(f"--{f.name}", metavar="VALUE", default=SUPPRESS, help=meaning + shown)
    options, unknown = parser.parse_known_args(arguments)
    names = [f.name for f in fields(cls)]
    if unknown and unknown[0].startswith("-"):
        option = unknown[0].partition("=")[0]
        raise ValueError(f"{option}: unknown key; {suggest(option.lstrip('-'), names, '--{}')}")
    if words := [str(path) for path in options.configs if path.suffix != ".toml"] + unknown:
        raise ValueError(f"unexpected argument {words[0]}: name a config by its .toml file, set a key with "
                         "--KEY VALUE, and quote a VALUE with brackets, spaces or *")
    return options.configs, {name: getattr(options, name) for name in names if name in options}, options
