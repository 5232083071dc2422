"""One thread at a time, one process, nothing after close(): what breaks the rule is told so, and nothing is harmed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, Session
from fomoe_io.errors import UsageError

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 300, 40)]
READERS = ["uring", "pread"]


def config(reader: str = "auto", **how: Any) -> EngineConfig:
    return EngineConfig(context_tokens=512, threads=2, batch_tokens=8, reader=reader, **how)


@pytest.fixture(params=READERS)
def engine(request: pytest.FixtureRequest, demo_model: Path) -> Iterator[Engine]:
    with Engine.open(demo_model, config(request.param, ram_bytes=None, sessions=8)) as engine:
        yield engine


class Outcome:
    """What a call in another thread gives or raises."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.value: object = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(call,), daemon=True)
        self._thread.start()

    def _work(self, call: Callable[[], object]) -> None:
        try:
            self.value = call()
        except BaseException as error:
            self.error = error

    def join(self) -> Outcome:
        self._thread.join(30)
        assert not self._thread.is_alive(), "it hangs"
        return self


class InsideARun:
    """Another thread that reads a prompt and stays between two of its batches."""

    def __init__(self, session: Session) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.outcome = Outcome(lambda: session.prefill(TOKENS, self._progress))

    def _progress(self, done: int, total: int) -> None:
        self.inside.set()
        self.go_on.wait(30)

    def __enter__(self) -> InsideARun:
        assert self.inside.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.outcome.join()


