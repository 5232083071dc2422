"""Traces say what the engine did; damaged ones are refused in one line."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.errors import FormatError, ReadError
from fomoe_io.trace.trace import MAGIC, Trace, TraceFile

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = np.random.default_rng(21).integers(0, 8000, 48)


def record(model: Path, path: Path, *, singles: int, **settings: object) -> tuple[dict[str, np.ndarray], dict]:
    """Read the tokens, the last `singles` of them one by one.  What the session recorded, and the counters."""
    config = EngineConfig(context_tokens=64, trace=path, **settings)  # type: ignore[arg-type]
    with Engine.open(model, config) as engine:
        session = engine.session()
        pieces = []
        first = len(TOKENS) - singles
        for part in [TOKENS[:first], *TOKENS[first:, None]]:
            if len(part):
                session.evaluate(part, record=["experts", "weights"])
                pieces.append(session.records)
        assert not path.exists()  # under another name until it is whole
        statistics = engine.statistics()
    return {key: np.concatenate([p[key] for p in pieces], 1) for key in pieces[0]}, statistics


@pytest.mark.parametrize(
    ("singles", "tiers", "batch"),
    [(48, Tiers(0.25, 0.25), 512), (8, Tiers(0.5, 0.25), 16), (16, Tiers(0.125, 0.125), 32), (0, Tiers(0, 0.15), 48)],
    ids=["decode", "batch", "waves", "narrow"],
)
def test_a_trace_says_what_happened(demo_model: Path, tmp_path: Path, singles: int, tiers: Tiers, batch: int) -> None:
    path = tmp_path / "routing.trace"
    seen, statistics = record(demo_model, path, singles=singles, tiers=tiers, batch_tokens=batch, lookahead="off")
    trace = Trace.load(path)
    first = len(TOKENS) - singles
    batches = [min(batch, first - i) for i in range(0, first, batch)] + [1] * singles
    assert trace.batch_tokens.tolist() == batches and trace.tokens == len(TOKENS)
    found: Counter[int] = Counter()
    for number, layer in trace.layers.items():
        assert layer.tokens.tolist() == batches
        np.testing.assert_array_equal(layer.picks, seen["experts"][number])
        np.testing.assert_array_equal(layer.chosen, seen["experts"][number])
        np.testing.assert_array_equal(layer.weights, seen["weights"][number])
        assert layer.found is not None
        found.update(layer.found.ravel().tolist())
    assert len(trace.layers) == seen["experts"].shape[0]
    hits = statistics["tiers"]
    assert [found[i] for i in range(3)] == [hits[tier]["hits"] for tier in ("vram", "dram", "nvme")]
    vram, both = round(32 * tiers.vram), round(32 * (tiers.vram + tiers.dram))
    assert trace.header.slots == ((vram, both - vram),) * 8
    assert hits["nvme"]["hits"] == hits["nvme"]["reads"] > 0


def test_the_warm_start_is_in_it(demo_model: Path, tmp_path: Path) -> None:
    """Everything fits: every expert is read at the start, and the trace says so."""
    record(demo_model, tmp_path / "t", singles=48)
    for layer in Trace.load(tmp_path / "t").layers.values():
        assert sorted(layer.seeds) == list(range(32)) and len(layer.seed_scores) == 32
        assert layer.found is not None and not (layer.found == 2).any()


@pytest.fixture(scope="module")
def good(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("trace") / "good"
    record(demo_model, path, singles=4, tiers=Tiers(0.25, 0.25))
    return path.read_bytes()


def refused(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        Trace.load(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    return caught.value.message


def test_cut_off(good: bytes, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    ends = {0, 3, 8, 12, 15, 16, 40, len(good) - 1, *random.integers(16, len(good), 40).tolist()}
    for end in ends:
        message = refused(good[:end], tmp_path / "cut")
        assert "no routing trace" in message or "cut off" in message or "middle" in message or "no tokens" in message


def test_damaged(good: bytes, tmp_path: Path) -> None:
    """A flipped byte is refused, or changes nothing but values that any trace may have: never a crash."""
    random, refusals = np.random.default_rng(6), 0
    for at in random.integers(0, len(good), 300).tolist() + list(range(40)):
        data = bytearray(good)
        data[at] ^= int(random.integers(1, 256))
        (tmp_path / "flipped").write_bytes(data)
        try:
            trace = Trace.load(tmp_path / "flipped")
        except FormatError as error:
            refusals += "\n" not in error.message
            continue
        for layer in trace.layers.values():
            assert layer.picks.max() < 32 and layer.chosen.max() < 32 and np.isfinite(layer.weights).all()
    assert refusals > 40


def test_a_batch_that_grows_on_its_way(good: bytes, tmp_path: Path) -> None:
    """Layer 1 with more tokens than layer 0 had: what would stand before the first token?"""
    at = 16 + int.from_bytes(good[12:16], "little")
    count = int.from_bytes(good[at + 4 : at + 8], "little")
    second = at + 8 + count * 4 * 9
    assert good[at : at + 4] == b"\1\0\0\0" and good[second : second + 4] == b"\1\0\1\0" and count > 4
    less = good[:at] + b"\1\0\0\0\1\0\0\0" + _columns(good[at + 8 : second], count) + good[second:]
    assert "layer 1 computed more tokens than a batch had" in refused(less, tmp_path / "t")


def _columns(record: bytes, count: int) -> bytes:
    """The first token of a batch's record: 4 weights, picks, chosen and found, each column for itself."""
    places = np.cumsum([0, 16 * count, 8 * count, 8 * count])
    return b"".join(record[place : place + size] for place, size in zip(places, (16, 8, 8, 4), strict=True))


