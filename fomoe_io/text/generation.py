"""From a prompt to text: the loop that the command line and other front ends share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fomoe_io.session import Session
from fomoe_io.text.sampler import Sampler
from fomoe_io.text.tokenizer import StreamDecoder, Tokenizer


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
    """A session with the tokens it has read, so that a prompt that extends them costs only what is new."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.tokens: list[int] = []

    def reset(self) -> None:
        """Forget everything."""
        self.session.reset()
        self.tokens = []

    def read(self, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Logits after `tokens`, the whole history; what the session has read already is not read again."""
        common = len(self.tokens)
        # at least one token must be read for logits, and the state of a session can't be wound back; after an interrupt
        # it may stand elsewhere than our tokens say
        is_elsewhere = self.session.is_broken or self.session.position != common
        if is_elsewhere or list(tokens[:common]) != self.tokens or len(tokens) == common:
            self.reset()
            common = 0
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
        """Continue `tokens`; yields (token, text to show), ends at a stop, at `most` tokens or at a full context."""
        for token in tokens[-sampler.config.repeat_last :] if sampler.config.repeat_last else ():
            sampler.accept(token)
        logits = self.read(tokens, progress)
        decoder, stop = StreamDecoder(self.tokenizer), StopText(stops)
        count = 0
        while count != most:
            token = sampler.sample(logits, position=self.session.position - 1)
            if token in self.tokenizer.eog_ids and not ignore_eos:
                break
            sampler.accept(token)
            count += 1
            yield token, stop.add(decoder.add(token))
            if stop.found or count == most or self.session.position >= self.session.context_tokens:
                break
            logits = self.session.decode(token)
            self.tokens.append(token)
        rest = "" if stop.found else stop.add(decoder.finish()) + stop.finish()
        if rest:
            yield -1, rest
