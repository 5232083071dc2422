"""Cache-aware routing (csrc/experts/car.h): which rule, how far it goes, and what it is called on a command line."""

from __future__ import annotations

import ctypes
import math
import re
from dataclasses import dataclass
from typing import Final, Self

from fomoe_io.errors import UsageError

RULES: Final = {"ratio": 1, "prior": 2, "regret": 3, "budget": 4}
"""gpu/kernels/car_rule.h, enum fomoe_car_rule."""

MOST_SWAPS = 16
"""gpu/kernels/car_rule.h, FOMOE_CAR_MOST_SWAPS."""

_SETTINGS = ("keep", "swaps", "warmup", "backfill", "handicap")
_NUMBER = r"[0-9.]+(?:e[+-]?[0-9]+)?"
_EXAMPLE = "--car regret:0.03, or --car ratio:0.5,keep=2,swaps=4,warmup=64"


class NativeCar(ctypes.Structure):
    """gpu/kernels/car_rule.h, fomoe_car."""

    _fields_ = (
        ("rule", ctypes.c_int32),
        ("parameter", ctypes.c_float),
        ("keep", ctypes.c_int32),
        ("swaps", ctypes.c_int32),
        ("warmup", ctypes.c_int32),
        ("backfill", ctypes.c_int32),
        ("slow_handicap", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class CarRule:
    """When a resident expert may stand in for one that would have to be read.

    Attributes
    ----------
    rule : {"ratio", "prior", "regret", "budget"}
        What is compared with `parameter`: see csrc/experts/car.h.
    parameter : float
    keep : int
        So many of a token's best picks are never swapped.
    swaps : int
        Most swaps of a token in a layer.
    warmup : int
        Tokens at a session's start that stay exact.
    backfill : int
        Most picks of a layer that are read, while the drive idles, after another expert stood in for them.
    handicap : float
        Nats (differences of router logits) that a candidate of the slower tier must be ahead of one of the faster.
    """

    rule: str
    parameter: float
    keep: int = 1
    swaps: int = MOST_SWAPS
    warmup: int = 0
    backfill: int = 0
    handicap: float = 0.1

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UsageError(f"{self.rule!r} is no rule of cache-aware routing", hint=_EXAMPLE)
        if not 0 <= self.parameter <= 1:
            raise UsageError(f"the {self.rule} is {self.parameter}, expected 0 to 1", hint=_EXAMPLE)
        limits = {"keep": 256, "swaps": MOST_SWAPS, "warmup": 1 << 24, "backfill": MOST_SWAPS}
        for name, most in limits.items():
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 to {most}", hint=_EXAMPLE)
        if not 0 <= self.handicap < math.inf:
            raise UsageError(f"the handicap is {self.handicap}, expected 0 or more nats", hint=_EXAMPLE)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """From `off`, `on`, or `RULE:PARAMETER[,keep=N][,swaps=N][,warmup=N][,backfill=N][,handicap=NATS]`.

        Raises
        ------
        UsageError
        """
        if text == "off":
            return None
        if text == "on":
            text = ON
        match = re.fullmatch(rf"([a-z]+):({_NUMBER})((?:,[a-z]+={_NUMBER})*)", text)
        if match is None:
            raise UsageError(f"{text!r} is no rule of cache-aware routing", hint=_EXAMPLE)
        settings: dict[str, float | int] = {}
        try:
            parameter = float(match[2])
            for part in filter(None, match[3].split(",")):
                name, value = part.split("=")
                if name not in _SETTINGS:
                    raise UsageError(f"cache-aware routing has no setting {name!r}", hint=_EXAMPLE)
                settings[name] = float(value) if name == "handicap" else int(value)
        except ValueError:
            raise UsageError(f"{text!r} has a malformed number", hint=_EXAMPLE) from None
        return cls(match[1], parameter, **settings)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """As :meth:`parse` reads it, without loss."""
        default = CarRule(self.rule, self.parameter)
        text = f"{self.rule}:{_shortest(self.parameter)}"
        for name in _SETTINGS:
            if getattr(self, name) != getattr(default, name):
                text += f",{name}={_shortest(getattr(self, name))}"
        return text

    def native(self) -> NativeCar:
        """For the engine."""
        return NativeCar(
            RULES[self.rule], self.parameter, self.keep, self.swaps, self.warmup, self.backfill, self.handicap
        )


def _shortest(value: float) -> str:
    """Six digits where they say all."""
    short = f"{value:g}"
    return short if type(value) is float and float(short) == value else repr(value)


ON = "regret:0.034"
"""What `--car on` means: the setting that docs/car.md arrives at."""
