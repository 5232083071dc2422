"""Where the experts are: a picture of all layers, taken by the engine's thread between two tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fomoe_io.engine import Engine

TIERS = np.frombuffer(b"vd.", np.uint8)
"""A letter for VRAM, DRAM and the drive."""
DIGITS = np.frombuffer(b"0123456789", np.uint8)


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Of one moment; copies, which anybody may read.

    Attributes
    ----------
    tiers : dict of int to numpy.ndarray
        Layer -> int8 [experts]: 0 VRAM, 1 DRAM, 2 the drive.
    picks : dict of int to numpy.ndarray
        Layer -> int64 [experts]: how often the router has picked each.
    slots : tuple of (int, int)
        Of each layer, in VRAM and in DRAM.
    """

    tiers: dict[int, np.ndarray]
    picks: dict[int, np.ndarray]
    slots: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """Of an engine, by its own thread."""
        return cls(engine.expert_tiers(), engine.expert_counts(), engine.budgets.slots)

    def document(self) -> list[dict[str, Any]]:
        """A layer's experts as texts of one character each: `tiers`, of "vd.", and `heat`, picks from 0 to 9."""
        return [
            {
                "layer": layer,
                "slots": list(self.slots[layer]),
                "vram": int(np.count_nonzero(tiers == 0)),
                "dram": int(np.count_nonzero(tiers == 1)),
                "tiers": TIERS[tiers].tobytes().decode(),
                "heat": _heat(self.picks[layer]),
            }
            for layer, tiers in self.tiers.items()
        ]


def _heat(picks: np.ndarray) -> str:
    """By the square root: a layer's hottest experts have many times the picks of most."""
    share = np.sqrt(picks / max(int(picks.max(initial=0)), 1))
    return DIGITS[np.ceil(9 * share).astype(np.int64)].tobytes().decode()
