"""What the Python that runs this lacks: `python configs/packages.py REQUIREMENTS.txt ...`; `run.sh` asks several.

Prints the first thing, and exits with status 1 if there is one. Runs on older Pythons too.
"""

import re
import sys

OLDEST_PYTHON = (3, 10)
TORCH = ((2, 11), (2, 13))  # the first and last version that the program runs on


def numbers(version: str) -> tuple:
    """(2, 13) for 2.13.0+cpu."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def lacking(requirements: str) -> str:
    """The first requirement that is not met, "" if all are. `requirements`: the text of a requirements file."""
    if sys.version_info < OLDEST_PYTHON:
        return f"it is Python {sys.version.split()[0]}, and 3.10 to 3.14 is needed"
    from importlib.metadata import PackageNotFoundError, version

    applies = {"": True, 'sys_platform == "linux"': sys.platform == "linux",
               'python_version < "3.11"': sys.version_info < (3, 11)}
    for name, least, marker in re.findall(r"^(\w[\w-]*)([^;\n]*);? *(.*)$", requirements, re.MULTILINE):
        try:
            found = version(name) if applies[marker] else None
        except PackageNotFoundError:
            return f"{name} is missing"
        if found and name == "torch" and not TORCH[0] <= numbers(found) <= TORCH[1]:
            return f"it has PyTorch {found}, and 2.11 to 2.13 is needed"
        if found and name != "torch" and numbers(found) < numbers(least):
            return f"it has {name} {found}, and {name}{least.strip()} is needed"
    return ""


if __name__ == "__main__":
    text = lacking("\n".join(open(path, encoding="utf-8").read() for path in sys.argv[1:]))
    if text:
        print(text)
        sys.exit(1)
