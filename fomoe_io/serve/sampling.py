"""What a request may ask of the choice of tokens beyond the sampler's filters: biases, penalties, probabilities."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from fomoe_io.errors import UsageError
from fomoe_io.serve.errors import bad_request
from fomoe_io.text.grammar import Grammar
from fomoe_io.text.sampler import Sampler, SamplingConfig

NEVER = np.float32(-1e30)
"""A logit that no bias brings back; finite, so that sums stay numbers."""


@dataclass(frozen=True, slots=True)
class Choosing:
    """How tokens are chosen.

    Attributes
    ----------
    sampling : SamplingConfig
    bias : mapping of int to float
        Added to logits; -inf forbids a token.
    presence_penalty, frequency_penalty : float
        Taken from the logits of the last `repeat_last` tokens, once and for each time, as llama.cpp does.
    probabilities : int or None
        How many alternatives to report with each token; None reports nothing.
    grammar : Grammar or None
        What answers have to follow: no bias lets a token come that may not.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    probabilities: int | None = None
    grammar: Grammar | None = None

    def of_choice(self, number: int) -> Choosing:
        """For one of several choices: each draws from a seed of its own."""
        seed = self.sampling.seed
        return (
            self if seed is None or not number else replace(self, sampling=replace(self.sampling, seed=seed + number))
        )


class Probability(NamedTuple):
    """A token's log-probability by the unchanged logits, and the likeliest tokens."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Chooser:
    """Draws the tokens of one answer.

    Parameters
    ----------
    choosing : Choosing
    prompt : sequence of int
        Its end counts for the penalties.
    """

    def __init__(self, choosing: Choosing, prompt: Sequence[int]) -> None:
        self._choosing = choosing
        grammar = choosing.grammar
        self._sampler = Sampler(choosing.sampling, None if grammar is None else grammar.start())
        self._bias_ids = np.fromiter(choosing.bias.keys(), np.int64)
        self._bias = np.fromiter(choosing.bias.values(), np.float32)
        last = choosing.sampling.repeat_last
        self._recent: deque[int] = deque(maxlen=last)
        for token in prompt[-last:] if last else ():
            self.accept(token)

    @property
    def is_over(self) -> bool:
        """Whether the grammar lets nothing come but an end."""
        return self._sampler.is_over

    def accept(self, token: int) -> None:
        """Let the penalties see a token."""
        self._sampler.accept(token)
        self._recent.append(token)

    def choose(self, logits: np.ndarray) -> tuple[int, Probability | None]:
        """The next token, and how likely it was when that was asked for.

        Raises
        ------
        ApiError
            400: the grammar has come to be too much to follow.
        """
        try:
            token = self._sampler.sample(self._adjusted(logits))
        except UsageError as error:  # the grammar's, which is the client's
            raise bad_request(error.message, param="grammar") from None
        many = self._choosing.probabilities
        return token, None if many is None else probability(logits, token, many)

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        c = self._choosing
        is_penalised = bool(self._recent) and (c.presence_penalty != 0 or c.frequency_penalty != 0)
        if not len(self._bias_ids) and not is_penalised:
            return logits
        logits = logits.copy()
        logits[self._bias_ids] = np.maximum(logits[self._bias_ids] + self._bias, NEVER)
        if is_penalised:
            counts = Counter(self._recent)
            ids = np.fromiter(counts, np.int64)
            times = np.fromiter(counts.values(), np.float32)
            logits[ids] -= np.float32(c.presence_penalty) + np.float32(c.frequency_penalty) * times
        return logits


def probability(logits: np.ndarray, token: int, many: int) -> Probability:
    """Log-probabilities of a token and of the `many` likeliest."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    many = min(many, len(scores))
    ids = np.argpartition(scores, -many)[-many:] if many else np.empty(0, np.int64)
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    return Probability(token, float(scores[token]), [(int(i), float(scores[i])) for i in ids])
