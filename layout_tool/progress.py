"""How far a long job is, on stderr: a bar on a terminal, a line every 10 % otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from fomoe_io.units import format_bytes, format_rate, format_seconds

QUIET_SECONDS = 1.0
"""Short jobs need no lines."""


class Progress:
    """Counts bytes, or something else, up to a total.

    Parameters
    ----------
    label : str
    total : int
    done : int
        Already there when the job starts (a resumed pack); not part of the rate.
    unit : str
        Of both: "B", or a word.
    """

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "B") -> None:
        self._label = label
        self._total = max(total, 1)
        self._initial = self._done = done
        self._unit = unit
        self._told = done * 10 // self._total
        self._started = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, initial=done, unit=unit, unit_scale=True, leave=False, file=sys.stderr
            )

    @property
    def seconds(self) -> float:
        """Since the job started."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Units per second of this run."""
        return (self._done - self._initial) / max(self.seconds, 1e-9)

    def add(self, count: int) -> None:
        """`count` units more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        tenth = self._done * 10 // self._total
        if tenth > self._told and self.seconds > QUIET_SECONDS:
            self._told = tenth
            left = format_seconds((self._total - self._done) / max(self.rate, 1e-9))
            print(f"{self._label}  {10 * tenth} %  {self._amounts()}  eta {left}", file=sys.stderr)

    def _amounts(self) -> str:
        if self._unit == "B":
            return f"{format_bytes(self._done)} of {format_bytes(self._total)}  {format_rate(self.rate)}"
        return f"{self._done:,} of {self._total:,} {self._unit}  {self.rate:.3g} {self._unit}/s"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
