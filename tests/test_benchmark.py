"""The benchmark of the step, at its tiny size: all its parts run and say what they timed."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_every_part_is_timed(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "tests/benchmark.py", "--json", tmp_path / "b.json"],
                            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["left_out"] == record["failed"] == []
    rows = {row["part"]: row for row in record["rows"]}
    assert len(rows) >= 14 and all(row["plain"] > 0 for row in rows.values())
    with_a_fast_path = {"embedding and 3 tables", "MLP", "head and loss", "one sequence, forward and backward"}
    if record["triton"] is not None:
        assert all(rows[name]["fast"] > 0 for name in with_a_fast_path)
        assert set(record["start"]) == {f"{which}, {temperature}" for which in ("plain", "fast") for temperature in ("cold", "warm")}
    assert f"| MLP | {rows['MLP']['plain']:,.2f} |" in result.stdout


@pytest.mark.slow
def test_profile_names_what_takes_longest():
    command = [sys.executable, ROOT / "tests/benchmark.py", "profile"]
    result = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "plain:" in result.stdout and "aten::mm" in result.stdout and "Self CPU time total" in result.stdout


def test_an_unknown_part_is_a_mistake():
    result = subprocess.run([sys.executable, ROOT / "tests/benchmark.py", "part"], capture_output=True, text=True)
    assert result.returncode == 2 and "there is no part part; there are machine, parts," in result.stderr
