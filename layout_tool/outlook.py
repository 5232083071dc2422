"""What `fomoe plan` looks at and says of a machine: a model that is here or elsewhere, memory and speed to expect."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fomoe_io.cli.common import note
from fomoe_io.cli.model_help import explained
from fomoe_io.cli.remote import fetch_headers, is_address
from fomoe_io.errors import UsageError
from fomoe_io.storage.store import Store
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io.cli.forecast import Forecast


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a model was named."""

    name: str | None
    repository: str | None = None
    file: str | None = None
    token: str | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether only its header is had."""
        return self.repository is not None or (self.name is not None and is_address(self.name))

    @contextmanager
    def path(self) -> Iterator[Path]:
        """The model, or a sparse file with its header alone.

        Raises
        ------
        UsageError
            None was named, or two, or it can't be had.
        """
        if (self.name is None) == (self.repository is None):
            raise UsageError("name one model", hint="fomoe plan MODEL.gguf, or -hf USER/MODEL:QUANT")
        if not self.is_elsewhere:
            path = Path(str(self.name))
            with explained(path):
                yield path
            return
        url = str(self.name)
        if self.repository is not None:
            from fomoe_io.cli.hub import address

            url = address(self.repository, self.file, self.token)
        with tempfile.TemporaryDirectory(prefix="fomoe-plan-") as folder:
            path, fetched = fetch_headers(url, Path(folder), self.token)
            note(f"{url}: {format_bytes(fetched)} of it read, the header")
            yield path


@dataclass(frozen=True, slots=True)
class Machine:
    """What the speed is reckoned for; None: what is at hand."""

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    drive: float | None = None
    context_tokens: int | None = None
    threads: int | None = None

    def forecast(self, path: Path, store: Store, *, is_elsewhere: bool) -> Forecast:
        """Memory and speed.

        Raises
        ------
        FomoeError
        """
        from fomoe_io.cli.forecast import (  # loads compiled code, which packing needs none of
            ASSUMED_DRIVE,
            Drive,
            Forecast,
            compute_seconds,
            measured_drive,
            misses_of,
            needs_of,
        )
        from fomoe_io.config import EngineConfig

        needs = needs_of(path, EngineConfig(context_tokens=self.context_tokens, threads=self.threads), store)
        if self.drive is not None:
            drive = Drive(self.drive, "as --drive says")
        elif is_elsewhere:
            drive = Drive(ASSUMED_DRIVE, "assumed; --drive 7G says yours")
        else:
            drive = measured_drive(path, needs)
        return Forecast(needs, drive, misses_of(store), compute_seconds(needs, self.threads))

    def lines(self, forecast: Forecast) -> list[str]:
        """For people."""
        lines = forecast.lines([self.ram_bytes] if self.ram_bytes is not None else [])
        if self.ram_bytes is not None and self.ram_bytes < forecast.needs.smallest_bytes:
            lines.append(f"  --ram      {format_bytes(self.ram_bytes)} is less than the least that runs it")
        if self.vram_bytes is not None:
            lines += forecast.card_lines(self.vram_bytes, self.ram_bytes)
        return lines
