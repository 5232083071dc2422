"""Which session continues a prompt: the one that has read the most of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fomoe_io.engine import Engine


class Timeline:
    """A session with the tokens that it has read."""

    def __init__(self, engine: Engine) -> None:
        self._session = engine.session()
        self.tokens = array("i")
        self.context_tokens = self._session.context_tokens

    @property
    def is_sound(self) -> bool:
        """Whether the session stands where `tokens` end: after an error it may not."""
        return not self._session.is_broken and self._session.position == len(self.tokens)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Read a piece of a prompt; logits after it."""
        logits = self._session.prefill(tokens)
        self.tokens.extend(tokens)
        return logits

    def decode(self, token: int) -> np.ndarray:
        """Read a token of the answer; logits after it, valid until the next call."""
        logits = self._session.decode(token)
        self.tokens.append(token)
        return logits

    def reset(self) -> None:
        """Forget everything."""
        self._session.reset()
        self.tokens = array("i")

    def close(self) -> None:
        """Give the memory back."""
        self._session.close()


class SessionCache(Protocol):
    """Where timelines come from and go to.  All calls come from the engine's thread."""

    def acquire(self, tokens: Sequence[int], *, reuse: bool = True) -> Timeline:
        """A timeline that has read the longest known beginning of `tokens`, at least one token short of all.

        Parameters
        ----------
        tokens : sequence of int
            A whole prompt.
        reuse : bool
            False begins afresh.
        """

    def release(self, timeline: Timeline) -> None:
        """Take a timeline back, with what it has read since; also after an error."""

    def close(self) -> None:
        """Give all memory back."""


class LiveSession:
    """The cache of one session: a prompt that extends what it has read costs only what is new.

    A recurrent state can't be wound back, so anything else is read from the beginning.
    """

    def __init__(self, engine: Engine) -> None:
        self._timeline = Timeline(engine)

    def acquire(self, tokens: Sequence[int], *, reuse: bool = True) -> Timeline:
        """See :class:`SessionCache`."""
        timeline = self._timeline
        known = len(timeline.tokens)
        # at least one token must be read for logits
        extends = known < len(tokens) and array("i", tokens[:known]) == timeline.tokens
        if not (reuse and extends and timeline.is_sound):
            timeline.reset()
        return timeline

    def release(self, timeline: Timeline) -> None:
        """See :class:`SessionCache`."""

    def close(self) -> None:
        """See :class:`SessionCache`."""
        self._timeline.close()
