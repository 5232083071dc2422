"""A request on its way to the engine, what comes back, and the queue of those that wait: first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fomoe_io.serve.errors import ApiError, busy, unavailable
from fomoe_io.serve.sampling import Choosing, Probability

StopType = Literal["eos", "word", "limit"]


class Known(NamedTuple):
    """A prompt's tokens, and where the last message of the user begins."""

    tokens: array[int]
    turn: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """One answer that is wanted: a prompt (of type "i": many may wait), and how its tokens are chosen."""

    tokens: array[int]
    choosing: Choosing
    turn: int | None = None
    """Where the last message of the user begins."""
    other: Known | None = None
    """Another form of the prompt, which is taken where more of it is known."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of the engine; its runs are done one after the other.

    Attributes
    ----------
    runs : sequence of Run
    most : int
        Tokens of an answer; -1 is the context's end.
    stops : sequence of str
    ignore_eos : bool
    reuse : bool
        Whether what a session has read already may count.
    """

    runs: Sequence[Run]
    most: int = -1
    stops: Sequence[str] = ()
    ignore_eos: bool = False
    reuse: bool = True


@dataclass(frozen=True, slots=True)
class SlotWork:
    """What is asked of the session itself: to be saved to a file, restored from it, or erased."""

    action: Literal["save", "restore", "erase"]
    path: Path


class Timings(NamedTuple):
    """Of one run so far."""

    cached: int
    prompt: int
    prompt_seconds: float
    predicted: int
    predicted_seconds: float

    def document(self) -> dict[str, Any]:
        """llama-server's `timings`; a rate of nothing is 0, never null."""
        return {
            "cache_n": self.cached,
            "prompt_n": self.prompt,
            "prompt_ms": 1e3 * self.prompt_seconds,
            "prompt_per_token_ms": 1e3 * _ratio(self.prompt_seconds, self.prompt),
            "prompt_per_second": _ratio(self.prompt, self.prompt_seconds),
            "predicted_n": self.predicted,
            "predicted_ms": 1e3 * self.predicted_seconds,
            "predicted_per_token_ms": 1e3 * _ratio(self.predicted_seconds, self.predicted),
            "predicted_per_second": _ratio(self.predicted, self.predicted_seconds),
        }


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0


class Started(NamedTuple):
    """A run has come to the engine."""

    run: int
    prompt_tokens: int
    cached_tokens: int


class Progress(NamedTuple):
    """How much of a prompt is read, before each piece and at the end; `processed` counts the cached tokens, too."""

    run: int
    total: int
    cached: int
    processed: int
    seconds: float


class Piece(NamedTuple):
    """A token, and the text that can be shown after it; token -1 is what was held back at the end."""

    run: int
    token: int
    text: str
    probability: Probability | None
    timings: Timings


class Ended(NamedTuple):
    """A run is complete."""

    run: int
    stop_type: StopType
    stop_text: str
    timings: Timings


class Told(NamedTuple):
    """What became of a slot's work."""

    document: dict[str, Any]


class Over(NamedTuple):
    """The last event of every job."""

    error: ApiError | None


Event = Started | Progress | Piece | Ended | Told | Over


class Job:
    """Work with the way back to the client.  Made on the event loop; `emit` is called by the engine's thread.

    A loop that will look by itself, as it does when it was told to pause, is not woken for what can wait so long: a
    wake-up takes the processor from the engine.

    Parameters
    ----------
    work : Work or SlotWork
    most_pending : int or None
        Events that may wait to be sent: a client that lets more come together has stalled.

    Attributes
    ----------
    unwanted_since : float
        By the clock of time.monotonic(); infinity while somebody waits for the answer.
    has_stalled : bool
    on_stalled : callable
        Called on the loop when that happens.
    """

    def __init__(self, work: Work | SlotWork, most_pending: int | None = None) -> None:
        self.work = work
        self.created = time.monotonic()
        self.unwanted_since = math.inf
        self.on_stalled: Callable[[], None] = lambda: None
        self._most_pending = most_pending
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._is_awaited = True  # by a loop that sleeps until it is woken
        self.has_stalled = False

    def cancel(self) -> None:
        """The answer is no longer wanted: the engine ends it soon."""
        self.unwanted_since = min(self.unwanted_since, time.monotonic())

    @property
    def is_cancelled(self) -> bool:
        """Whether it was."""
        return self.unwanted_since < math.inf

    def emit(self, event: Event) -> None:
        """From any thread: an event for the client."""
        if self.has_stalled and not isinstance(event, Over):
            return
        self._events.append(event)
        if self._most_pending is not None and len(self._events) > self._most_pending and not self.has_stalled:
            self.has_stalled = True
            self.cancel()
            self._call(self.on_stalled)
        if self._is_awaited or isinstance(event, Ended | Over):  # once for all that come until they are taken
            self._is_awaited = False
            self._call(self._arrived.set)

    def _call(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed by a second Ctrl-C
            self._loop.call_soon_threadsafe(act)

    async def events(self) -> list[Event]:
        """Wait for events; all that have come, at times none."""
        if not self._events:
            self._is_awaited = True
            if not self._events:  # what came before that was seen woke nobody
                await self._arrived.wait()
            self._is_awaited = False
        self._arrived.clear()
        return [self._events.popleft() for _ in range(len(self._events))]

    async def pause(self, seconds: float) -> None:
        """Let events come together, until an answer ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._arrived.wait()


class JobQueue:
    """Jobs that wait for the engine.

    Parameters
    ----------
    most_waiting : int
        Beside the one at work.

    Attributes
    ----------
    refused : int
        Jobs that found the queue full.
    left : int
        Jobs whose client left while they waited.
    """

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._at_work = 0
        self._typical_seconds = 1.0
        self.refused = self.left = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def at_work(self) -> int:
        """Jobs that the engine has: 0 or 1."""
        return self._at_work

    def put(self, job: Job) -> None:
        """Append a job.

        Raises
        ------
        ApiError
            429 when too many wait, 503 when the server is going down.
        """
        with self._changed:
            if self._is_closed:
                raise unavailable("the server is shutting down")
            if len(self._jobs) + self._at_work > self._most_waiting:
                self.refused += 1
                retry_seconds = self._typical_seconds * (len(self._jobs) + self._at_work)
                raise busy(len(self._jobs), max(1, min(3600, round(retry_seconds))))
            self._jobs.append(job)
            self._changed.notify()

    def take(self) -> Job | None:
        """Wait for the next job; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            if self._is_closed:
                return None
            self._at_work = 1
            return self._jobs.popleft()

    def done(self, seconds: float) -> None:
        """The job that was taken is over."""
        with self._changed:
            self._at_work = 0
            self._typical_seconds += 0.25 * (seconds - self._typical_seconds)

    def cancel(self, job: Job) -> None:
        """End a job: at once while it waits, else after what is in flight."""
        job.cancel()
        with self._changed:
            if job not in self._jobs:
                return
            self._jobs.remove(job)
            self.left += 1
        job.emit(Over(None))

    def close(self) -> None:
        """Take no more; those that wait are told."""
        with self._changed:
            self._is_closed = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            job.emit(Over(unavailable("the server is shutting down")))
