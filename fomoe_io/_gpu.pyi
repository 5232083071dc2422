"""The native side of a GPU engine: see _gpu.pyx and csrc/gpu/device_experts.h."""

from typing import Any

import numpy as np

from fomoe_io._hip import Event, Graph, Stream

TILE_PAIRS: int
"""Pairs of a tile at most."""
TILE_BYTES: int
"""Size of csrc/gpu/device_experts.h, fomoe_tile."""
LANES: int
"""Streams of copies: up, down."""
LANE_EVENTS: int
"""Events that each of them needs."""

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
        keep: object,
    ) -> None: ...
    def warm(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> int: ...
    def settle(self) -> None: ...
    def failure(self) -> tuple[int, int]: ...
    def counters(self) -> dict[str, int]: ...
    def picks(self) -> np.ndarray: ...
    def begin_batch(self, tokens: int) -> None: ...
    def batch_layer(self, layer: int, picks: np.ndarray, order: np.ndarray) -> int: ...
    def next_wave(self, layer: int, computed: Event | None, tiles: np.ndarray) -> tuple[int, int]: ...
    def run(
        self,
        stream: Stream,
        graph: Graph,
        number: int,
        changed: int,
        logits_to: int,
        logits_from: int,
        logits_bytes: int,
        stop: int,
    ) -> int: ...
