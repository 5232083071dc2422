"""The memory budget is the whole process's: its peak resident set stays below --ram."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fomoe_io.cli.run", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def smallest(demo_model: Path) -> int:
    """Smallest budget that the error names, MiB."""
    result = run(str(demo_model), "-p", "x", "--ram", "1M", "-c", "512")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[1].startswith("  fix: --ram ")
    return int(lines[1].split()[-1].removesuffix("M"))


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    """The greedy answers under the budgets so far, which must all be one."""
    return []


@pytest.mark.parametrize("more", [0, 4, 16, 64])
def test_peak_stays_below(demo_model: Path, tmp_path: Path, smallest: int, more: int, answers: list[list[int]]) -> None:
    prompt = "The river ran through the valley, and the road beside it. " * 12
    statistics = tmp_path / "statistics.json"
    result = run(
        str(demo_model), "-p", prompt, "-n", "40", "-c", "512", "--temp", "0",
        "--ram", f"{smallest + more}M", "--json", str(statistics),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values = json.loads(statistics.read_text())
    assert values["peak_rss_bytes"] <= (smallest + more) << 20
    assert values["budgets"]["ram_bytes"] == (smallest + more) << 20
    answers.append(values["token_ids"])
    assert len(values["token_ids"]) == 40 and answers[0] == values["token_ids"]
    if more == 0:
        assert values["budgets"]["slots_per_layer"] < 32
        assert values["tiers"]["nvme"]["hits"] > 0


def test_one_below_the_smallest_is_refused(demo_model: Path, smallest: int) -> None:
    result = run(str(demo_model), "-p", "x", "-c", "512", "--ram", f"{smallest - 4}M")
    assert result.returncode == 1
    assert result.stderr.startswith("fomoe-run: a memory budget of ")
    assert "Traceback" not in result.stderr
