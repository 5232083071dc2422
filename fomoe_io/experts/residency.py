"""The engine's residency bookkeeping (csrc/experts/residency.c) for tests and the simulator, without bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from fomoe_io import _cpu
from fomoe_io.errors import UsageError

POLICIES: Final = {"lru": 0, "lfu": 1, "decayed": 2, "lfru": 3}
"""csrc/experts/residency.h, enum fomoe_policy."""


class Decay(NamedTuple):
    """The two averages of the `decayed` policy (csrc/experts/residency.h, fomoe_decay).

    Attributes
    ----------
    slow, fast : float
        Factors per token, in (0, 1).
    fast_share : float
        Of the fast average in the sum, 0..1.
    """

    slow: float
    fast: float
    fast_share: float


DECAY = Decay(slow=0.998, fast=0.93, fast_share=0.2)
"""Fewest misses beyond Belady's bound over the tuning traces of docs/caching.md, in the middle of a wide plateau."""

VRAM, DRAM, NVME, COMING = range(4)
"""Where an expert was found (csrc/experts/residency.h)."""

COUNTERS: Final = (
    "requests",
    "vram_hits",
    "dram_hits",
    "nvme_hits",
    "evictions",
    "promotions",
    "demotions",
    "substitutions",
    "offers",
)
"""Of fomoe_residency_counters, in its order."""

LIBRARY = ctypes.CDLL(_cpu.__file__)
"""The C symbols of the extension; calls release the GIL."""

_POINTER_RESULTS = ("fomoe_residency_new", "fomoe_residency_count", "fomoe_residency_tiers")
for _name in _POINTER_RESULTS:
    getattr(LIBRARY, _name).restype = ctypes.c_void_p


class Placement(ctypes.Structure):
    """Where an expert was found (`source`) and where it will be computed from (`tier`, `slot`)."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("expert", "source", "tier", "slot"))


LIBRARY.fomoe_residency_offer.restype = Placement
LIBRARY.fomoe_residency_seed.restype = Placement


def address(array: np.ndarray | None) -> ctypes.c_void_p:
    """Of an array's first element; NULL for None."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def policy_number(policy: str) -> int:
    """Of a policy's name.

    Raises
    ------
    UsageError
    """
    if policy not in POLICIES:
        raise UsageError(f"{policy!r} is no policy", hint=f"one of {', '.join(POLICIES)}")
    return POLICIES[policy]


