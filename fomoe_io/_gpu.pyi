"""The native side of a GPU engine: see _gpu.pyx and csrc/gpu/device_experts.h."""

from typing import Any

import numpy as np

from fomoe_io._cpu import Trace
from fomoe_io._gate import Gate
from fomoe_io._hip import Event, Graph, Stream

TILE_PAIRS: int
"""Pairs of a tile at most."""
TILE_BYTES: int
"""Size of csrc/gpu/device_experts.h, fomoe_tile."""
STREAMS: int
"""Streams of copies: up, down."""
EVENT_RINGS: int
"""Lanes: those of copies, and a batch's kernels."""
LANE_EVENTS: int
"""Events that each lane needs."""

class DeviceExperts:
    def __init__(
        self,
        layers: list[dict[str, Any] | None],
        classes: list[dict[str, Any]],
        slots: np.ndarray,
        used: int,
        policy: int,
        decay: tuple[float, float, float],
        reader: int,
        streams: list[Stream],
        events: list[list[Event]],
        gate: Gate,
        keep: object,
    ) -> None: ...
    def warm(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> int: ...
    def settle(self) -> None: ...
    def failure(self) -> tuple[int, int]: ...
    def counters(self) -> dict[str, int]: ...
    def picks(self) -> np.ndarray: ...
    def begin_batch(self, tokens: int, stream: Stream) -> None: ...
    def batch_layer(self, layer: int, picks: np.ndarray, weights: np.ndarray, order: np.ndarray) -> int: ...
    def next_wave(self, layer: int, tiles: np.ndarray) -> tuple[int, int]: ...
    def bind(self, *, changed: int, stop: int, logits_from: int, logits_to: int) -> None: ...
    def trace(self, trace: Trace | None, tokens: int) -> None: ...
    def read_in_place(self, in_place: bool, distance: int) -> None: ...
    def signal_by_stream(self, by_stream: bool) -> None: ...
    def set_piece_bytes(self, nbytes: int) -> None: ...
    def run(self, stream: Stream, graph: Graph, number: int, logits_bytes: int) -> int: ...
