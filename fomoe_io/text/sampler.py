"""Choosing the next token: llama.cpp's filters in llama.cpp's order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from fomoe_io.errors import ComputeError, UsageError


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
        Tokens that the penalty looks back on.
    seed : int or None
        None draws one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0, 100),
            "top_k": (0, 1 << 24),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repeat_penalty": (0.01, 100),
            "repeat_last": (0, 1 << 20),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {least} to {most}")


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


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        """As at the start: the seed's first number comes next, and the penalty has seen nothing."""
        self._random = np.random.default_rng(self.config.seed)
        self._recent: deque[int] = deque(maxlen=self.config.repeat_last)

    def accept(self, token: int) -> None:
        """Let the repeat penalty see a token of the prompt or of the answer."""
        self._recent.append(token)

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
        if self.config.temperature == 0:
            return int(np.argmax(logits))
        ids, scores = self._filtered(logits)
        scores = scores.astype(np.float64) / self.config.temperature
        weights = np.exp(scores - scores[0])
        return int(ids[np.searchsorted(np.cumsum(weights), self._random.random() * weights.sum(), side="right")])

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        """Logits of recent tokens divided by the penalty (multiplied, when negative), as in llama.cpp."""
        if self.config.repeat_penalty == 1 or not self._recent:
            return logits
        logits = logits.copy()
        seen = np.fromiter(set(self._recent), np.int64)
        penalty = np.float32(self.config.repeat_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits

    def _filtered(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and logits, descending, after top-k, top-p and min-p."""
        c = self.config
        few = 0 < c.top_k < len(logits)
        ids = np.argpartition(logits, -c.top_k)[-c.top_k :] if few else np.arange(len(logits))
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        scores = logits[ids]
        probabilities = np.exp(scores.astype(np.float64) - scores[0])
        probabilities /= probabilities.sum()
        keep = len(ids)
        if c.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(probabilities), c.top_p)) + 1
        if c.min_p > 0:
            keep = min(keep, int(np.count_nonzero(probabilities >= c.min_p * probabilities[0])))
        keep = max(keep, 1)
        return ids[:keep], scores[:keep]
