"""bench/box.py on the processor: the floors are of the run, and the drive's is no faster than its pace."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fomoe_io.config import EngineConfig, Tuning

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_floors_and_turns(demo_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "box.json"
    command = [
        sys.executable, str(ROOT / "bench/box.py"), str(demo_model), "--device", "cpu", "--percentage", "100",
        "--pace", "0.05G,80us", "--tokens", "12", "--warmup", "4", "--rounds", "1", "--baseline", str(ROOT),
        "--piece", "64K", "-o", str(output),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(output.read_text())
    assert found["this"]["settings"] == {"device": "cpu", "piece_bytes": 65536}
    assert found["card"] == "the whole card" and set(found["speedup"]) == {"exact", "car on"}
    for run in (*found["this"]["runs"].values(), *found["baseline"]["runs"].values()):
        assert set(run["floors_ms"]) == {"drive", "card"}
        assert 0 < run["drive_gb_s"] <= 0.055 and run["nvme_bytes_a_token"] > 0
        assert run["over_largest"] == run["token_ms"] / max(run["floors_ms"].values())
    runs = found["this"]["runs"]
    assert runs["exact"]["substituted"] == 0 and runs["car on"]["substituted"] > 0
    assert abs(sum(runs["exact"]["shares"].values()) - 1) < 1e-9


def test_what_is_asked_for_and_known() -> None:
    """Options that nobody has given are not passed on, nor those that a baseline's configuration does not have."""
    spec = importlib.util.spec_from_file_location("box", ROOT / "bench/box.py")
    assert spec and spec.loader
    box = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(box)

    @dataclass
    class Before:
        branches: int = 2

    plain = {"device": "cpu", "pace": "none", "reader": "pread", "calibration": None}
    nothing = argparse.Namespace(**plain, piece=None, in_place=False, sm=None, threads=None, kernel=[])
    asked = argparse.Namespace(
        **plain,
        piece=1 << 20,
        in_place=True,
        sm="pingpong",
        threads=3,
        kernel=[box.kernel_tuning("PREFETCH_BYTES=8192")],
    )
    tuned = Tuning(piece_bytes=1 << 20, reads_in_place=True, kernel_tuning=(("PREFETCH_BYTES", 8192),))
    assert box.settings(nothing).tuning == Tuning() and not box.asked_for(nothing, EngineConfig)
    assert box.settings(asked).tuning == tuned
    assert box.settings(asked).split_mode == "pingpong" and box.settings(asked).threads == 3
    assert not box.asked_for(asked, Before)
