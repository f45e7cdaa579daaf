"""The benchmark of the step, at its tiny size: every part runs and says what it timed."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytest.importorskip("triton")


def run_benchmark(*arguments):
    command = [sys.executable, ROOT / "tests/benchmark.py", *arguments]
    return subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)


def test_an_unknown_part_is_a_mistake():
    result = run_benchmark("part")
    assert result.returncode == 2 and "there is no part part; there are machine, parts," in result.stderr


@pytest.mark.slow
def test_plain_and_candidates_are_compared(tmp_path):
    result = run_benchmark("machine", "parts", "--json", tmp_path / "b.json")
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["left_out"] == record["failed"] == []
    rows = {row["part"]: row for row in record["rows"]}
    for name in ("embedding and 3 tables", "MLP", "head and loss"):
        assert all(rows[name][key] > 0 for key in ("plain", "candidates", "floor"))
    assert f"| MLP | {rows['MLP']['plain']:,.2f} |" in result.stdout


@pytest.mark.campaign
def test_the_other_parts_run(tmp_path):
    result = run_benchmark("step", "tables", "start", "profile", "options", "--json", tmp_path / "b.json")
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["left_out"] == record["failed"] == []
    assert {"one sequence", "a validation sequence", "Muon, all"} <= {row["part"] for row in record["rows"]}
    assert set(record["figures"]) == {"start, cold", "start, warm"}
    assert "Self CPU time total" in result.stdout
