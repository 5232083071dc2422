"""What can be chosen about an engine, checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from fomoe_io.errors import UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.storage.pace import Pace

_CHOICES = {
    "device": ("cpu", "auto", "hip", "cuda"),
    "reader": ("auto", "uring", "pread"),
    "kernels": ("auto", "ggml", "portable"),
    "activations": ("quantized", "float32"),
    "policy": ("lru", "lfu", "decayed", "lfru"),
}


@dataclass(frozen=True, slots=True)
class Tiers:
    """Simulated tiers, as shares (0..1) of all experts."""

    vram: float
    dram: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `vram=20%,dram=15%`.

        Raises
        ------
        UsageError
        """
        match = re.fullmatch(r"vram=(\d+(?:\.\d+)?)%,dram=(\d+(?:\.\d+)?)%", text.replace(" ", ""))
        if match is None:
            raise UsageError(f"{text!r} names no tiers", hint="--tiers vram=20%,dram=15%")
        vram, dram = float(match[1]) / 100, float(match[2]) / 100
        if not 0 < vram + dram <= 1:
            raise UsageError(f"tiers {text!r} hold {100 * (vram + dram):g} % of the experts, expected 0 to 100 %")
        return cls(vram, dram)


MOST_LOOKAHEAD = 16
"""Ranks; a guess further down is wrong more often than right (docs/car.md)."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to open a model.

    Attributes
    ----------
    ram_bytes : int or None
        Bound of the whole process (peak resident set); None takes 80 % of what is available, rounded down.
    slots : int or None
        Experts of each layer that memory holds; None: as many as the budget has room for.  It follows from the
        configuration and the model alone where `ram_bytes` is given.
    threads : int or None
        None takes the processors this process may run on.
    context_tokens : int or None
        Positions of a session; None takes the model's, at most 4096.
    batch_tokens : int
        Most tokens of a prompt computed at once (less under a tight budget; results do not depend on it).
    reader : {"auto", "uring", "pread"}
    ring_depth : int or None
        Reads in flight at most, for each drive; None takes what the calibration says, or 64.
    calibration : str or None
        File of `fomoe-bench io --calibrate`: sizes of sub-reads and the depth come from it.
    direct : bool
        O_DIRECT where the file system allows it.
    pace : Pace or None
        Hold reads back to the pace of a drive that is not at hand (benchmarks: `storage/pace.py`).
    kernels : {"auto", "ggml", "portable"}
    activations : {"quantized", "float32"}
        "float32" expands weights instead of quantizing activations: slow, for comparisons.
    policy : {"lru", "lfu", "decayed", "lfru"}
        Which expert leaves memory first.
    tiers : Tiers or None
        Most experts in VRAM and in DRAM; on a CPU both are simulated.
    device : {"cpu", "auto", "hip", "cuda"}
        "auto" takes a GPU when there is one.
    vram_bytes : int or None
        Bound of the device memory; None takes what is free.
    lookahead : int
        How many of the experts are read ahead that the next layer's router would pick from this layer's output; 0 none.
    car : CarRule or None
        Cache-aware routing of single tokens; None is exact.
    profile : Path, "learned" or None
        Warm start by this profile if the file exists, or by what earlier runs have learned about the model
        (fomoe_io/learned_profile.py); None: by the store's own, if it has one.  Changes no exact result.
    trace : Path or None
        Write what the router picks here (fomoe_io/trace.py).
    """

    ram_bytes: int | None = None
    slots: int | None = None
    threads: int | None = None
    context_tokens: int | None = None
    batch_tokens: int = 512
    reader: str = "auto"
    ring_depth: int | None = None
    calibration: str | None = None
    direct: bool = True
    pace: Pace | None = None
    kernels: str = "auto"
    activations: str = "quantized"
    policy: str = "decayed"
    tiers: Tiers | None = None
    device: str = "cpu"
    vram_bytes: int | None = None
    lookahead: int = 0
    car: CarRule | None = None
    profile: Path | Literal["learned"] | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.lookahead <= MOST_LOOKAHEAD:
            raise UsageError(f"lookahead is {self.lookahead}, expected 0 to {MOST_LOOKAHEAD}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        limits = {
            "threads": 256,
            "context_tokens": 1 << 22,
            "batch_tokens": 1 << 14,
            "ring_depth": 4096,
            "slots": 1 << 16,
        }
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"{name} is {value}, expected 1 to {most}")
        if self.slots is not None and self.tiers is not None:
            raise UsageError("tiers say how many experts memory holds, and so do slots", hint="drop --slots or --tiers")
        for name in ("ram_bytes", "vram_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected a positive size")
