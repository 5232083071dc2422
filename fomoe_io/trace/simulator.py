"""What a policy and a budget would have done with a trace: the engine's own bookkeeping, played without bytes.

:func:`replay` runs csrc/experts/residency.c through the calls that the engine makes, so that it counts what that counts
(tests/unit/test_simulator.py).  :func:`belady` is the bound that no policy beats, :func:`static_dram` the scheme of
pmerolla/fomoe, an LRU of VRAM above a DRAM list that never changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fomoe_io.errors import UsageError
from fomoe_io.experts.residency import COMING, COUNTERS, DECAY, DRAM, LIBRARY, NVME, VRAM, Decay, Residency, address
from fomoe_io.experts.slots import hottest_first
from fomoe_io.trace.trace import LayerTrace, Trace, expert_counts


class _Layer(ctypes.Structure):
    """csrc/experts/replay.h, fomoe_replay_layer."""

    _fields_ = (
        ("layer", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("slots", ctypes.c_int32),
        ("used", ctypes.c_int32),
        ("tokens", ctypes.c_void_p),
        ("picks", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """Where the requests of a trace were found.

    Attributes
    ----------
    found : dict of int to numpy.ndarray
        Layer -> int8 [n, used]: 0 VRAM, 1 DRAM, 2 NVMe; see :class:`fomoe_io.trace.trace.LayerTrace`.
    counters : dict of str to int
        The engine's counters (fomoe_io/residency.py, COUNTERS); without promotions and the like when nothing was
        moved (:func:`belady`, :func:`static_dram`).
    """

    found: dict[int, np.ndarray]
    counters: dict[str, int]

    def share(self, tier: int) -> float:
        """Of the requests: how many were found there, 0..1."""
        return self.counters[COUNTERS[1 + tier]] / self.counters["requests"]

    def miss_curve(self, tokens: int) -> np.ndarray:
        """NVMe share of each window of so many tokens: float64 [windows], the last one may be shorter."""
        rows = max(len(found) for found in self.found.values())
        windows = -(-rows // tokens)
        missed, asked = np.zeros(windows), np.zeros(windows)
        for found in self.found.values():
            edges = np.arange(0, len(found), tokens)
            missed[: len(edges)] += np.add.reduceat((found == NVME).sum(axis=1), edges)
            asked[: len(edges)] += np.add.reduceat(np.full(len(found), found.shape[1]), edges)
        return missed / asked


def single_tokens(trace: Trace) -> Trace:
    """The same tokens one by one, as decoding would have asked for them; the warm start is left out.

    Layers that computed fewer tokens of a batch than others (a last layer computes only what is wanted) keep the
    batch's last ones.
    """
    length = trace.tokens
    ends = np.cumsum(trace.batch_tokens)
    layers = {}
    for number, layer in trace.layers.items():
        tokens = np.zeros(length, np.int64)
        for end, count in zip(ends.tolist(), layer.tokens.tolist(), strict=True):
            tokens[end - count : end] = 1
        layers[number] = LayerTrace(tokens, layer.picks, layer.weights, layer.picks, None)
    return Trace(trace.header, np.ones(length, np.int64), layers)


def even_slots(trace: Trace, vram: float, dram: float) -> np.ndarray:
    """Slots of shares of a layer's experts, as the engine's `--tiers` has them: int32 [layers, 2], at least one."""
    experts = np.array(trace.header.experts)
    both = np.maximum(np.rint((vram + dram) * experts), 1).astype(np.int32)
    fast = np.minimum(np.rint(vram * experts), both).astype(np.int32)
    return np.stack([fast, both - fast], axis=1)


def replay(
    trace: Trace,
    slots: np.ndarray,
    *,
    policy: str = "decayed",
    decay: Decay = DECAY,
    seeds: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
    as_chosen: bool = False,
) -> Replay:
    """Play a trace.

    Parameters
    ----------
    trace : Trace
    slots : numpy.ndarray
        int [layers, 2]: slots of each layer in VRAM and DRAM.
    policy, decay
        See :class:`fomoe_io.experts.residency.Residency`.
    seeds : mapping of int to (numpy.ndarray, numpy.ndarray), optional
        Warm start: layer -> experts (hottest first) and scores.
    as_chosen : bool
        Ask for the experts that were computed, as a trace with cache-aware routing has them; else for the picks.

    Raises
    ------
    UsageError
        No slots for a layer, or slots of another model.
    """
    experts = trace.header.experts
    residency = Residency(experts, _checked_slots(trace, slots), policy=policy, decay=decay)
    for number, (ids, scores) in (seeds or {}).items():
        for expert, score in zip(ids.tolist(), scores.tolist(), strict=True):
            residency.seed(number, expert, score)
    layers, found, keep = _native(trace, slots, as_chosen)
    batch_tokens = np.ascontiguousarray(trace.batch_tokens, np.int64)
    if LIBRARY.fomoe_replay(
        residency.handle, layers, len(layers), ctypes.c_int64(len(batch_tokens)), address(batch_tokens)
    ):
        raise MemoryError
    del keep
    for values in found.values():
        values[values == COMING] = NVME
    return Replay(found, residency.counters())


def belady(trace: Trace, slots: np.ndarray) -> Replay:
    """The fewest NVMe misses that any policy could have had with the slots of both tiers together.

    Whoever is needed last leaves first (Belady, "A study of replacement algorithms for a virtual-storage computer",
    1966); what a batch needs stays until the batch is done, as in the engine.  Hits count as DRAM's.
    """
    layers, found, keep = _native(trace, _checked_slots(trace, slots), False)
    for layer in layers:
        if LIBRARY.fomoe_replay_belady(ctypes.byref(layer), ctypes.c_int64(len(trace.batch_tokens))):
            raise MemoryError
    del keep
    return _counted(found)


def static_dram(trace: Trace, slots: np.ndarray, counts: Mapping[int, np.ndarray] | None = None) -> Replay:
    """The tiering of pmerolla/fomoe: VRAM is an LRU, DRAM a list that never changes, victims of VRAM are forgotten.

    The list holds the hottest experts of `counts` after those that VRAM alone could hold.  VRAM starts empty, as in
    :func:`replay`.

    Parameters
    ----------
    trace, slots
        As in :func:`replay`.
    counts : mapping of int to numpy.ndarray, optional
        Layer -> picks of each expert.  Default: those of the trace itself, which flatters the scheme: its own lists
        come from another text.
    """
    slots = _checked_slots(trace, slots)
    counts = expert_counts(trace) if counts is None else counts
    order = {number: hottest_first(counts[number]) for number in trace.layers}
    fast = np.stack([np.maximum(slots[:, 0], 1), np.zeros(len(slots), np.int32)], axis=1)
    played = replay(trace, fast, policy="lru")
    for number, found in played.found.items():
        vram, dram = slots[number]
        listed = np.isin(trace.layers[number].picks, order[number][vram : vram + dram])
        found[(found == NVME) & listed] = DRAM
    return _counted(played.found)


def _checked_slots(trace: Trace, slots: np.ndarray) -> np.ndarray:
    slots = np.ascontiguousarray(slots, np.int32)
    layers = len(trace.header.experts)
    if slots.shape != (layers, 2) or slots.min() < 0:
        raise UsageError(f"slots must be counts [{layers} layers, 2 tiers], not {slots.shape}")
    if any(slots[number].sum() < 1 for number in trace.layers):
        raise UsageError("a layer has no slot at all", hint="--sizes 10% or more")
    return slots


def _native(
    trace: Trace, slots: np.ndarray, as_chosen: bool
) -> tuple[ctypes.Array[_Layer], dict[int, np.ndarray], list[np.ndarray]]:
    """The layers as C takes them, where their results will be, and what must be kept alive meanwhile."""
    found: dict[int, np.ndarray] = {}
    keep: list[np.ndarray] = []
    rows = []
    for number, layer in trace.layers.items():
        picks = np.ascontiguousarray(layer.picks, np.uint16)
        chosen = np.ascontiguousarray(layer.chosen, np.uint16) if as_chosen else picks
        tokens = np.ascontiguousarray(layer.tokens, np.int64)
        found[number] = np.empty(picks.shape, np.int8)
        keep += [picks, chosen, tokens]
        rows.append(
            _Layer(
                number,
                trace.header.experts[number],
                int(slots[number].sum()),
                picks.shape[1],
                *(array.ctypes.data for array in (tokens, picks, chosen, found[number])),
            )
        )
    return (_Layer * len(rows))(*rows), found, keep


def _counted(found: dict[int, np.ndarray]) -> Replay:
    hits = np.sum([np.bincount(values.ravel(), minlength=3) for values in found.values()], axis=0)
    names = COUNTERS[1:4]
    counters = {name: int(hits[tier]) for name, tier in zip(names, (VRAM, DRAM, NVME), strict=True)}
    return Replay(found, {"requests": int(np.sum(hits)), **counters})