class Residency:
    """Tiers, slots and policy of all layers.

    Parameters
    ----------
    experts : sequence of int
        Experts of each layer.
    slots : numpy.ndarray
        int [layers, 2]: slots of each layer in VRAM and DRAM.
    policy : {"lru", "lfu", "decayed", "lfru"}
    decay : Decay
        Of the policy "decayed"; others do not use it.
    """

    def __init__(
        self, experts: Sequence[int], slots: np.ndarray, *, policy: str = "decayed", decay: Decay = DECAY
    ) -> None:
        self.experts = np.ascontiguousarray(experts, np.int32)
        self.slots = np.ascontiguousarray(slots, np.int32)
        if self.slots.shape != (len(self.experts), 2) or self.slots.min() < 0:
            raise UsageError(f"slots must be counts [{len(self.experts)} layers, 2 tiers], not {self.slots.shape}")
        if not (0 < decay.slow < 1 and 0 < decay.fast < 1 and 0 <= decay.fast_share <= 1):
            raise UsageError(f"{decay} is no decay: factors per token lie between 0 and 1, and so does the share")
        self._number = policy_number(policy)
        self.handle = ctypes.c_void_p(
            LIBRARY.fomoe_residency_new(
                len(self.experts),
                address(self.experts),
                address(self.slots),
                self._number,
                (ctypes.c_double * 3)(*decay),
            )
        )
        if not self.handle:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            LIBRARY.fomoe_residency_free(self.handle)
            self.handle = ctypes.c_void_p()

    def tick(self, tokens: int = 1) -> None:
        """A batch of tokens begins."""
        LIBRARY.fomoe_residency_tick(self.handle, ctypes.c_int64(tokens))

    def touch(self, layer: int, experts: Sequence[int], *, age: int = 0) -> None:
        """Count true picks; `age` tokens of the batch come after theirs."""
        ids = self._checked(layer, experts)
        LIBRARY.fomoe_residency_touch(self.handle, layer, ctypes.c_int64(age), address(ids), len(ids))

    def resolve(
        self, layer: int, experts: Sequence[int], weights: Sequence[int] | None = None
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Find or make places for distinct experts and pin them.

        Returns
        -------
        placements : list of (expert, source, tier, slot)
        moves : list of (expert, from tier, from slot, to tier, to slot)

        Raises
        ------
        UsageError
            More experts than slots that are not held already; nothing has changed.
        """
        ids = self._checked(layer, experts)
        weight = None if weights is None else np.ascontiguousarray(weights, np.int32)
        placements = np.empty((len(ids), 4), np.int32)
        moves = np.empty((2 * len(ids), 5), np.int32)
        count = ctypes.c_int()
        if LIBRARY.fomoe_residency_resolve(
            self.handle, layer, address(ids), address(weight), len(ids), address(placements), address(moves),
            ctypes.byref(count),
        ):  # fmt: skip
            raise UsageError(f"layer {layer} has no room for {len(ids)} experts at once")
        return [tuple(row) for row in placements.tolist()], [tuple(row) for row in moves[: count.value].tolist()]

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """They have been computed."""
        ids = self._checked(layer, experts)
        LIBRARY.fomoe_residency_release(self.handle, layer, address(ids), len(ids))

    def substituted(self, count: int) -> None:
        """Count requests that were answered with another expert."""
        LIBRARY.fomoe_residency_substituted(self.handle, count)

    def drop(self, layer: int, expert: int) -> None:
        """Its read failed."""
        LIBRARY.fomoe_residency_drop(self.handle, layer, int(self._checked(layer, [expert])[0]))

    def offer(self, layer: int, expert: int, *, spare: int = 0) -> Placement:
        """A slot for an expert that nobody waits for; tier NVME: none."""
        found: Placement = LIBRARY.fomoe_residency_offer(
            self.handle, layer, int(self._checked(layer, [expert])[0]), spare
        )
        return found

    def arrived(self, layer: int, expert: int) -> None:
        """The read that an offer started is done."""
        LIBRARY.fomoe_residency_arrived(self.handle, layer, int(self._checked(layer, [expert])[0]))

    def seed(self, layer: int, expert: int, score: float) -> Placement:
        """Warm start, hottest first."""
        found: Placement = LIBRARY.fomoe_residency_seed(
            self.handle, layer, int(self._checked(layer, [expert])[0]), ctypes.c_double(score)
        )
        return found

    def tiers(self, layer: int) -> np.ndarray:
        """Tier of every expert of a layer: int8 [experts], a copy."""
        start = LIBRARY.fomoe_residency_tiers(self.handle, layer)
        return np.array((ctypes.c_int8 * int(self.experts[layer])).from_address(start))

    def scores(self, layer: int) -> np.ndarray:
        """Scores of a layer's experts at the present clock: float64 [experts]."""
        scores = np.empty(int(self.experts[layer]))
        LIBRARY.fomoe_residency_scores(self.handle, layer, address(scores))
        return scores

    def counters(self) -> dict[str, int]:
        """Counts since creation, by the names of :data:`COUNTERS`."""
        start = LIBRARY.fomoe_residency_count(self.handle)
        return dict(zip(COUNTERS, (ctypes.c_uint64 * len(COUNTERS)).from_address(start), strict=True))

    def _checked(self, layer: int, experts: Sequence[int]) -> np.ndarray:
        ids = np.ascontiguousarray(experts, np.int32)
        if not 0 <= layer < len(self.experts):
            raise UsageError(f"layer {layer} is not among 0..{len(self.experts) - 1}")
        if np.any((ids < 0) | (ids >= self.experts[layer])):
            raise UsageError(f"experts of layer {layer} must lie in 0..{self.experts[layer] - 1}")
        return ids
