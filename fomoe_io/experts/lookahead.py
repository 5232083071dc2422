"""Whether tokens read experts ahead: as they were asked to, or as measured while they run."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import numpy as np

WARM_TOKENS = 32
"""Before the first trial: memory fills, and graphs are captured."""

STRETCH_TOKENS = 16
"""Tokens in a row with lookahead, or without."""

SKIPPED_TOKENS = 2
"""Of a stretch, not counted: they finish what the stretch before has begun."""

STRETCHES = 8
"""Of a trial: off, on, on, off, and so on, so that what changes steadily adds to both alike."""

SETTLED_TOKENS = 4096
"""From a trial to the next one: the text, and with it what is in memory, has changed."""

LEAST_GAIN = 0.01
"""Part of a token's time that lookahead must save to be left on."""


class Lookahead:
    """The choice for each token; no result depends on it.

    Parameters
    ----------
    mode : {"auto", "on", "off"}
        "auto" compares stretches of tokens with it and without, and keeps to what is faster for a while.
    clock : callable, optional
        Nanoseconds.

    Attributes
    ----------
    is_on : bool
        The last token's, or the one at work's.
    trials : int
        How often it has been measured.
    """

    def __init__(self, mode: Literal["auto", "on", "off"], clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.is_on, self.trials = mode == "on", 0
        self._is_auto, self._clock = mode == "auto", clock
        self._place, self._chosen, self._since = -WARM_TOKENS, False, 0
        self._times: dict[bool, list[int]] = {False: [], True: []}

    def begin(self) -> bool:
        """A token begins; whether it looks ahead."""
        if self._is_auto:
            stretch = self._place // STRETCH_TOKENS
            is_trial = 0 <= stretch < STRETCHES
            self.is_on = stretch % 4 in (1, 2) if is_trial else self._chosen
            self._since = self._clock()
        return self.is_on

    def end(self) -> None:
        """It has been read; one that failed is not counted."""
        if not self._is_auto:
            return
        if self._place >= 0 and self._place % STRETCH_TOKENS >= SKIPPED_TOKENS:
            self._times[self.is_on].append(self._clock() - self._since)
        self._place += 1
        if self._place == STRETCHES * STRETCH_TOKENS:
            self._choose()

    def _choose(self) -> None:
        """By medians: a token that somebody else has held up counts as one."""
        off, on = (median(self._times[is_on]) for is_on in (False, True))
        self._chosen, self.trials = on < (1 - LEAST_GAIN) * off, self.trials + 1
        self._times = {False: [], True: []}
        self._place = -SETTLED_TOKENS


def recall_of(guessed: np.ndarray) -> list[float | None]:
    """A share for each layer, of int [layers, 2]: picks, and those that were guessed; None where nothing was."""
    return [round(right / picks, 4) if picks else None for picks, right in guessed.tolist()]