def test_a_second_thread_is_refused_and_harms_nothing(engine: Engine) -> None:
    want = engine.session().prefill(TOKENS)
    session, other = engine.session(), engine.session()
    with InsideARun(session) as run:
        calls: list[Callable[[], object]] = [
            lambda: session.decode(1), lambda: other.decode(1), lambda: other.prefill(TOKENS),
            lambda: other.evaluate(TOKENS), other.reset, session.reset, session.close, engine.reset_statistics,
            engine.expert_counts, engine.expert_tiers,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(UsageError, match="busy in another thread"):
                call()
        assert engine.statistics()["expert_requests"] >= 0  # of before the run
    np.testing.assert_array_equal(run.outcome.value, want)
    other.decode(1)


def test_many_threads_give_right_logits_or_say_busy(engine: Engine) -> None:
    want = engine.session().prefill(TOKENS)

    def work() -> int:
        session, finished = engine.session(), 0
        while finished < 3:
            try:
                session.reset()
                logits = session.prefill(TOKENS)
            except UsageError as error:
                assert "busy" in str(error)
                time.sleep(0.001)
            else:
                np.testing.assert_array_equal(logits, want)
                finished += 1
        return finished

    for outcome in [Outcome(work) for _ in range(4)]:
        assert outcome.join().error is None


def test_a_callback_of_the_run_may_look_but_not_touch(engine: Engine) -> None:
    session, seen = engine.session(), []

    def progress(done: int, total: int) -> None:
        seen.append(engine.statistics()["expert_requests"])
        assert engine.expert_counts() and engine.expert_tiers()
        for call in (session.reset, engine.close, lambda: session.decode(1)):
            with pytest.raises(UsageError, match="run of its own"):
                call()

    session.prefill(TOKENS, progress)
    assert len(seen) == 5 and seen == sorted(set(seen))


def every_call(engine: Engine, session: Session) -> dict[str, Callable[[], object]]:
    return {
        "decode": lambda: session.decode(1),
        "prefill": lambda: session.prefill(TOKENS),
        "evaluate": lambda: session.evaluate(TOKENS),
        "checked": lambda: session.checked(TOKENS),
        "reset": session.reset,
        "session": engine.session,
        "statistics": engine.statistics,
        "reset_statistics": engine.reset_statistics,
        "expert_counts": engine.expert_counts,
        "expert_tiers": engine.expert_tiers,
    }


def test_after_close_everything_is_refused(engine: Engine) -> None:
    session = engine.session()
    session.decode(1)
    engine.close()
    engine.close()
    for name, call in every_call(engine, session).items():
        with pytest.raises(UsageError, match="closed"):
            call()
            pytest.fail(name)
    session.close()
    session.close()
    assert engine.tokenizer.encode("a")


def test_a_closed_session_is_refused_and_others_go_on(engine: Engine) -> None:
    session, other = engine.session(), engine.session()
    session.close()
    for name in ("decode", "prefill", "evaluate", "checked", "reset"):
        with pytest.raises(UsageError, match="session is closed"):
            every_call(engine, session)[name]()
    other.decode(1)


@pytest.mark.parametrize("reader", READERS)
def test_closing_ends_the_run_of_another_thread(demo_model: Path, reader: str) -> None:
    for moment in np.random.default_rng(1).uniform(0, 0.02, 10):
        engine = Engine.open(demo_model, config(reader))
        session = engine.session()

        def decode_for_ever(session: Session = session) -> None:
            while True:
                session.reset()
                session.prefill(TOKENS)

        outcome = Outcome(decode_for_ever)
        time.sleep(moment)
        started = time.monotonic()
        engine.close()
        assert time.monotonic() - started < 2
        assert isinstance(outcome.join().error, UsageError) and "closed" in str(outcome.error)


def test_the_context_manager_closes_after_an_error(demo_model: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), Engine.open(demo_model, config()) as engine:
        session = engine.session()
        raise RuntimeError("mine")
    with pytest.raises(UsageError, match="closed"):
        session.decode(1)


@pytest.mark.parametrize("reader", READERS)
def test_a_fork_is_refused_and_leaves_the_engine_alone(demo_model: Path, reader: str, tmp_path: Path) -> None:
    trace = tmp_path / "a.trace"
    with Engine.open(demo_model, config(reader, trace=trace)) as engine:
        session = engine.session()
        want = session.prefill(TOKENS)
        process = os.fork()
        if not process:
            try:
                signal.alarm(20)
                for call in every_call(engine, session).values():
                    with pytest.raises(UsageError, match="another process"):
                        call()
                session.close()
                engine.close()
                engine.close()
                del session, engine
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        session.reset()
        np.testing.assert_array_equal(session.prefill(TOKENS), want)
    assert trace.stat().st_size


def test_a_fork_while_another_thread_runs(engine: Engine) -> None:
    with InsideARun(engine.session()):
        process = os.fork()
        if not process:
            signal.alarm(20)
            engine.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_a_fork_may_open_its_own_and_exit_as_usual(demo_model: Path) -> None:
    code = f"""
import multiprocessing
from fomoe_io import Engine, EngineConfig
how = EngineConfig(context_tokens=64, threads=2)
def work(path):
    with Engine.open(path, how) as engine:
        return engine.session().decode(3).tobytes()
with Engine.open({str(demo_model)!r}, how) as engine:
    want = engine.session().decode(3).tobytes()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(work, [{str(demo_model)!r}] * 2) == [want, want]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2.0, 3], "token 1 is 2.0"),
        (np.array([1.0, 2.0]), "token 0 is 1.0"),
        ([5, 2**32 + 5], f"token 1 is {2**32 + 5}"),
        ([5, 2**70], f"token 1 is {2**70}"),
        ([-1], "token 0 is -1"),
        (np.array([3, 4], np.uint64), None),
        (np.array([True, False]), "token 0 is True"),
        (["a"], "token 0 is 'a'"),
        ("abc", "flat sequence"),
        ([[1, 2]], "flat sequence"),
        ([[1], [2, 3]], "flat sequence"),
        ([], "one or more"),
        (np.empty(0, np.int32), "one or more"),
        (range(4), None),
        ((7, np.int16(8)), None),
        ([None], "token 0 is None"),
    ],
)
def test_tokens_are_integers_of_the_vocabulary(engine: Engine, tokens: Any, message: str | None) -> None:
    session = engine.session()
    if message is None:
        assert session.checked(tokens).dtype == np.int32
    else:
        with pytest.raises(UsageError, match=message):
            session.evaluate(tokens)
        assert not session.is_broken


@pytest.mark.parametrize("token", [1.5, 2**32 + 1, -1, "a", None])
def test_a_single_token_is_checked_alike(engine: Engine, token: Any) -> None:
    with pytest.raises(UsageError, match="token 0 is"):
        engine.session().decode(token)
