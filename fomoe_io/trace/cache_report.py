"""What `fomoe-bench cache` finds: replays of a trace by policy and size, as rows, tables and a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io.config import Tiers
from fomoe_io.errors import UsageError
from fomoe_io.experts.residency import DECAY, DRAM, NVME, VRAM, Decay
from fomoe_io.system.files import write_atomically
from fomoe_io.trace.simulator import Replay, belady, even_slots, replay, static_dram
from fomoe_io.trace.trace import Trace

BOUND, STATIC = "belady", "static"
EVERY_POLICY = ("lru", "lfu", "lfru", "decayed", STATIC, BOUND)
"""STATIC: an LRU of VRAM above a DRAM list that never changes (pmerolla/fomoe); BOUND: no policy misses less."""


@dataclass(frozen=True, slots=True)
class Row:
    """One policy with one amount of memory.

    Attributes
    ----------
    trace : str
        Name of the file.
    policy : str
    vram_share, dram_share : float
        Slots of each tier, of all experts.
    vram, dram, nvme : float
        Where the requests were found, 0..1.
    counters : dict of str to int
    """

    trace: str
    policy: str
    vram_share: float
    dram_share: float
    vram: float
    dram: float
    nvme: float
    counters: dict[str, int]

    @property
    def size(self) -> float:
        """Slots of both tiers, of all experts."""
        return self.vram_share + self.dram_share

    @property
    def hits(self) -> float:
        """Requests that did not wait for NVMe, 0..1."""
        return 1 - self.nvme

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def check_policies(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is no policy."""
    for name in names:
        if name not in EVERY_POLICY:
            raise UsageError(f"{name!r} is no policy", hint=f"--policy {','.join(EVERY_POLICY)}")


def play(trace: Trace, slots: np.ndarray, policy: str, decay: Decay = DECAY) -> Replay:
    """Replay by any of EVERY_POLICY."""
    if policy == BOUND:
        return belady(trace, slots)
    if policy == STATIC:
        return static_dram(trace, slots)
    return replay(trace, slots, policy=policy, decay=decay)


def sweep(name: str, trace: Trace, tiers: Sequence[Tiers], policies: Sequence[str], decay: Decay = DECAY) -> list[Row]:
    """Replay a trace by every policy with every size."""
    rows = []
    for size in tiers:
        slots = even_slots(trace, size.vram, size.dram)
        for policy in policies:
            played = play(trace, slots, policy, decay)
            vram, dram, nvme = (played.share(tier) for tier in (VRAM, DRAM, NVME))
            rows.append(Row(name, policy, size.vram, size.dram, vram, dram, nvme, played.counters))
    return rows


def size_table(rows: Sequence[Row]) -> list[str]:
    """Hit rates in percent: a line a policy, a column a size."""
    sizes = sorted({row.size for row in rows})
    policies = list(dict.fromkeys(row.policy for row in rows))
    hits = {(row.policy, row.size): row.hits for row in rows}
    lines = [f"{'slots':>10} " + " ".join(f"{100 * size:6.4g}%" for size in sizes)]
    lines += [f"{p:>10} " + " ".join(f"{100 * hits[p, size]:7.2f}" for size in sizes) for p in policies]
    return lines


def tier_table(rows: Sequence[Row]) -> list[str]:
    """Where requests were found in percent, and what moved: a line a policy."""
    lines = [f"{'policy':>10}   VRAM   DRAM   NVMe  evictions promotions  demotions"]
    for row in rows:
        moved = (f"{row.counters.get(key, '-'):>10}" for key in ("evictions", "promotions", "demotions"))
        fast = "     -      -" if row.policy == BOUND else f"{100 * row.vram:6.2f} {100 * row.dram:6.2f}"
        lines.append(f"{row.policy:>10} {fast} {100 * row.nvme:6.2f} {' '.join(moved)}")
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Hit rate over size, a curve a policy and a panel a trace, as PNG.

    Raises
    ------
    UsageError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib", hint="pip install 'fomoe_io[plot]'") from None
    traces = list(dict.fromkeys(row.trace for row in rows))
    figure = Figure(figsize=(4.6 * min(len(traces), 3), 3.6 * -(-len(traces) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(traces) // 3), min(len(traces), 3), squeeze=False).ravel()
    for panel in panels[len(traces) :]:
        panel.set_axis_off()
    for panel, trace in zip(panels, traces, strict=False):
        for policy in dict.fromkeys(row.policy for row in rows):
            points = sorted((row.size, row.hits) for row in rows if (row.trace, row.policy) == (trace, policy))
            x, y = 100 * np.array(points).T
            style = {"color": "black", "linestyle": "--"} if policy == BOUND else {"marker": "o", "markersize": 3}
            panel.plot(x, y, label="Belady's bound" if policy == BOUND else policy, **style)
        panel.set_title(trace, fontsize=10)
        panel.set_xlabel("slots, % of a layer's experts")
        panel.set_ylabel("requests served from memory, %")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomically(path, image.getvalue())
