"""bench/box.py on the processor: the floors are of the run, and the drive's is no faster than its pace.

And bench/box_before.py: an old checkout is told of the same reads as this one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fomoe_io.config import EngineConfig, Tuning
from fomoe_io.storage.calibration import Calibration

ROOT = Path(__file__).resolve().parent.parent.parent


def kept_by(name: str, model: Path, output: Path, *more: str, seconds: int) -> Any:
    """What a program of bench/ keeps of the box on the processor, beside this very checkout."""
    command = [
        sys.executable, str(ROOT / "bench" / name), str(model), "--device", "cpu", "--percentage", "100",
        "--pace", "0.05G,80us", "--tokens", "12", "--warmup", "4", "--rounds", "1", "--baseline", str(ROOT),
        *more, "-o", str(output),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert ended.returncode == 0, ended.stderr
    return json.loads(output.read_text())


@pytest.mark.slow
def test_floors_and_turns(demo_model: Path, tmp_path: Path) -> None:
    found = kept_by("box.py", demo_model, tmp_path / "box.json", "--piece", "64K", seconds=100)
    assert found["this"]["settings"] == {"device": "cpu", "piece_bytes": 65536}
    assert found["card"] == "the whole card" and set(found["speedup"]) == {"exact", "car on"}
    for run in (*found["this"]["runs"].values(), *found["baseline"]["runs"].values()):
        assert set(run["floors_ms"]) == {"drive", "card"}
        assert 0 < run["drive_gb_s"] <= 0.055 and run["nvme_bytes_a_token"] > 0
        assert run["over_largest"] == run["token_ms"] / max(run["floors_ms"].values())
    runs = found["this"]["runs"]
    assert runs["exact"]["substituted"] == 0 and runs["car on"]["substituted"] > 0
    assert abs(sum(runs["exact"]["shares"].values()) - 1) < 1e-9


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program of bench/, which finds its neighbours there."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module(name)


def test_what_is_asked_for_and_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that nobody has given are not passed on, nor those that a baseline's configuration does not have."""
    box = script("box", monkeypatch)

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


@pytest.mark.slow
def test_beside_a_commit_before(demo_model: Path, tmp_path: Path) -> None:
    found = kept_by("box_before.py", demo_model, tmp_path / "before.json", "--depth", "2", seconds=200)
    for rule, car in (("exact", "off"), ("car on", "regret:0.034")):
        runs = found[rule]["runs"]
        assert set(found[rule]["speedup"]) == set(runs) - {"baseline"} and len(runs) == 5
        assert {run["car"] for run in runs.values()} == {car}
        assert len({run["misses_a_token"] for run in runs.values()}) == 1
        for name in ("baseline", "this", "this, lookahead auto"):
            assert runs[name]["reader"]["depth"] == 2 and "paced" not in runs[name]["reader"]["mode"]
        assert runs["this, paced"]["drive_gb_s"] <= 0.055


def test_every_commit_is_told_of_the_same_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the file's rules alone, which are as old as the file: longer reads are cut, shorter ones are not."""
    before = script("box_before", monkeypatch)
    before.sub_reads(1 << 20, 4).save(tmp_path / "calibration")
    found = Calibration.load(tmp_path / "calibration")
    assert [found.reads(size)[1] for size in (7 << 20, (1 << 20) + 4096, 1 << 20)] == [1 << 20, 1 << 20, 0]
    options = argparse.Namespace(device="cuda:0", baseline=tmp_path, depth=4, pace="14.5G,80us")
    runs = {name: fields for name, (_, fields) in before.runs_of(options, tmp_path / "calibration").items()}
    assert runs["this"] == runs["baseline"] | {"device": "cuda:0"} and runs["baseline"]["device"] == "cuda"
    assert runs["this, paced"].keys() == {"device", "reader", "pace", "lookahead"}


def test_the_fastest_round_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"baseline": [{"token_ms": 30.0}, {"token_ms": 20.0}], "this": [{"token_ms": 8.0}, {"token_ms": 10.0}]}
    found = script("box_before", monkeypatch).compared(rounds)
    assert found["speedup"] == {"this": 2.5} and found["runs"]["baseline"]["rounds_ms"] == [30, 20]
