"""Whether tokens read experts ahead, as they were asked to or as measured while they run, and into how many buffers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from statistics import median
from typing import Literal

import numpy as np

Mode = Literal["auto", "on", "off"]

WARM_TOKENS = 16
"""Before the first trial, with lookahead: memory fills, and a graph is captured."""

STRETCH_TOKENS = 4
"""Tokens in a row with lookahead, or without."""

SKIPPED_TOKENS = 1
"""Of a stretch, not counted: they finish what the stretch before has begun, and a graph may be captured."""

STRETCHES = 4
"""Of a trial: what is in force, the other, the other, what is in force, so that what changes steadily adds to both."""

LONG_STRETCHES = 12
"""Of one in which the other was faster so far: it takes over if that stays so."""

SETTLED_TOKENS = 1024
"""From a trial to the next one: the text, and with it what is in memory, has changed."""

LEAST_GAIN = 0.02
"""Part of a token's time that the other must save to take over."""

PAUSE_SECONDS = 0.25
"""Between two tokens of one text nothing takes so long: somebody has thought, or a prompt was read."""

AFTER_PAUSE_TOKENS = 3
"""Not counted: memory has others' experts, the processor has slept."""

LEAST_COUNTED_SHARE = 0.5
"""Of the tokens that a trial would count; of fewer nothing is concluded."""

SLOTS_SHARE = 32
"""Buffers that nobody has asked for take no more than one part in so many of what experts have: that costs a percent or
two of misses, where lookahead that pays saves a tenth of a token (docs/caching.md, docs/gpu.md)."""


class Lookahead:
    """The choice for each token; no result depends on it.

    "auto" begins with it, and compares: a short trial, after which what is in force stays unless the other was faster;
    then the trial goes on, and the other takes over if it was faster in all of it.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
    clock : callable, optional
        Nanoseconds.

    Attributes
    ----------
    is_on : bool
        What is in force; some tokens of a trial are read the other way.
    trials : int
        How often it has been measured.
    """

    def __init__(self, mode: Mode, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.is_on, self.trials = mode != "off", 0
        self._is_auto, self._clock = mode == "auto", clock
        self._place, self._skipped = -WARM_TOKENS, 0  # of the next token in a trial; how many more are not counted
        self._looks_ahead, self._since, self._ended = self.is_on, 0, 0
        self._times: dict[bool, list[int]] = {False: [], True: []}

    def begin(self) -> bool:
        """A token begins; whether it looks ahead."""
        if not self._is_auto:
            return self.is_on
        self._since = self._clock()
        if self._place >= 0 and self._place % STRETCH_TOKENS == 0:
            self._skipped = max(self._skipped, SKIPPED_TOKENS)
        if self._since - self._ended > 1e9 * PAUSE_SECONDS:
            self._skipped = AFTER_PAUSE_TOKENS
        is_other = self._place >= 0 and self._place // STRETCH_TOKENS % 4 in (1, 2)
        self._looks_ahead = self.is_on != is_other
        return self._looks_ahead

    def end(self) -> None:
        """It has been read; one that failed is not counted."""
        if not self._is_auto:
            return
        self._ended = self._clock()
        if self._skipped:
            self._skipped -= 1
        elif self._place >= 0:
            self._times[self._looks_ahead].append(self._ended - self._since)
        self._place += 1
        if self._place == STRETCHES * STRETCH_TOKENS and not self._other_wins(STRETCHES):
            self._settle()
        elif self._place == LONG_STRETCHES * STRETCH_TOKENS:
            self.is_on ^= self._other_wins(LONG_STRETCHES)
            self._settle()

    def _other_wins(self, stretches: int) -> bool:
        """By medians: a token that somebody else has held up counts as one."""
        counted = stretches // 2 * (STRETCH_TOKENS - SKIPPED_TOKENS)
        if min(map(len, self._times.values())) < LEAST_COUNTED_SHARE * counted:
            return False
        return median(self._times[not self.is_on]) < (1 - LEAST_GAIN) * median(self._times[self.is_on])

    def _settle(self) -> None:
        self._times = {False: [], True: []}
        self._place, self.trials = -SETTLED_TOKENS, self.trials + 1


def is_guessed(layers: Collection[int], layers_ahead: int) -> bool:
    """Whether one of these layers follows another so soon that it is guessed."""
    return any(layer + ahead in layers for layer in layers for ahead in range(1, layers_ahead + 1))


def spare_buffers(
    mode: Mode, ranks: int, layers: Collection[int], buffer_bytes: int, room: int, *,
    least: int, most: int, is_all: bool, elsewhere: int = 0, layers_ahead: int = 1,
) -> int:  # fmt: skip
    """How many buffers of each size experts that are read ahead get; with "auto" none that would cost what matters.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
    ranks : int
        How many experts of a layer are guessed.
    layers : collection of int
        Those with experts that guess at each other.
    buffer_bytes : int
        One of each size.
    room : int
        For experts and these buffers, in host memory.
    least, most : int
        What experts need of it, and all that they have a use for.
    is_all : bool
        With the most, nothing is missed.
    elsewhere : int
        What experts have in a device's memory.
    layers_ahead : int
        How many of the layers that follow are guessed, whose guesses may be read at once.
    """
    if mode != "auto":
        return layers_ahead * ranks
    if (is_all and room >= most) or not is_guessed(layers, layers_ahead):
        return 0
    free = max(room - most, (room + elsewhere) // SLOTS_SHARE)
    count = min(layers_ahead * ranks, min(free, room - least) // buffer_bytes)
    return count if count > 0 and 2 * count >= ranks else 0  # for a read or two a layer nothing is given up


def recall_of(guessed: np.ndarray) -> list[float | None]:
    """A share for each layer, of int [layers, 2]: picks, and those that were guessed; None where nothing was."""
    return [round(right / picks, 4) if picks else None for picks, right in guessed.tolist()]