def test_strangers(good: bytes, tmp_path: Path) -> None:
    assert "no routing trace" in refused(b"GGUF" + good[4:], tmp_path / "t")
    assert "version 7" in refused(MAGIC + b"\7\0\0\0" + good[12:], tmp_path / "t")
    assert "cut off" in refused(MAGIC + b"\1\0\0\0\xff\xff\xff\xff" + good[16:], tmp_path / "t")
    assert "contradicts" in refused(good.replace(b'"used":4', b'"used":0'), tmp_path / "t")
    assert "damaged" in refused(good.replace(b'"used":4', b'"used":x'), tmp_path / "t")
    with pytest.raises(FormatError, match="does not exist"):
        Trace.load(tmp_path / "none")


def test_a_full_disk_is_reported_at_the_end(demo_model: Path, tmp_path: Path) -> None:
    """The text comes out, then one line and exit code 1; nothing half-written remains."""
    path = tmp_path / "routing.trace"
    command = [
        sys.executable, "-m", "fomoe_io.cli.run", str(demo_model), "-p", "The sea", "-n", "24", "--raw", "--temp", "0",
        "--trace", str(path),
    ]  # fmt: skip
    limit = 4096

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=small_files)
    assert full.returncode == 1 and full.stdout.startswith("The sea")
    assert full.stderr.splitlines()[-1] == f"fomoe-run: {path}: File too large"
    assert not list(tmp_path.iterdir())
    fine = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert fine.stdout == full.stdout and Trace.load(path).tokens > 24


def test_an_engine_that_fails_to_open_leaves_no_trace(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed warm start leaves the trace of an earlier run alone, and nothing beside it."""
    path = tmp_path / "routing.trace"
    path.write_bytes(b"of an earlier run")

    def fail(engine: Engine) -> None:
        raise ReadError("reading expert 3 of layer 0 failed")

    monkeypatch.setattr(Engine, "_warm", fail)
    with pytest.raises(ReadError, match="expert 3"):
        Engine.open(demo_model, EngineConfig(trace=path))
    assert path.read_bytes() == b"of an earlier run" and list(tmp_path.iterdir()) == [path]


def test_what_is_not_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        TraceFile(tmp_path / "folder", None)  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileExistsError, match="not a regular file"):
        TraceFile(tmp_path / "fifo", None)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "folder"]
