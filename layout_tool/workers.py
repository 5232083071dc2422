"""A few threads that read, copy and write, each with buffers of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np

from layout_tool.direct import aligned_buffer, scratch_buffer

Task = TypeVar("Task")
Result = TypeVar("Result")

THREADS = 4
"""Enough for reads, hashing and writes to overlap, with a queue of four on the drive."""


class Buffers(threading.local):
    """Per thread: `out`, and `scratch` with room for a block before and after what fits in `out`."""

    def __init__(self, size: int) -> None:
        self.out: np.ndarray = aligned_buffer(size)
        self.scratch: np.ndarray = scratch_buffer(size)


def run_tasks(
    tasks: Iterable[Task],
    work: Callable[[Task, Buffers], Result],
    done: Callable[[Task, Result], None],
    buffer_bytes: int,
) -> None:
    """Run `work` on every task in a few threads and hand each result to `done` in the calling thread.

    The first error stops everything: tasks already begun are finished, so no thread writes afterwards, and those that
    succeeded are handed on, too.
    """
    buffers = Buffers(buffer_bytes)
    waiting: dict[Future[Result], Task] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for task in tasks:
                waiting[pool.submit(work, task, buffers)] = task
                if len(waiting) >= 2 * THREADS:
                    _collect(waiting, done)
            while waiting:
                _collect(waiting, done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            for future, task in waiting.items():
                if not future.cancelled() and future.exception() is None:
                    done(task, future.result())
            raise


def _collect(waiting: dict[Future[Result], Task], done: Callable[[Task, Result], None]) -> None:
    finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in finished:
        done(waiting.pop(future), future.result())
