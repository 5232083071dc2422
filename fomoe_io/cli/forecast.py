"""Will it fit, and how fast: what a model needs of memory, and the tokens a second to expect, with the arithmetic.

A token asks for `used` experts of every layer.  Those that are not in memory are read from the drive; all of them, and
the weights that stay, are multiplied.  Reads overlap with the arithmetic of the experts that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io.config import EngineConfig
from fomoe_io.errors import BudgetError, FomoeError
from fomoe_io.experts import learned_profile
from fomoe_io.experts.profile import Profile
from fomoe_io.experts.slots import slot_layout
from fomoe_io.models import Model, check_model
from fomoe_io.models.tensors import EMBEDDING, OUTPUT
from fomoe_io.storage.store import Store
from fomoe_io.system.memory import PROCESS_BYTES
from fomoe_io.units import format_bytes, format_rate, format_seconds

SHARES = (0.0, 0.10, 0.17, 0.25, 0.35, 0.50, 1.0)
"""Of a layer's experts that are in memory."""
MISSES = {
    "low": (1.0, 0.415, 0.288, 0.207, 0.134, 0.093, 0.0),
    "mean": (1.0, 0.503, 0.362, 0.266, 0.187, 0.123, 0.0),
    "high": (1.0, 0.619, 0.444, 0.317, 0.235, 0.218, 0.0),
}
"""Requests that the drive serves at these shares: policy `decayed` on six traces of four models, bench/results/
2026-11-caching.md; the luckiest, their mean, the unluckiest."""
TABLE = (0.10, 0.17, 0.25, 0.35, 0.50)
"""Shares that a forecast shows between the least that runs and everything."""
BATCH_SHARE = 7 / 8
"""Of the memory beyond the smallest budget that goes to experts; the rest to activations of a prompt's batch."""
LINK_BYTES_PER_SECOND = 25e9
"""From DRAM to a card: PCIe 4.0 x16."""
ASSUMED_DRIVE = 3.5e9
"""Where no drive is at hand and none was named: an ordinary NVMe drive on PCIe 3.0."""
MEASURED_BYTES, MEASURED_SECONDS = 48 << 20, 0.15
LEAST_SHARE = 0.02
"""Types that are less of a token's bytes are reckoned as the others."""


