"""A live view of a run, from the engine's statistics: a last line of the terminal, or a screen (fomoe-top)."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from fomoe_io.engine import Engine
from fomoe_io.units import format_rate

EVERY_SECONDS = 0.25
TIERS = ("vram", "dram", "nvme")


def live_line(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float, columns: int) -> str:
    """What happened between two statistics, `seconds` apart: speed, where experts were found, the drive, stalls."""
    tokens = now["generated_tokens"] - before["generated_tokens"]
    hits = {name: now["tiers"][name]["hits"] - before["tiers"][name]["hits"] for name in TIERS}
    requests = max(sum(hits.values()) + now["substitutions"] - before["substitutions"], 1)
    read = now["tiers"]["nvme"]["bytes"] - before["tiers"]["nvme"]["bytes"]
    stall = now["stall_seconds"]["nvme"] - before["stall_seconds"]["nvme"]
    seconds = max(seconds, 1e-9)
    shares = " ".join(f"{name} {100 * hits[name] / requests:.0f} %" for name in TIERS if name != "vram" or hits[name])
    parts = [
        f"{now['generated_tokens']} tok {tokens / seconds:.1f}/s",
        shares,
        format_rate(read / seconds),
        f"stall {100 * min(stall / seconds, 1):.0f} %",
    ]
    line = ""
    for part in parts:  # as many as fit
        longer = f"{line} | {part}" if line else part
        if len(longer) > columns - 1:
            break
        line = longer
    return line


class StatusLine:
    """The terminal's last row, which the text above never scrolls over; nothing where stderr is no terminal.

    Parameters
    ----------
    engine : Engine
    is_on : bool
    """

    def __init__(self, engine: Engine, *, is_on: bool) -> None:
        self._engine = engine
        self._is_on = is_on and sys.stderr.isatty()
        self._rows = 0

    def __enter__(self) -> Self:
        size = shutil.get_terminal_size()
        self._rows = size.lines if size.lines > 3 else 0
        if self._is_on and self._rows:
            self._before, self._time = self._engine.statistics(), time.monotonic()
            # a row of room, then all rows but the last one scroll
            print(f"\n\x1b[A\x1b7\x1b[1;{self._rows - 1}r\x1b8", end="", file=sys.stderr, flush=True)
        return self

    def update(self) -> None:
        """After a token; shows at most four a second."""
        now = time.monotonic()
        if not self._is_on or not self._rows or now - self._time < EVERY_SECONDS:
            return
        found = self._engine.statistics()
        text = live_line(self._before, found, now - self._time, shutil.get_terminal_size().columns)
        self._before, self._time = found, now
        print(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[7m{text}\x1b[0m\x1b8", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._is_on and self._rows:
            print(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8", end="", file=sys.stderr, flush=True)
