"""What can be chosen about an engine, checked once."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from fomoe_io.errors import UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.storage.pace import Pace
from fomoe_io.system.files import cache_folder
from fomoe_io.units import parse_bytes

_CHOICES = {
    "reader": ("auto", "uring", "pread"),
    "kernels": ("auto", "ggml", "portable"),
    "activations": ("quantized", "float32"),
    "kv_type": ("f32", "f16"),
    "split_mode": ("auto", "layer", "pingpong", "tensor", "none"),
    "policy": ("lru", "lfu", "decayed", "lfru"),
}


def device_name(text: str) -> str:
    """The text itself, when it names a device: cpu, auto, hip, cuda, or some of a kind by number: hip:1 or hip:0,1.

    Raises
    ------
    UsageError
    """
    if re.fullmatch(r"cpu|auto|(hip|cuda)(:\d{1,3}(,\d{1,3})*)?", text) is None:
        raise UsageError(
            f"{text!r} names no device, expected cpu, auto, hip or cuda, or some by number, such as hip:1 or hip:0,1",
            hint="fomoe-doctor lists them",
        )
    return text


@dataclass(frozen=True, slots=True)
class Tiers:
    """Simulated tiers, as shares (0..1) of all experts."""

    vram: float
    dram: float

    def __post_init__(self) -> None:
        for name in ("vram", "dram"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise UsageError(f"tiers: {name} is {share!r}, expected a share of 0 to 1")
        if not 0 < self.vram + self.dram <= 1 + 1e-9:
            share = 100 * (self.vram + self.dram)
            raise UsageError(f"the tiers hold {share:g} % of the experts, expected more than 0 and at most 100 %")

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
        return cls(float(match[1]) / 100, float(match[2]) / 100)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a device is driven, for measurements: results are the same, but for the last bits with `library_products`.

    Attributes
    ----------
    branches : {1, 2} or None
        Of a token's graph: 2 runs the shared expert beside the routed ones.  None takes 2 on CUDA; HIP submits a graph
        of one branch in one piece, and one of two command by command, through a queue that it may share with others.
    chained_launches : bool
        A token's kernels may be started before the ones they follow have finished, where the device can.
    library_products : bool
        The vendor's library makes the dense products of prompts, where it is found.
    reads_in_place : bool
        A token's kernels read experts of DRAM where they lie, instead of waiting until they have been copied.
    signals_by_stream : bool or None
        A copy's stream tells the waiting kernel that it has come, instead of the host.  None takes that on CUDA; HIP
        does it by a kernel of its own.
    piece_bytes : int or None
        Reads of experts are cut into pieces of about so many bytes, each sent to the device as it lands; None: csrc/gpu
        knows.
    kernel_tuning : tuple of (str, int)
        Overrides of gpu/kernels/tuning.h, of what the host need not know.
    """

    branches: int | None = None
    chained_launches: bool = True
    library_products: bool = True
    reads_in_place: bool = False
    signals_by_stream: bool | None = None
    piece_bytes: int | None = None
    kernel_tuning: tuple[tuple[str, int], ...] = ()


MOST_LOOKAHEAD = 16
"""Ranks; a guess further down is wrong more often than right (docs/car.md)."""


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _size(value: Any) -> int:
    return parse_bytes(value) if isinstance(value, str) else _integer(value)


def _sizes(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, str) and "," in value:
        return tuple(parse_bytes(part) for part in value.split(","))
    return tuple(map(_size, value)) if isinstance(value, tuple | list) else _size(value)


def _weights(value: Any) -> tuple[float, ...]:
    try:
        return tuple(map(float, value.split(",") if isinstance(value, str) else value))
    except ValueError:
        raise TypeError from None


def lookahead_of(value: Any) -> int | str:
    """What `EngineConfig.lookahead` and the option may be: "auto", "on", a number or its text; "off" is 0.

    Raises
    ------
    UsageError
        Another text.
    TypeError
        Neither a text nor a whole number.
    """
    if value in ("auto", "on"):
        return str(value)
    if not isinstance(value, str):
        return _integer(value)
    if value != "off" and re.fullmatch(r"[0-9]{1,9}", value) is None:
        raise UsageError(f"{value!r} is none of on, off, auto and no number of experts")
    return 0 if value == "off" else int(value)