@dataclass(frozen=True, slots=True)
class Drive:
    """Bytes a second of reads of an expert's size, and who says so."""

    bytes_per_second: float
    source: str


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model asks of a machine.

    Attributes
    ----------
    smallest_bytes : int
        The least --ram that runs: weights, context, the experts of one token.
    row_bytes : int
        One expert of every layer.
    experts, used : int
        Of a layer.
    token_bytes : int
        Experts that a token asks for, as they are read: whole blocks, more of them from a GGUF than from a store.
    weight_bytes : int
        All that stays in memory.
    multiplied : mapping of int to int
        GGML type -> bytes that a token is multiplied with.
    everything_bytes : int
        The least --ram that holds all experts.
    """

    smallest_bytes: int
    row_bytes: int
    experts: int
    used: int
    token_bytes: int
    weight_bytes: int
    multiplied: Mapping[int, int]

    @property
    def everything_bytes(self) -> int:
        """The least --ram that holds all experts."""
        return self.smallest_bytes + int((self.experts - self.used) * self.row_bytes)

    def share(self, ram_bytes: int) -> float:
        """Of the experts that such a memory holds."""
        if ram_bytes >= self.everything_bytes:
            return 1.0
        slots = self.used + BATCH_SHARE * (ram_bytes - self.smallest_bytes) / self.row_bytes
        return min(1.0, max(slots, self.used) / self.experts)

    def ram_bytes(self, share: float) -> int:
        """The memory that holds such a share; the inverse of `share`."""
        slots = share * self.experts - self.used
        if share >= 1:
            return self.everything_bytes
        return self.smallest_bytes + max(0, int(slots * self.row_bytes / BATCH_SHARE))


def needs_of(path: Path, config: EngineConfig | None = None, store: Store | None = None) -> Needs:
    """Of a model whose header can be read: no weight is.

    Raises
    ------
    FomoeError
        It would not run, whatever the memory.
    """
    from fomoe_io.engine import Engine

    store = store or Store.open(path)
    model = check_model(store)
    smallest = 0
    try:
        Engine(store, replace(config or EngineConfig(), ram_bytes=1, device="cpu", vram_bytes=None)).close()
    except BudgetError as error:
        smallest = error.smallest_bytes
    layers, s = list(model.experts.values()), model.shape
    row = sum(layer.record_bytes for layer in layers)
    resident = {name: t for name, t in model.resident.items() if name != EMBEDDING or OUTPUT not in model.resident}
    return Needs(
        smallest_bytes=smallest,
        row_bytes=row,
        experts=s.experts,
        used=s.used,
        token_bytes=s.used * sum(int(slot_layout(layer).extents["bytes"].sum(1).mean()) for layer in layers),
        weight_bytes=sum(tensor.bytes for tensor in resident.values()),
        multiplied=_multiplied(model),
    )


def _multiplied(model: Model) -> dict[int, int]:
    found: Counter[int] = Counter()
    for name, tensor in model.resident.items():
        if len(tensor.shape) > 1 and (name != EMBEDDING or OUTPUT not in model.resident):
            found[int(tensor.type)] += tensor.bytes
    for layer in model.experts.values():
        for part in layer.parts:
            found[int(part.type)] += model.shape.used * part.bytes
    return dict(found)


# ---- rates of this machine ----


def compute_seconds(needs: Needs, threads: int | None = None) -> float:
    """What this machine takes to multiply a token with its weights: each type measured, a tenth of a second each."""
    import os

    from fomoe_io._cpu import Team
    from fomoe_io.cpu import dot_library

    kernels = dot_library.open_kernels("auto")
    team = Team(threads or len(os.sched_getaffinity(0)))
    total = sum(needs.multiplied.values())
    large = {kind: size for kind, size in needs.multiplied.items() if size >= LEAST_SHARE * total}
    seconds = sum(size / _product_rate(kind, kernels, team) for kind, size in large.items())
    return seconds * total / sum(large.values())


def _product_rate(kind: int, kernels: Any, team: Any) -> float:
    """Bytes of weights a second, from a buffer that no cache holds, as the machine is now: others may use it, too."""
    import time

    from fomoe_io._cpu import Matrix, Program, Rows

    columns = 2048
    row_bytes = kernels.row_bytes(kind, columns)
    # bytes below 64: no float pattern among them is infinite or not a number
    weights = np.random.default_rng(1).integers(0, 64, MEASURED_BYTES // row_bytes * row_bytes, dtype=np.uint8)
    matrix = Matrix(kernels, weights.ctypes.data, kind, weights.nbytes // row_bytes, columns, False, weights)
    program = Program(team, kernels, columns)
    x, converted = Rows(kernels, columns, 1), Rows(kernels, columns, 1, matrix.activation_type)
    y = Rows(kernels, matrix.rows, 1)
    program.norm(x, np.ones(columns, np.float32), 1e-6, [converted], False)
    program.mat_mul([(matrix, converted, y, False)])
    ids, place, logits = np.zeros(1, np.int32), np.zeros(1, np.int64), np.zeros((0, 1), np.float32)
    one_pass = (ids, place, place.astype(np.uint64), ids[:0], logits)
    program.run(*one_pass)  # the first brings pages in
    passes, started = 0, time.monotonic()
    while passes < 2 or time.monotonic() - started < MEASURED_SECONDS:
        program.run(*one_pass)
        passes += 1
    return passes * weights.nbytes / (time.monotonic() - started)


def measured_drive(path: Path, needs: Needs) -> Drive:
    """Random reads of the model's own experts, as many at once as a layer asks for, for half a second."""
    from fomoe_io.io_bench.job import IOJob
    from fomoe_io.io_bench.run import run_jobs

    job = IOJob(store=path, depth=max(1, min(needs.used, 64)), runtime_seconds=0.5, time_based=True)
    result = run_jobs([job])[0]
    how = "measured here, 0.5 s" if result.direct else "measured here, of the page cache"
    return Drive(result.bytes_per_second, how)


