"""An interrupt ends a run within a second, and what follows is as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.config import Tiers
from fomoe_io.cpu.backend import CpuBackend
from fomoe_io.experts.car import CarRule
from fomoe_io.text.generation import Conversation

TOKENS = list(range(100, 140))
ROOT = Path(__file__).resolve().parent.parent.parent


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Ctrl-C after so long, if the block has not ended by then."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupted_between_batches(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    conversation.read(TOKENS[:20], stop)


def interrupted_in_a_token(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(backend: CpuBackend, code: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CpuBackend, "_check", stop)
        conversation.read(TOKENS[:20])


@pytest.mark.parametrize("interrupt", [interrupted_between_batches, interrupted_in_a_token])
def test_the_next_question_is_read_whole(demo_model: Path, monkeypatch: pytest.MonkeyPatch, interrupt: object) -> None:
    with Engine.open(demo_model, EngineConfig(context_tokens=256, batch_tokens=8)) as engine:
        want = Conversation(engine.timeline()).read(TOKENS)
        conversation = Conversation(engine.timeline())
        with pytest.raises(KeyboardInterrupt):
            interrupt(conversation, monkeypatch)  # type: ignore[operator]
        np.testing.assert_array_equal(conversation.read(TOKENS), want)
        assert conversation.session.position == len(TOKENS)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_ends_within_a_second(demo_model: Path, threads: int) -> None:
    """2048 tokens in one batch take many seconds."""
    how = EngineConfig(context_tokens=4096, batch_tokens=2048, threads=threads)
    prompt = np.random.default_rng(1).integers(0, 300, 2048)
    with Engine.open(demo_model, how) as engine:
        session = engine.session()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt), interrupt_after(0.3):
            session.evaluate(prompt)
        assert time.monotonic() - started < 1.3
        assert session.is_broken


ENGINES: dict[str, dict[str, Any]] = {
    "uring": {"reader": "uring"},
    "pread": {"reader": "pread"},
    "lookahead": {"lookahead": 6},
    "back-fill": {"car": CarRule.parse("regret:0.5,backfill=2")},
}


@pytest.mark.parametrize("how", ENGINES.values(), ids=ENGINES)
def test_the_engine_is_whole_after_interrupts_anywhere(demo_model: Path, how: dict[str, Any]) -> None:
    """Few slots, so that reads are in flight nearly always."""
    config = EngineConfig(context_tokens=256, threads=2, tiers=Tiers(0.1, 0.2), **how)
    random, interrupted = np.random.default_rng(7), 0
    with Engine.open(demo_model, config) as engine:
        session = engine.session()
        want = session.evaluate(TOKENS)
        for _ in range(12):
            with suppress(KeyboardInterrupt), interrupt_after(random.uniform(0.001, 0.1)):
                for token in TOKENS:
                    session.decode(token)
                session.prefill(TOKENS * 3)
            interrupted += session.is_broken
            session.reset()
            np.testing.assert_array_equal(session.evaluate(TOKENS), want)
            session.reset()
    assert interrupted


SLOW = """
import signal, sys, time
from fomoe_io import Engine, EngineConfig
from fomoe_io.config import Tiers

def stop(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, stop)
what, path = sys.argv[1:]
started = time.monotonic()
try:
    if what == "open":
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        Engine.open(path, EngineConfig(reader="pread", threads=2, ring_depth=16))
    engine = Engine.open(path, EngineConfig(reader="pread", threads=2, ring_depth=16, tiers=Tiers(0.1, 0.2)))
    session = engine.session()
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    session.prefill(range(200))
except KeyboardInterrupt:
    print(time.monotonic() - started - 0.5)
"""


@pytest.mark.parametrize("what", ["open", "prefill"])
def test_waits_for_a_slow_drive_end_too(demo_model: Path, tmp_path: Path, what: str) -> None:
    library = tmp_path / "fault_shim.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the package was built with a compiler"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", str(ROOT / "tests/fault_shim.c"), "-o", str(library), "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAULT": "slow", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", SLOW, what, str(demo_model)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and float(result.stdout) < 1, result.stdout + result.stderr
