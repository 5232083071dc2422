"""Requests at work: each has a session of its own, and what several of them read next is read together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fomoe_io.kept.timeline import Timeline, decode_all, read_all
from fomoe_io.serve.generate import PieceSize, Step, Steps
from fomoe_io.serve.jobs import Ended, Event, Job, Piece, Progress, Started, Timings, Work


@dataclass(slots=True)
class Slot:
    """What a seat is doing, for /slots: written by the engine's thread, read by any."""

    job_number: int = 0
    is_processing: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    processed_tokens: int = 0
    generated_tokens: int = 0
    timings: Timings | None = None


class Seat:
    """A session, and the job that it is at work for.

    Parameters
    ----------
    timeline : Timeline

    Attributes
    ----------
    timeline : Timeline
    job : Job or None
        None: it is free.
    started : float
        When it took its job, by the clock of time.monotonic().
    step : int, sequence of int or None
        What is to be read next.
    slot : Slot
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.job: Job | None = None
        self.started = 0.0
        self.step: Step | None = None
        self.slot = Slot()
        self._steps: Steps | None = None

    @property
    def is_reading(self) -> bool:
        """Whether it is at its prompt."""
        return self.step is not None and not isinstance(self.step, int)

    def begin(self, steps: Steps) -> None:
        """Take up an answer."""
        self._steps = steps
        self.step = next(steps, None)

    def go_on(self, logits: np.ndarray) -> None:
        """The step was done."""
        assert self._steps is not None
        was_reading = self.is_reading
        try:
            self.step = self._steps.send(logits)
        except StopIteration:
            self.step = self._steps = None
        if was_reading and not self.is_reading:
            self.timeline.share()

    def leave(self) -> None:
        """The job is over, or was given up."""
        if self._steps is not None:
            self._steps.close()
        self.job = self.step = self._steps = None
        self.slot.is_processing = False

    def note(self, event: Event, number: int) -> None:
        """Keep the slot up to date; `number`: of the job."""
        slot = self.slot
        if isinstance(event, Started):
            self.slot = Slot(number, True, event.prompt_tokens, event.cached_tokens, event.cached_tokens)
        elif isinstance(event, Progress):
            slot.processed_tokens = event.processed
        elif isinstance(event, Piece | Ended):
            slot.generated_tokens, slot.timings = event.timings.predicted, event.timings


def seat_for(job: Job, free: Sequence[Seat]) -> Seat:
    """The one whose session has most of what the job's prompt begins with, if that is much of either; else the one that
    was of use longest ago."""
    longest_ago = min(free, key=lambda seat: seat.started)
    if len(free) == 1 or not isinstance(job.work, Work) or not job.work.runs or not job.work.reuse:
        return longest_ago
    tokens = job.work.runs[0].tokens
    known, place = max((seat.timeline.standing(tokens), -i) for i, seat in enumerate(free))
    best = free[-place]
    return best if 2 * known >= min(len(tokens), len(best.timeline.tokens)) > 0 else longest_ago


def rounds(seats: Sequence[Seat]) -> list[list[Seat]]:
    """Who is read with whom, one group after the other: pieces of prompts, then tokens of answers."""
    reading = [seat for seat in seats if seat.is_reading]
    answering = [seat for seat in seats if isinstance(seat.step, int)]
    return [group for group in (reading, answering) if group]


def read_group(seats: Sequence[Seat], size: PieceSize) -> list[np.ndarray]:
    """Logits after the step of each; `size` learns from pieces of prompts."""
    if not seats[0].is_reading:
        tokens = [(seat.timeline, seat.step) for seat in seats if isinstance(seat.step, int)]
        return list(decode_all(tokens)) if len(tokens) > 1 else [tokens[0][0].decode(tokens[0][1])]
    pieces = [(seat.timeline, seat.step) for seat in seats if seat.step is not None and not isinstance(seat.step, int)]
    if size.is_long:
        for timeline, _ in pieces:
            timeline.stand_by()
    before = time.monotonic()
    logits = read_all(pieces) if len(pieces) > 1 else [pieces[0][0].read(pieces[0][1])]
    size.measured(sum(len(piece) for _, piece in pieces), time.monotonic() - before)
    return logits
