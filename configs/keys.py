"""Read the keys of a frozen dataclass from TOML files and from `--KEY VALUE`; a mistake is a ValueError of one line.

The dataclass is an argument everywhere; its fields are made by `key`, which says what a key means and what it may be.
"""

import argparse
import difflib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

# A key of a new type is one line here: what its values are called, and how to recognise one.
TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer", lambda value: type(value) is int),
    int | None: ("an integer", lambda value: type(value) is int),
    float: ("a number", lambda value: type(value) in (int, float)),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a string", lambda value: type(value) is str),
    list[list[int]]: ("a list of lists of integers, as in [[0, 13], [1, 14]]", lambda value: type(value) is list),
}


def key(default: Any, meaning: str, *, at_least: float = -math.inf, at_most: float = math.inf, multiple_of: int = 1,
        check: Callable[[Any], Any] = lambda value: value, scale: bool = False) -> Any:
    """A field for a config key: its default, its meaning, a number's limits, and whether a scale may set it.

    `check` returns the value, perhaps changed, or raises ValueError.
    """
    limits = dict(at_least=at_least, at_most=at_most, multiple_of=multiple_of)
    metadata = dict(meaning=meaning, limits=limits, check=check, scale=scale)
    return field(default_factory=lambda: default, metadata=metadata)


@contextmanager
def error_context(source: str) -> Iterator[None]:
    """Put a file and key, or an option, in front of an error's message; an OSError becomes a ValueError."""
    try:
        yield
    except ValueError as error:
        error.args = (f"{source}: {error}",)
        raise
    except OSError as error:
        raise ValueError(f"{source}: {error}") from None


def check_limits(value: float, at_least: float, at_most: float, multiple_of: int) -> None:
    """Raises ValueError if a number is outside its range (NaN is outside every range)."""
    if not value >= at_least:
        raise ValueError(f"{value} is too small; use at least {at_least}")
    if not value <= at_most:
        raise ValueError(f"{value} is too large; use at most {at_most}")
    if isinstance(value, int) and value % multiple_of:
        raise ValueError(f"{value} is not a multiple of {multiple_of}; use {-(-value // multiple_of) * multiple_of}")


def check_value(f: Field, value: Any) -> Any:
    """The value of one key, checked on its own. Raises ValueError if the type or the value is wrong."""
    if f.type not in TYPES:
        raise ValueError(f"its type {f.type} is not known; add a line to TYPES in configs/keys.py")
    name, has_type = TYPES[f.type]
    if not has_type(value):
        raise ValueError(f"expected {name}, found {json.dumps(value, default=str)}")
    value = float(value) if f.type is float else value
    if isinstance(value, (int, float)):
        check_limits(value, **f.metadata["limits"])
    return f.metadata["check"](value)


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is spelled most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def read_config(cls: type, path: Path, is_scale: bool = False) -> dict[str, Any]:
    """The checked keys of a flat TOML file. Raises ValueError naming the file, the key and the fix."""
    if not path.is_file():
        folder = "configs/scales" if is_scale else "configs"
        known = [file.stem for file in (Path(__file__).parent.parent / folder).glob("*.toml")]
        raise ValueError(f"{path}: no such file; did you mean {folder}/{nearest(path.stem, known)}.toml?")
    with error_context(str(path)):
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"not a TOML file in UTF-8: {error}") from None
    known = {f.name: f for f in fields(cls)}
    for name, value in values.items():
        with error_context(f"{path}: {name}"):
            if name not in known:
                raise ValueError(f"unknown key; the nearest known one is {nearest(name, known)}")
            if is_scale and not known[name].metadata["scale"]:
                raise ValueError("a scale sets size and data only; move this key to the config")
            values[name] = check_value(known[name], value)
    return values


def read_override(f: Field, text: str) -> Any:
    """The checked value of `--NAME TEXT`: TEXT as it would stand in TOML, a string also without quotes."""
    with error_context(f"--{f.name}"):
        if f.type is str:
            return check_value(f, text)
        try:
            parsed = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            parsed = {}
        if list(parsed) != ["value"]:
            hint = f"; quote the list: --{f.name} '{json.dumps(f.default_factory())}'" if text.startswith("[") else ""
            raise ValueError(f"expected {TYPES[f.type][0]}, found {json.dumps(text)}{hint}")
        return check_value(f, parsed["value"])


def load(cls: type, config: Path, overrides: dict[str, str]) -> Any:
    """Defaults, then the config file, then the scale's file, then the options. Raises ValueError as the readers do."""
    values = read_config(cls, config)
    options = {f.name: read_override(f, overrides[f.name]) for f in fields(cls) if f.name in overrides}
    if scale := options.get("scale", values.get("scale", "")):  # a file, or a name in configs/scales
        path = Path(scale) if scale.endswith(".toml") else Path(__file__).parent / "scales" / f"{scale}.toml"
        with error_context("--scale" if "scale" in options else f"{config}: scale"):
            values |= read_config(cls, path, is_scale=True)
    return cls(**values | options)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ValueErrors, so that they too are reported in one line."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; {' '.join(self.format_usage().split())}, --help says more")


def parse_command_line(cls: type, arguments: Sequence[str], about: str) -> tuple[list[Path], dict[str, str], bool]:
    """The configs, the text of each overridden key, and whether only to check.

    Raises ValueError for an unknown option, no config, or a word that is no config.
    """
    parser = OneLineParser(usage="%(prog)s CONFIG.toml [--KEY VALUE ...] [--check]", allow_abbrev=False,
                           description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", metavar="CONFIG.toml", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="check config and data, show the map, and stop")
    for f in fields(cls):
        default, meaning = f.default_factory(), f.metadata["meaning"]
        shown = "" if default in ("", None) else f" (default: {json.dumps(default)})"
        parser.add_argument(f"--{f.name}", metavar="VALUE", default=argparse.SUPPRESS, help=meaning + shown)
    options, unknown = parser.parse_known_args(arguments)
    given = vars(options)
    configs, only_check = given.pop("configs"), given.pop("check")
    if unknown and unknown[0].startswith("-"):
        option, names = unknown[0].partition("=")[0], [f.name for f in fields(cls)]
        raise ValueError(f"{option}: unknown key; the nearest known one is --{nearest(option.lstrip('-'), names)}")
    if words := [str(path) for path in configs if path.suffix != ".toml"] + unknown:
        raise ValueError(f"unexpected argument {words[0]}: a config ends in .toml, a key is set with --KEY VALUE; "
                         "quote a VALUE with brackets, spaces or *")
    return configs, given, only_check
