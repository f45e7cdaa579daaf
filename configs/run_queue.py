from pathlib import Path
from typing import Any, NamedTuple


class Experiment(NamedTuple):
    config: Path
    options: list[str]
    folder: Path
    ranks: int
    devices: int
    kind: str
    configuration: dict[str, Any]
    code: str
    description: str


def main(arguments, plan):
    print(plan(arguments))
    return 0
