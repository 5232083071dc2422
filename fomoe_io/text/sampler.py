"""Choosing the next token: llama.cpp's filters in llama.cpp's order."""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from fomoe_io.errors import ComputeError, UsageError
from fomoe_io.storage.metadata import Metadata

_MODEL_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last",
}
"""After `general.sampling.` in a GGUF -> the field it sets, as llama.cpp has them."""

_OTHER_KEYS = {"sequence": None, "xtc_probability": 0, "mirostat": 0}
"""Of samplers that are not built, and the value that asks for nothing."""


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Defaults are llama.cpp's; `temperature` 0 is greedy.

    Attributes
    ----------
    temperature : float
    top_k : int
        0 keeps all.
    top_p, min_p : float
        1 and 0 keep all.
    repeat_penalty : float
        1 is none.
    repeat_last : int
        Tokens that the penalties look back on; -1: all.
    presence_penalty, frequency_penalty : float
        Taken off the logits of recent tokens, once and for each time that they came.
    seed : int or None
        None draws one.

    Examples
    --------
    >>> SamplingConfig(temperature=0.6, top_p=0.9, seed=7).top_k
    40
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0, 100),
            "top_k": (0, 1 << 24),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repeat_penalty": (0.01, 100),
            "repeat_last": (-1, 1 << 20),
            "presence_penalty": (-100, 100),
            "frequency_penalty": (-100, 100),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise UsageError(f"{name} is {value!r}, expected a number")
            if not least <= value <= most:
                raise UsageError(f"{name} is {value}, expected {least} to {most}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer)):
            raise UsageError(f"seed is {self.seed!r}, expected an integer or None")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more, or None for a random one")

    @classmethod
    def of_model(cls, metadata: Mapping[str, Any], **chosen: Any) -> Self:
        """What a model asks for (`general.sampling.*` of its GGUF), where nothing was chosen.

        Raises
        ------
        FormatError
            A value of the model's is no number.
        UsageError
            A value is out of range.
        """
        found, wanted = Metadata(metadata), dict(chosen)
        for key, field in _MODEL_KEYS.items():
            value = found.number(f"general.sampling.{key}", None)
            if value is not None and field not in wanted:
                wanted[field] = int(value) if field in ("top_k", "repeat_last") else round(value, 6)  # float32 in files
        if "top_k" in wanted:
            wanted["top_k"] = max(wanted["top_k"], 0)
        return cls(**wanted)


def unbuilt_samplers(metadata: Mapping[str, Any]) -> list[str]:
    """Keys by which a model asks for samplers that are not built."""
    keys = {f"general.sampling.{key}": neutral for key, neutral in _OTHER_KEYS.items()}
    return [key for key, neutral in keys.items() if key in metadata and metadata[key] != neutral]


def check_finite(logits: np.ndarray, position: int | None = None) -> None:
    """Refuse logits that are NaN or infinite: every choice among them would be the first token, for ever.

    Parameters
    ----------
    logits : numpy.ndarray
        float32 [vocabulary] or [n, vocabulary].
    position : int, optional
        Of the (first) token after which they were computed, from 0, for the message.

    Raises
    ------
    ComputeError
    """
    if np.isfinite(logits).all():
        return
    bad = ~np.isfinite(logits)
    row = 0 if logits.ndim == 1 else int(np.argmax(bad.any(axis=1)))
    kind = "NaN" if np.isnan(logits).any() else "infinite"
    where = "" if position is None else f" after token {position + row} (from 0)"
    raise ComputeError(
        f"the model computed logits that are {kind}{where}: its weights are damaged, or of a type computed wrongly",
        hint="fomoe-layout verify STORE, or --kernels portable",
    )


class Constraint(Protocol):
    """What an answer has to follow; see :class:`fomoe_io.text.grammar.Constraint`."""

    @property
    def is_over(self) -> bool:
        """Whether nothing but an end may come."""

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """A copy in which what may not come has no chance."""

    def advance(self, token: int) -> None:
        """A token was chosen."""


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens.

    Attributes
    ----------
    config : SamplingConfig
    seed : int
        In use: the configuration's, or the one that was drawn.
    constraint : Constraint or None
        Of the answer at hand: before all filters, and told of every token drawn.
    """

    def __init__(self, config: SamplingConfig, constraint: Constraint | None = None) -> None:
        self.config = config
        self.constraint = constraint
        self.reset()

    @property
    def is_over(self) -> bool:
        """Whether the constraint lets nothing come but an end."""
        return self.constraint is not None and self.constraint.is_over

    def reset(self) -> None:
        """As at the start: the seed's first number comes next, and the penalties have seen nothing."""
        self.seed = secrets.randbits(32) if self.config.seed is None else int(self.config.seed)
        self._random = np.random.default_rng(self.seed)
        last = self.config.repeat_last
        self._recent: deque[int] = deque(maxlen=None if last < 0 else last)

    def accept(self, token: int) -> None:
        """Let the penalties see a token of the prompt or of the answer."""
        self._recent.append(token)

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Let the penalties see a whole history, and nothing else."""
        self._recent.clear()
        last = self.config.repeat_last
        self._recent.extend(tokens if last < 0 else tokens[len(tokens) - min(last, len(tokens)) :])

    def sample(self, logits: np.ndarray, *, position: int | None = None) -> int:
        """The next token.

        Parameters
        ----------
        logits : numpy.ndarray
            float32 [vocabulary]; not changed.
        position : int, optional
            Of the token after which they were computed, for an error's message.

        Raises
        ------
        ComputeError
            They are NaN or infinite.
        """
        check_finite(logits, position)
        logits = self._penalised(logits)
        if self.constraint is None:
            return self._drawn(logits)
        token = self._drawn(self.constraint.masked(logits))
        self.constraint.advance(token)
        return token

    def _drawn(self, logits: np.ndarray) -> int:
        if self.config.temperature == 0:
            return int(np.argmax(logits))
        ids, scores = self._filtered(logits)
        scores = scores.astype(np.float64) / self.config.temperature
        weights = np.exp(scores - scores.max())
        place = np.searchsorted(np.cumsum(weights), self._random.random() * weights.sum(), side="right")
        return int(ids[min(int(place), len(ids) - 1)])

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        """As in llama.cpp: logits of recent tokens divided (multiplied, when negative), then taken from."""
        c = self.config
        if not self._recent or (c.repeat_penalty, c.presence_penalty, c.frequency_penalty) == (1, 0, 0):
            return logits
        logits = logits.copy()
        counts = Counter(self._recent)
        seen = np.fromiter(counts, np.int64)
        if c.repeat_penalty != 1:
            penalty = np.float32(c.repeat_penalty)
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        if c.presence_penalty or c.frequency_penalty:
            times = np.fromiter(counts.values(), np.float32)
            logits[seen] -= np.float32(c.presence_penalty) + np.float32(c.frequency_penalty) * times
        return logits

    def _filtered(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and logits after top-k, top-p and min-p; descending, unless everything is kept."""
        c = self.config
        if 0 < c.top_k < len(logits):
            ids = _descending(logits, np.argpartition(logits, -c.top_k)[-c.top_k :])
            mass = np.exp(logits[ids].astype(np.float64) - logits[ids[0]]).sum()
        elif c.top_p >= 1 and c.min_p <= 0:
            return np.arange(len(logits)), logits
        else:
            mass = np.exp(logits.astype(np.float64) - logits.max()).sum()
            ids = self._likely(logits, mass)
        scores = logits[ids]
        weights = np.exp(scores.astype(np.float64) - scores[0])
        keep = len(ids)
        if c.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(weights / mass), c.top_p)) + 1
        if c.min_p > 0:
            keep = min(keep, int(np.count_nonzero(weights >= c.min_p)))
        keep = max(keep, 1)
        return ids[:keep], scores[:keep]

    def _likely(self, logits: np.ndarray, mass: float) -> np.ndarray:
        """Ids that hold all that top-p and min-p keep, descending: a vocabulary is never sorted as a whole."""
        c = self.config
        if c.min_p > 0:
            least = logits.max() + math.log(c.min_p) - 1e-3
            return _descending(logits, np.flatnonzero(logits >= least))
        for count in (1 << 10, 1 << 14):
            if count < len(logits):
                ids = _descending(logits, np.argpartition(logits, -count)[-count:])
                if np.exp(logits[ids].astype(np.float64) - logits[ids[0]]).sum() >= c.top_p * mass:
                    return ids
        return _descending(logits, np.arange(len(logits)))


def _descending(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Those ids, the likeliest first."""
    return np.asarray(ids[np.argsort(-logits[ids], kind="stable")])
