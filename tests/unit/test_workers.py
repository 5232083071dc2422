"""layout_tool's threads: what becomes of tasks when one of them fails."""

from __future__ import annotations

import threading

import pytest

from layout_tool.workers import THREADS, Buffers, run_tasks


@pytest.mark.parametrize("turn", range(5))  # the futures that have ended come in any order
def test_what_succeeded_beside_a_failure_is_handed_on(turn: int) -> None:
    """What a job has written is told to its journal, whichever of its threads the main one sees first."""
    ended, others_ended, fails, told = [], threading.Event(), threading.Event(), []

    def work(task: int, buffers: Buffers) -> int:
        assert buffers.out.nbytes >= 16
        if task == turn + 1:
            assert others_ended.wait(30)
            fails.set()
            raise OSError("no space left")
        ended.append(task)
        if len(ended) == 2 * THREADS - 1:
            others_ended.set()
        return 10 * task

    def done(task: int, result: int) -> None:
        assert fails.wait(30)  # so that the main thread finds the rest of them ended, the one that failed among them
        told.append((task, result))

    with pytest.raises(OSError, match="no space left"):
        run_tasks(range(2 * THREADS), work, done, 16)
    assert sorted(told) == [(task, 10 * task) for task in range(2 * THREADS) if task != turn + 1]
