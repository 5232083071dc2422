"""Rotary positions: plain, linearly scaled, or YaRN, as llama.cpp computes them.

A pair's angle is its position times a frequency, whatever the scaling: a model has one vector of frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.models.keys import Keys

KEYS = frozenset(
    {
        "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
    }
)  # fmt: skip
"""Of an architecture's namespace: what `rope_of` reads."""

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""YaRN: pairs that turn oftener than the first in the original context keep their frequency, pairs that turn less
often than the second are interpolated.  llama.cpp reads no other values for the architectures that run here."""

FIXED: dict[str, tuple[float, ...]] = {
    "rope.scaling.yarn_beta_fast": (BETA_FAST,),
    "rope.scaling.yarn_beta_slow": (BETA_SLOW,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # negative: not set
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0,),
}
"""Keys of the scaling whose values are given: others are refused."""

LEFT_OUT = frozenset(
    {
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
    }
)  # fmt: skip
"""Keys of YaRN that converters write and llama.cpp reads over, for architectures that it was compared with."""

DEFAULT_BASE = 10000.0
"""llama.cpp's, where the key is absent."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Pair j of a head turns by position * frequencies[j]; cosine and sine are multiplied by `magnitude`."""

    frequencies: tuple[float, ...]
    magnitude: float = 1.0

    def table(self, positions: int) -> np.ndarray:
        """float32 [positions, pairs, 2]: cos and sin."""
        angle = np.arange(positions, dtype=np.float64)[:, None] * np.array(self.frequencies)
        return np.stack([np.cos(angle) * self.magnitude, np.sin(angle) * self.magnitude], -1).astype(np.float32)


def plain_rope(base: float, rotated: int) -> Rope:
    """Frequencies base^(-2 j / rotated), not scaled."""
    return Rope(tuple(math.pow(base, -2.0 * j / rotated) for j in range(rotated // 2)))


def _turning_pair(turns: float, base: float, rotated: int, context: int) -> np.float32:
    """The pair that turns so often within the context; in float32, because it is rounded to a whole pair."""
    f = np.float32
    return f(rotated) * np.log(f(context) / (f(turns) * f(2) * f(math.pi))) / (f(2) * np.log(f(base)))


def yarn_rope(base: float, rotated: int, scale: float, context: int) -> Rope:
    """YaRN: slow pairs interpolated by `scale`, fast ones kept, a ramp between; attention a little sharper.

    Parameters
    ----------
    base : float
    rotated : int
    scale : float
        Of the frequencies: 1 / factor.
    context : int
        Tokens that the model was first trained on.
    """
    first = max(0.0, float(np.floor(_turning_pair(BETA_FAST, base, rotated, context))))
    last = min(rotated - 1.0, float(np.ceil(_turning_pair(BETA_SLOW, base, rotated, context))))
    frequencies = []
    for j, frequency in enumerate(plain_rope(base, rotated).frequencies):
        kept = 1.0 - min(1.0, max(0.0, (j - first) / max(0.001, last - first)))
        frequencies.append(scale * frequency * (1.0 - kept) + frequency * kept)
    return Rope(tuple(frequencies), max(1.0, 1.0 + 0.1 * math.log(1.0 / scale)))


def rope_of(m: Keys, rotated: int, base_key: str = "rope.freq_base") -> Rope:
    """The rotary positions that the metadata asks for; the base is that of `base_key`, where it is there.

    Raises
    ------
    FormatError
        A kind of scaling that is not computed here, or absurd parameters.
    """
    base_key = base_key if base_key in m else "rope.freq_base"
    base = m.number(base_key, DEFAULT_BASE, least=2, most=1e12)
    kind = m.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise FormatError(
            f"metadata key {m.name('rope.scaling.type')} is {kind[:40]!r}, expected none, linear or yarn",
            hint="run this model with llama.cpp",
        )
    key = "rope.scaling.factor" if "rope.scaling.factor" in m else "rope.scale_linear"  # the older name
    factor = m.number(key, 0.0, least=0, most=1e6) or 1.0  # 0: as absent
    context = m.integer("rope.scaling.original_context_length", 0, most=1 << 24) or m.integer("context_length", least=1)
    sharper = m.number("rope.scaling.attn_factor", 1.0, least=1e-3, most=1e3)
    scale = 1.0 if kind == "none" else float(np.float32(1) / np.float32(factor))
    rope = yarn_rope(base, rotated, scale, context) if kind == "yarn" else plain_rope(base, rotated)
    if kind == "linear" and scale != 1.0:
        rope = Rope(tuple(scale * frequency for frequency in rope.frequencies))
    return Rope(rope.frequencies, rope.magnitude * sharper)
