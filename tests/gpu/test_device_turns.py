"""The rules of tests/engine/test_turns.py on a GPU (a double): one caller, one process, nothing after close()."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.errors import UsageError
from tests.fake_hip.build import Fake
from tests.tiny_model import Tiny, write_tiny

TOKENS = [3, 141, 59, 26, 5, 35, 89, 79]
SHAPE = Tiny(columns=256, head_columns=64, rotated=32, state_columns=64, hidden=256, shared_hidden=256)


@pytest.fixture
def engine(fake: Fake, tmp_path: Path) -> Iterator[Engine]:
    path = write_tiny(tmp_path / "tiny.gguf", SHAPE, 3)
    with Engine.open(path, EngineConfig(context_tokens=64, device="hip", batch_tokens=4, threads=1)) as engine:
        yield engine


def test_a_second_thread_is_refused_and_harms_nothing(engine: Engine) -> None:
    session = engine.session()
    want = session.prefill(TOKENS)
    session.reset()
    found, errors = [], []

    def other() -> None:
        calls = (lambda: session.decode(1), session.reset, session.close, engine.expert_counts)
        for call in calls:
            try:
                call()
            except UsageError as error:
                errors.append(str(error))
        errors.append(engine.statistics()["device"])

    def progress(done: int, total: int) -> None:
        if done < total:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(30)
            with pytest.raises(UsageError, match="run of its own"):
                engine.close()

    found = session.prefill(TOKENS, progress)
    assert len(errors) == 5 and all("busy in another thread" in text for text in errors[:4])
    np.testing.assert_array_equal(found, want)


def test_after_close_everything_is_refused(engine: Engine) -> None:
    session = engine.session()
    session.decode(1)
    engine.close()
    engine.close()
    for call in (lambda: session.decode(1), session.reset, engine.session, engine.statistics, engine.expert_counts):
        with pytest.raises(UsageError, match="closed"):
            call()
    session.close()


def test_closing_ends_a_prompt_of_another_thread_between_its_batches(engine: Engine) -> None:
    session, inside, errors = engine.session(), threading.Event(), []

    def read() -> None:
        try:
            session.prefill(TOKENS * 4, lambda done, total: inside.set() or time.sleep(0.2))
        except UsageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert inside.wait(30)
    engine.close()
    thread.join(30)
    assert errors == ["the engine was closed while it ran"]


def test_a_fork_is_refused_and_leaves_the_engine_alone(engine: Engine) -> None:
    session = engine.session()
    want = session.prefill(TOKENS)
    process = os.fork()
    if not process:
        try:
            signal.alarm(20)
            for call in (lambda: session.decode(1), session.reset, engine.session, engine.statistics):
                with pytest.raises(UsageError, match="another process"):
                    call()
            session.close()
            engine.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    session.reset()
    np.testing.assert_array_equal(session.prefill(TOKENS), want)
