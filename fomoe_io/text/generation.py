"""From a prompt to text: the loop that the command line and other front ends share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from fomoe_io.session import Session
from fomoe_io.text.sampler import Sampler
from fomoe_io.text.tokenizer import StreamDecoder, Tokenizer

StopReason = Literal["", "eos", "word", "limit", "context"]
"""Why an answer ended: the model's end of text, a stop string, the bound on tokens, a full context; "" while it goes
on, or when it was cut short."""


class StopText:
    """Holds back text that might be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What can be shown now; sets `found` when a stop string came (it and what follows are swallowed)."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

    def finish(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


class Conversation:
    """A session with the tokens it has read, so that a prompt that extends them costs only what is new.

    Attributes
    ----------
    session : Session
    tokenizer : Tokenizer
    tokens : list of int
        What the session has read.
    stop_reason : str
        Why the last answer ended (:data:`StopReason`).
    known_tokens : int
        Of the last prompt: those that had been read before.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.stop_reason: StopReason = ""
        self.known_tokens = 0

    def reset(self) -> None:
        """Forget everything."""
        self.session.reset()
        self.tokens = []

    def unread(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, the whole history, must be read: all, unless they continue what the session has read.

        At least one must be read for logits, and the state of a session can't be wound back; after an interrupt it may
        stand elsewhere than our tokens say.
        """
        common = len(self.tokens)
        is_elsewhere = self.session.is_broken or self.session.position != common
        is_other = is_elsewhere or list(tokens[:common]) != self.tokens or len(tokens) == common
        return len(tokens) if is_other else len(tokens) - common

    def read(self, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Logits after `tokens`, the whole history; what the session has read already is not read again."""
        common = len(tokens) - self.unread(tokens)
        if not common:
            self.reset()
        self.known_tokens = common
        self.tokens = list(tokens[:common])
        logits = self.session.prefill(tokens[common:], progress)
        self.tokens = list(tokens)
        return logits

    def generate(
        self,
        tokens: Sequence[int],
        sampler: Sampler,
        *,
        most: int = -1,
        stops: Sequence[str] = (),
        ignore_eos: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Continue `tokens`; yields (token, text to show) until :attr:`stop_reason` says why it ended."""
        self.stop_reason = ""
        sampler.accept_prompt(tokens)
        logits = self.read(tokens, progress)
        decoder, stop = StreamDecoder(self.tokenizer), StopText(stops)
        count = 0
        while True:
            if count == most:
                self.stop_reason = "limit"
                break
            token = sampler.sample(logits, position=self.session.position - 1)
            if token in self.tokenizer.eog_ids and not ignore_eos:
                self.stop_reason = "eos"
                break
            sampler.accept(token)
            count += 1
            yield token, stop.add(decoder.add(token))
            if stop.found:
                self.stop_reason = "word"
                break
            if sampler.is_over:
                self.stop_reason = "eos"
                break
            if count != most and self.session.position >= self.session.context_tokens:
                self.stop_reason = "context"
                break
            if count != most:
                logits = self.session.decode(token)
                self.tokens.append(token)
        if not stop.found:
            rest = stop.add(decoder.finish())
            self.stop_reason = "word" if stop.found else self.stop_reason
            rest += "" if stop.found else stop.finish()
            if rest:
                yield -1, rest
