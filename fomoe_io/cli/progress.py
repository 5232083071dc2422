"""How far a long job is, on stderr: a bar on a terminal, a line every 10 % otherwise."""

from __future__ import annotations

import shutil
import sys
import time
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

from fomoe_io.errors import printable
from fomoe_io.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from fomoe_io.engine import Engine

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
    quiet : bool
        Show nothing.
    delay_seconds : float
        Show no bar before: short work needs none.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        unit: str = "B",
        *,
        quiet: bool = False,
        delay_seconds: float = 0.0,
    ) -> None:
        self._label = label
        self._total = max(total, 1)
        self._initial = self._done = done
        self._unit = unit
        self._told = done * 10 // self._total
        self._started = time.monotonic()
        self._bar = None
        self._quiet = quiet
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, initial=done, unit=unit, unit_scale=True, leave=False, file=sys.stderr,
                delay=delay_seconds, dynamic_ncols=True, mininterval=0.05,
            )  # fmt: skip

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
        if self._quiet:
            return
        tenth = self._done * 10 // self._total
        if tenth > self._told and self.seconds > QUIET_SECONDS:
            self._told = tenth
            left = format_seconds((self._total - self._done) / max(self.rate, 1e-9))
            print(f"{self._label}  {10 * tenth} %  {self._amounts()}  eta {left}", file=sys.stderr)

    def to(self, done: int) -> None:
        """`done` units are done."""
        if done > self._done:
            self.add(done - self._done)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _amounts(self) -> str:
        if self._unit == "B":
            return f"{format_bytes(self._done)} of {format_bytes(self._total)}  {format_rate(self.rate)}"
        return f"{self._done:,} of {self._total:,} {self._unit}  {self.rate:.3g} {self._unit}/s"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Loading:
    """Shows an engine that opens, from the first moment on; an `EngineConfig.progress`.

    Parameters
    ----------
    name : str
        Of the model.
    quiet : bool
        Show nothing.
    """

    _UNITS = MappingProxyType({"weights": "B", "experts": "layers"})

    def __init__(self, name: str, *, quiet: bool = False) -> None:
        self._name = name
        self._quiet = quiet
        self._stage = ""
        self._progress: Progress | None = None
        self._has_line = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._end()
            self._stage = stage
            self._progress = Progress(f"loading {stage}", total, unit=self._UNITS.get(stage, ""), quiet=self._quiet)
        if self._progress is not None:
            self._progress.to(done)

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns
            print(printable(f"loading {self._name} ...")[: columns - 1], end="", file=sys.stderr, flush=True)
            self._has_line = True
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if self._has_line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._has_line = False


class PromptProgress:
    """Shows a prompt that is read, between its batches and inside them: tok/s and how long it still takes.

    Parameters
    ----------
    engine : Engine
    quiet : bool
    label : str
    """

    def __init__(self, engine: Engine, *, quiet: bool = False, label: str = "prompt") -> None:
        self._gate = engine.gate
        self._batch = engine.budgets.batch_tokens
        self._quiet = quiet
        self._label = label
        self._done = self._total = 0
        self._bar: Progress | None = None

    def begin(self, total: int) -> None:
        """`total` tokens are about to be read."""
        self._done, self._total = 0, total
        self._bar = Progress(self._label, total, unit="tok", quiet=self._quiet, delay_seconds=0.3)
        self._gate.on_progress = self._inside

    def _inside(self, share: float) -> None:
        if self._bar is not None:
            self._bar.to(self._done + int(share * min(self._batch, self._total - self._done)))

    def __call__(self, done: int, total: int) -> None:
        self._done = done
        if self._bar is not None:
            self._bar.to(done)

    def end(self) -> None:
        """Take the bar away."""
        self._gate.on_progress = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None
