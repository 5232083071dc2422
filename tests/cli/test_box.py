"""bench/box.py on the processor: the floors are of the run, and the drive's is no faster than its pace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_floors_and_turns(demo_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "box.json"
    command = [
        sys.executable, str(ROOT / "bench/box.py"), str(demo_model), "--device", "cpu", "--percentage", "100",
        "--pace", "0.05G,80us", "--tokens", "12", "--warmup", "4", "--rounds", "1", "--baseline", str(ROOT),
        "-o", str(output),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(output.read_text())
    assert found["card"] == "the whole card" and set(found["speedup"]) == {"exact", "car on"}
    for run in (*found["this"]["runs"].values(), *found["baseline"]["runs"].values()):
        assert set(run["floors_ms"]) == {"drive", "card"}
        assert 0 < run["drive_gb_s"] <= 0.055 and run["nvme_bytes_a_token"] > 0
        assert run["over_largest"] == run["token_ms"] / max(run["floors_ms"].values())
    runs = found["this"]["runs"]
    assert runs["exact"]["substituted"] == 0 and runs["car on"]["substituted"] > 0
    assert abs(sum(runs["exact"]["shares"].values()) - 1) < 1e-9