# ---- misses ----


@dataclass(frozen=True, slots=True)
class Misses:
    """Shares of requests that the drive serves, by the share of the experts that is in memory."""

    source: str
    profile: Profile | None = None

    def at(self, share: float) -> tuple[float, float, float]:
        """(low, likely, high)"""
        if share >= 1:
            return 0.0, 0.0, 0.0
        if self.profile is None:
            return tuple(float(np.interp(share, SHARES, MISSES[name])) for name in ("low", "mean", "high"))  # type: ignore[return-value]
        asked = missed = 0.0
        for picks in self.profile.counts.values():
            ordered = np.sort(picks)[::-1]
            asked += float(ordered.sum())
            missed += float(ordered[round(share * len(ordered)) :].sum())
        likely = missed / max(asked, 1.0)
        return 0.9 * likely, likely, min(1.0, 1.15 * likely)


def misses_of(store: Store) -> Misses:
    """By what earlier runs have counted of this model, or the profile of its store; else as other models miss."""
    try:
        found = learned_profile.for_warm_start("learned", store)
    except (FomoeError, OSError):
        found = None
    if found is not None and found.tokens >= 1000:
        return Misses(f"counted on this model, {found.tokens:,} tokens", found)
    return Misses("as measured on other models (docs/caching.md)")


# ---- the forecast ----


