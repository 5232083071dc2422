"""bench/io_soak.py itself, short; and what it must notice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "bench/io_soak.py"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("io_soak", SCRIPT)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["io_soak"] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


def run(folder: Path, seconds: int) -> dict[str, object]:
    command = [sys.executable, str(SCRIPT), "--filename", str(folder / "data"), "--size", "32M", "--bursts", "1",
               "--seconds", str(seconds), "-o", str(folder / "o.json")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 2 * seconds)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("nothing lost, nothing wrong, nothing left behind\n")
    assert not (folder / "data").exists()
    values = json.loads((folder / "o.json").read_text())
    assert isinstance(values, dict)
    return values


def test_a_short_soak(tmp_path: Path) -> None:
    values = run(tmp_path, 2)
    assert values["problem"] == "" and values["queue_full"]
    for what in ("reads", "cancels_asked", "promotions_asked", "readers"):
        assert isinstance(values[what], int) and values[what] > 0


@pytest.mark.slow
def test_a_longer_soak(tmp_path: Path) -> None:
    """Long enough for every setting to come round several times."""
    values = run(tmp_path, 120)
    assert isinstance(values["modes"], dict) and {"plain", "pread"} <= set(values["modes"])
    assert isinstance(values["cancelled"], int) and values["cancelled"] > 100


def test_wrong_bytes_are_noticed(module: ModuleType, tmp_path: Path) -> None:
    records = module.make_file(tmp_path / "data", 4 << 20, 1)
    with (tmp_path / "data").open("r+b") as stream:
        for record in records:
            stream.seek(record.offset + record.bytes // 2)
            stream.write(b"\x00\x01\x02\x03\x04\x05\x06\x07")
    _, problem = module.soak(tmp_path / "data", records, 0, 1, 1.0, 2)
    assert problem.startswith("wrong bytes at offset ")


def test_leaks_are_noticed(module: ModuleType) -> None:
    flat = [{"resident_bytes": 1 << 20, "descriptors": 5, "threads": 2} for _ in range(6)]
    assert module.leak(flat, 2) == ""
    assert (
        module.leak([*flat, {**flat[0], "resident_bytes": 64 << 20}], 2) == "resident memory grew by 66,060,288 bytes"
    )
    assert module.leak([*flat, {**flat[0], "descriptors": 6}], 2) == "descriptors changed: [5, 6]"
    assert module.leak([*flat, {**flat[0], "threads": 3}], 2) == "threads changed: [2, 3]"