def _is_true(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _path(value: Any) -> Path:
    return Path(value)


def _profile(value: Any) -> Path | str:
    return value if value == "learned" else Path(value)


def _tiers(value: Any) -> Tiers:
    if isinstance(value, str):
        return Tiers.parse(value)
    if not isinstance(value, Tiers):
        raise TypeError
    return value


def _pace(value: Any) -> Pace:
    if isinstance(value, str):
        return Pace.parse(value)
    if not isinstance(value, Pace):
        raise TypeError
    return value


def _car(value: Any) -> CarRule | None:
    if isinstance(value, str):
        return CarRule.parse(value)
    if not isinstance(value, CarRule):
        raise TypeError
    return value


_FORMS: dict[str, tuple[Callable[[Any], object], str]] = {
    "ram_bytes": (_size, 'a number of bytes, or a size such as "16G"'),
    "vram_bytes": (_sizes, 'a number of bytes, a size such as "16G", or one a device'),
    "tensor_split": (_weights, 'numbers, one a device: "3,1"'),
    "cache_bytes": (_size, 'a number of bytes, or a size such as "1G"'),
    "cache_disk_bytes": (_size, 'a number of bytes, or a size such as "100G"'),
    "cache_folder": (_path, "a path"),
    "threads": (_integer, "an integer"),
    "context_tokens": (_integer, "an integer"),
    "sessions": (_integer, "an integer"),
    "batch_tokens": (_integer, "an integer"),
    "ring_depth": (_integer, "an integer"),
    "lookahead": (lookahead_of, '"auto", "on", "off" or an integer'),
    "logit_rows": (_integer, "an integer"),
    "direct": (_is_true, "True or False"),
    "peer_memory": (_is_true, "True or False"),
    "tiers": (_tiers, 'Tiers, or a text such as "vram=20%,dram=15%"'),
    "car": (_car, 'a CarRule, or a text such as "on" or "regret:0.03"'),
    "pace": (_pace, 'a Pace, or a text such as "14.5G,80us"'),
    "calibration": (os.fspath, "a path"),
    "profile": (_profile, 'a path or "learned"'),
    "trace": (_path, "a path"),
}
_NEEDED = ("cache_disk_bytes", "sessions", "lookahead", "logit_rows", "direct", "peer_memory")
"""None is no choice."""


BATCH_TOKENS = 512
"""Of a prompt at once, as llama.cpp has it."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to open a model.  Sizes, tiers, rules and paths may come as the texts that the commands take.

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
    sessions : int
        Timelines that may be open at once; memory is set aside for the state of each.
    batch_tokens : int or None
        Most tokens of a prompt computed at once (less under a tight budget; results do not depend on it); None: 512, on
        a GPU 2048 where that takes little of its memory, since every batch reads nearly every expert.
    kv_type : {"f32", "f16"}
        What keys and values are kept as: f16 takes half the memory of a long context, and rounds.
    logit_rows : int
        How many positions' logits the caller keeps at once, beside a session's own; `ram_bytes` has room for them.
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
    device : str
        "cpu"; "auto" takes a GPU when there is one, and all that equal it where that pays (`split_mode`); "hip" or
        "cuda" one of its devices, "hip:1" that one.  Devices that share the processor's memory are taken by number
        only; of the others, the one with the most memory.
    vram_bytes : int, tuple of int or None
        Bound of the device memory, of each device; None takes what is free.
    split_mode : {"auto", "layer", "pingpong", "tensor", "none"}
        How several devices share a model: whole runs of layers, layer by layer in turn, or every layer together, each
        device an equal share of the rows of its products; "auto" takes the last where equal devices win by it.
        "none": the first device alone.
    peer_memory : bool
        Devices that compute every layer together exchange what they have made by each other's memory, where a test at
        opening finds that it arrives whole; else by the host's.
    tensor_split : tuple of float or None
        How much of it each takes; None: all the same.
    cache_bytes : int or None
        Of `ram_bytes`, for what sessions have read and others may go on from (:meth:`Engine.timeline`); None: a
        sixteenth, at most 2 GiB, as far as that is of use.
    cache_disk_bytes : int
        Of files that keep it beyond the process; 0: none.
    cache_folder : Path or None
        Where they are; None: in the user's cache directory.
    lookahead : {"auto", "on", "off"} or int
        Single tokens read experts ahead that the next layer's router would pick before this layer's experts are added:
        so many of them, or with "on" as many as it picks; "off" is 0.  A GPU guesses of the layer after it, too, the
        likelier half.  "auto" keeps to what is measured to be faster while it runs, and does without where nothing can
        be missed or memory is short (experts/lookahead.py).
    car : CarRule or None
        Cache-aware routing of single tokens; None is exact.
    profile : Path, "learned" or None
        Warm start by this profile if the file exists, or by what earlier runs have learned about the model
        (fomoe_io/learned_profile.py); None: by the store's own, if it has one.  Changes no exact result.
    trace : Path or None
        Write what the router picks here (fomoe_io/trace.py).
    tuning : Tuning
    progress : callable or None
        Called while the model opens, with ("weights", bytes read, bytes in all) and ("experts", layers filled, layers).
    """

    ram_bytes: int | None = None
    slots: int | None = None
    threads: int | None = None
    context_tokens: int | None = None
    sessions: int = 1
    batch_tokens: int | None = None
    kv_type: str = "f32"
    logit_rows: int = 0
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
    vram_bytes: int | tuple[int, ...] | None = None
    split_mode: str = "auto"
    peer_memory: bool = False
    tensor_split: tuple[float, ...] | None = None
    cache_bytes: int | None = 0
    cache_disk_bytes: int = 0
    cache_folder: Path | None = None
    lookahead: int | Literal["auto", "on", "off"] = "auto"
    car: CarRule | None = None
    profile: Path | Literal["learned"] | None = None
    trace: Path | None = None
    tuning: Tuning = Tuning()
    progress: Callable[[str, int, int], None] | None = field(default=None, compare=False, repr=False)

    @property
    def sessions_folder(self) -> Path:
        """Where files keep what sessions have read."""
        return self.cache_folder or cache_folder() / "sessions"

    def __post_init__(self) -> None:
        for name, (form, expected) in _FORMS.items():
            value = getattr(self, name)
            if value is None and name not in _NEEDED:
                continue
            try:
                object.__setattr__(self, name, form(value))
            except TypeError:
                raise UsageError(f"{name} is {value!r}, expected {expected}") from None
            except UsageError as error:
                raise UsageError(f"{name}: {error.message}", hint=error.hint) from None
        self._check_values()

    def vram_of(self, device: int) -> int | None:
        """Bound of the memory of one of the devices."""
        return self.vram_bytes[device] if isinstance(self.vram_bytes, tuple) else self.vram_bytes

    def guesses_of(self, used: int) -> int:
        """How many experts of the next layer may be read ahead, of a model that picks so many."""
        return min(used, MOST_LOOKAHEAD if isinstance(self.lookahead, str) else self.lookahead)

    @property
    def least_batch_tokens(self) -> int:
        """What batches have where nothing is said, and nothing is known of the memory."""
        return BATCH_TOKENS if self.batch_tokens is None else self.batch_tokens

    @property
    def lookahead_mode(self) -> Literal["auto", "on", "off"]:
        """Whether that is done."""
        return "auto" if self.lookahead == "auto" else "on" if self.lookahead else "off"

    def _check_values(self) -> None:
        if isinstance(self.lookahead, int) and not 0 <= self.lookahead <= MOST_LOOKAHEAD:
            raise UsageError(f"lookahead is {self.lookahead}, expected 0 to {MOST_LOOKAHEAD}")
        if self.logit_rows < 0:
            raise UsageError(f"logit_rows is {self.logit_rows}, expected 0 or more")
        device_name(self.device)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        limits = {
            "threads": 256,
            "context_tokens": 1 << 22,
            "sessions": 256,
            "batch_tokens": 1 << 14,
            "ring_depth": 4096,
            "slots": 1 << 16,
        }
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"{name} is {value}, expected 1 to {most}")
        for name in ("cache_bytes", "cache_disk_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.slots is not None and self.tiers is not None:
            raise UsageError("tiers say how many experts memory holds, and so do slots", hint="drop --slots or --tiers")
        for name in ("ram_bytes", "vram_bytes"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise UsageError(f"{name} is {value}, expected a positive size")
        devices = len(self.device.split(","))
        for name in ("vram_bytes", "tensor_split"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != devices:
                raise UsageError(f"{name} is for {len(value)} devices, and {self.device} names {devices}")
        if self.tensor_split is not None and self.split_mode == "tensor" and len(set(self.tensor_split)) > 1:
            raise UsageError("devices that compute a layer together have equal shares", hint="drop -ts, or -sm layer")
        if self.tensor_split is not None and not min(self.tensor_split) > 0:
            raise UsageError(f"tensor_split is {self.tensor_split}, expected positive numbers")