@dataclass(frozen=True, slots=True)
class Row:
    """A memory size, and what it gives.

    Attributes
    ----------
    ram_bytes : int
    share : float
        Of the experts in memory.
    missed : float
        Share of requests that the drive serves.
    read_bytes : float
        A token, from the drive.
    drive_seconds, compute_seconds : float
        A token; compute is 0 where it is not known.
    low, likely, high : float
        Tokens a second.
    """

    ram_bytes: int
    share: float
    missed: float
    read_bytes: float
    drive_seconds: float
    compute_seconds: float
    low: float
    likely: float
    high: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """See the module."""

    needs: Needs
    drive: Drive
    misses: Misses
    compute_seconds: float

    def row(self, ram_bytes: int, vram_share: float = 0.0) -> Row:
        """What a memory of that size gives."""
        share = min(1.0, self.needs.share(ram_bytes) + vram_share)
        low, likely, high = self.misses.at(share)
        return Row(
            ram_bytes,
            share,
            likely,
            likely * self.needs.token_bytes,
            self._drive_seconds(likely),
            self.compute_seconds,
            1 / (self._drive_seconds(high) + self.compute_seconds),
            1 / self._seconds(likely),
            1 / max(self._drive_seconds(low), self.compute_seconds, 1e-9),
        )

    def _drive_seconds(self, missed: float) -> float:
        return missed * self.needs.token_bytes / self.drive.bytes_per_second

    def _seconds(self, missed: float) -> float:
        """Reads hide behind the arithmetic of the experts that are there."""
        experts = self.needs.token_bytes / max(sum(self.needs.multiplied.values()), 1)
        hidden = (1 - missed) * experts * self.compute_seconds
        return max(self.compute_seconds + max(0.0, self._drive_seconds(missed) - hidden), 1e-9)

    @property
    def recommended_bytes(self) -> int:
        """The least memory at which the drive takes no longer than the arithmetic: more brings little."""
        for share in (*(s / 100 for s in range(5, 100, 5)), 1.0):
            if self._drive_seconds(self.misses.at(share)[1]) <= self.compute_seconds:
                return max(self.needs.ram_bytes(share), self.needs.smallest_bytes)
        return self.needs.everything_bytes

    def rows(self, asked: Sequence[int] = ()) -> list[Row]:
        """From the least that runs to everything, and sizes that were asked for."""
        n = self.needs
        sizes = {n.smallest_bytes, n.everything_bytes, *asked}
        sizes |= {n.ram_bytes(share) for share in TABLE if share * n.experts > n.used}
        return [self.row(size) for size in sorted(sizes) if size >= n.smallest_bytes]

    def report(self, asked: Sequence[int] = ()) -> dict[str, Any]:
        """For programs."""
        n = self.needs
        return {
            "smallest_ram_bytes": n.smallest_bytes,
            "recommended_ram_bytes": self.recommended_bytes,
            "everything_ram_bytes": n.everything_bytes,
            "smallest_vram_bytes": n.smallest_bytes,
            "recommended_vram_bytes": self.recommended_bytes,
            "token_bytes": n.token_bytes,
            "multiplied_bytes": sum(n.multiplied.values()),
            "drive": asdict(self.drive),
            "misses": self.misses.source,
            "compute_seconds": self.compute_seconds,
            "rows": [asdict(row) for row in self.rows(asked)],
        }

    def lines(self, asked: Sequence[int] = ()) -> list[str]:
        """For people: memory, the arithmetic of one row, and a table."""
        n = self.needs
        lines = [
            f"  memory     --ram {_mib(n.smallest_bytes)} runs it, {_mib(self.recommended_bytes)} is recommended (the "
            f"drive no slower than the arithmetic), {_mib(n.everything_bytes)} holds all",
            f"  card       as much of --vram holds as much; what is in neither is read. Smallest: weights and context, "
            f"{_mib(n.smallest_bytes)}",
            f"  drive      {format_rate(self.drive.bytes_per_second)} ({self.drive.source})",
            f"  computing  {format_bytes(sum(n.multiplied.values()))} a token in "
            f"{format_seconds(self.compute_seconds)} (this processor's kernels, measured on random weights)",
            f"  misses     {self.misses.source}",
            "",
            f"  {'--ram':>9} {'experts':>8} {'missed':>7} {'read/token':>11} {'drive':>9} {'computing':>10}   tok/s",
        ]
        for row in self.rows(asked):
            mark = "   <- --ram" if row.ram_bytes in asked else ""
            lines.append(
                f"  {_mib(row.ram_bytes):>9} {100 * row.share:6.0f} % {100 * row.missed:5.0f} % "
                f"{format_bytes(row.read_bytes):>11} {_ms(row.drive_seconds):>9} {_ms(row.compute_seconds):>10}   "
                f"{_speed(row.likely)} ({_speed(row.low)} to {_speed(row.high)}){mark}"
            )
        lines.append(
            "  drive: missed x experts of a token / rate; hidden behind the arithmetic of experts that are there, "
            "without lookahead"
        )
        return lines

    def card_lines(self, vram_bytes: int, ram_bytes: int | None) -> list[str]:
        """What a card of that memory makes of it: bounds by drive and link, as no card's arithmetic is known here."""
        n, ram, asked = self.needs, ram_bytes or self.recommended_bytes, format_bytes(self.needs.token_bytes)
        room = (vram_bytes - n.smallest_bytes) / n.row_bytes
        if room < 0:
            return [f"  --vram     {_mib(vram_bytes)} is too small: {_mib(n.smallest_bytes)} hold weights and context"]
        in_vram = min(1.0, (n.used + room) / n.experts)
        in_dram = min(1.0 - in_vram, max(0.0, ram - PROCESS_BYTES) / n.row_bytes / n.experts)
        missed, beyond = self.misses.at(in_vram + in_dram)[1], self.misses.at(in_vram)[1]
        drive, link = self._drive_seconds(missed), beyond * n.token_bytes / LINK_BYTES_PER_SECOND
        bound = f"{_speed(1 / max(drive, link))} tok/s" if max(drive, link) else "what the card computes"
        return [
            f"  --vram     {_mib(vram_bytes)} and --ram {_mib(ram)}: {100 * in_vram:.0f} % of the experts there and "
            f"{100 * in_dram:.0f} % in memory; at most {bound}",
            f"             drive {100 * missed:.0f} % x {asked} = {_ms(drive)}, link {100 * beyond:.0f} % x {asked} / "
            f"{format_rate(LINK_BYTES_PER_SECOND)} = {_ms(link)}",
        ]


def _mib(size: int) -> str:
    mib = -(-size // (1 << 20))
    return f"{mib}M" if mib < 10 << 10 else f"{-(-mib // (1 << 10))}G"


def _speed(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
