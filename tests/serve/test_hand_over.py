"""From the engine's thread to the event loop: what comes together wakes it once, and an end at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

pytest.importorskip("starlette")

from fomoe_io.serve.dialect import NO_TIMINGS
from fomoe_io.serve.jobs import Ended, Job, Over, Piece, Work

TOKEN = Piece(0, 50, "a", None, NO_TIMINGS)
END = Ended(0, "limit", "", NO_TIMINGS)


class Woken:
    """Counts how often a job wakes its loop."""

    def __init__(self, job: Job) -> None:
        self.times = 0
        self._call = job._call
        job._call = self._counted  # type: ignore[method-assign]

    def _counted(self, act: Callable[[], None]) -> None:
        self.times += 1
        self._call(act)


def test_tokens_that_come_in_a_pause_wake_nobody() -> None:
    async def stream() -> None:
        job = Job(Work([]))
        woken = Woken(job)
        job.emit(TOKEN)
        assert len(await job.events()) == 1 and woken.times == 1
        paused = asyncio.create_task(job.pause(0.05))
        await asyncio.sleep(0)
        for _ in range(30):
            job.emit(TOKEN)
        await paused
        assert len(await job.events()) == 30 and woken.times == 1
        waiting = asyncio.create_task(job.events())  # nothing has come: the next one is waited for
        await asyncio.sleep(0)
        job.emit(TOKEN)
        job.emit(TOKEN)
        assert len(await waiting) == 2 and woken.times == 2

    asyncio.run(stream())


@pytest.mark.parametrize("last", [END, Over(None)])
def test_an_end_does_not_wait_for_the_pause(last: Ended | Over) -> None:
    async def stream() -> None:
        job = Job(Work([]))
        paused = asyncio.create_task(job.pause(30))
        await asyncio.sleep(0)
        job.emit(TOKEN)
        started = time.monotonic()
        job.emit(last)
        await paused
        assert time.monotonic() - started < 5
        assert await job.events() == [TOKEN, last]

    asyncio.run(stream())


def test_an_end_that_comes_before_the_pause() -> None:
    async def stream() -> None:
        job = Job(Work([]))
        job.emit(TOKEN)
        assert await job.events() == [TOKEN]
        job.emit(END)
        started = time.monotonic()
        await job.pause(30)
        assert time.monotonic() - started < 5 and await job.events() == [END]

    asyncio.run(stream())


def test_a_full_job_is_told_once() -> None:
    async def stream() -> None:
        told = []
        job = Job(Work([]), most_pending=3)
        job.on_stalled = lambda: told.append(1)
        for _ in range(10):
            job.emit(TOKEN)
        await asyncio.sleep(0)
        assert told == [1] and job.is_cancelled and job.has_stalled
        assert len(await job.events()) == 4

    asyncio.run(stream())
