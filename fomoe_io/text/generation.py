"""From a prompt to text: the loop that the command line and other front ends share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np

from fomoe_io.errors import FomoeError, UsageError
from fomoe_io.kept.timeline import Timeline
from fomoe_io.session import Session
from fomoe_io.text.sampler import Sampler
from fomoe_io.text.tokenizer import StreamDecoder, Tokenizer

StopReason = Literal["", "eos", "word", "limit", "context"]
"""Why an answer ended: the model's end of text, a stop string, the bound on tokens, a full context; "" while it goes
on, or when it was cut short."""


OTHER_MESSAGE = "\N{REPLACEMENT CHARACTER}"
"""Instead of the user's last, to see where that one begins."""


def last_turn(
    render: Callable[[list[Any]], str],
    messages: Sequence[Mapping[str, Any]],
    text: str,
    tokens: Sequence[int],
    tokenizer: Tokenizer,
) -> int | None:
    """Where the user's last message begins, in tokens: a later history may be another from there on.

    Parameters
    ----------
    render : callable
        Makes a text of messages.
    messages : sequence of mapping
    text : str
        What it has made of these.
    tokens : sequence of int
        What was made of the text.
    tokenizer : Tokenizer

    Returns
    -------
    int or None
        None where that can't be told.
    """
    number = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if number is None:
        return None
    other = [*messages[:number], {**messages[number], "content": OTHER_MESSAGE}, *messages[number + 1 :]]
    try:
        found = render(other)
    except FomoeError:
        return None
    same = next((i for i, pair in enumerate(zip(text, found, strict=False)) if pair[0] != pair[1]), 0)
    begin = len(text[:same].encode("utf-8", "replace"))
    lengths = [len(tokenizer.decode_bytes(token, special=True)) for token in tokens]
    begin += max(0, sum(lengths) - len(text.encode("utf-8", "replace")))  # a beginning that is not in the text
    place, length = 0, 0
    for place, size in enumerate(lengths):  # noqa: B007
        length += size
        if length > begin:
            break
    return place


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
    """Prompts and answers on a timeline: what it knows of a prompt is not read again.

    Attributes
    ----------
    timeline : Timeline
    stop_reason : str
        Why the last answer ended (:data:`StopReason`).
    known_tokens : int
        Of the last prompt: those that had been read before.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.tokenizer = timeline.tokenizer
        self.stop_reason: StopReason = ""
        self.known_tokens = 0

    @property
    def session(self) -> Session:
        """What reads."""
        return self.timeline.session

    @property
    def tokens(self) -> list[int]:
        """What the session has read."""
        return self.timeline.tokens.tolist()

    def reset(self) -> None:
        """Begin anew; what was read stays known."""
        self.timeline.reset()

    def unread(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, the whole history, must be read: at least one."""
        return self.timeline.unread(tokens)

    def read(
        self, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None, turn: int | None = None
    ) -> np.ndarray:
        """Logits after `tokens`, the whole history, in which the user's last message begins at `turn`."""
        prompt = self.timeline.begin(tokens, turn=turn)
        self.known_tokens = len(self.timeline.tokens)
        return self.timeline.read(prompt[self.known_tokens :], progress)

    def generate(
        self,
        tokens: Sequence[int],
        sampler: Sampler,
        *,
        most: int = -1,
        stops: Sequence[str] = (),
        ignore_eos: bool = False,
        progress: Callable[[int, int], None] | None = None,
        turn: int | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Continue `tokens`; yields (token, text to show) until :attr:`stop_reason` says why it ended."""
        self.stop_reason = ""
        try:
            logits = self.read(tokens, progress, turn)
            sampler.accept_prompt(self.timeline.tokens)
            yield from self._answer(logits, sampler, most, stops, ignore_eos)
        finally:
            with suppress(UsageError):  # an answer that nobody waited for, of an engine that is closed
                self.timeline.end()

    def _answer(
        self, logits: np.ndarray, sampler: Sampler, most: int, stops: Sequence[str], ignore_eos: bool
    ) -> Iterator[tuple[int, str]]:
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
                logits = self.timeline.decode(token)
        if not stop.found:
            rest = stop.add(decoder.finish())
            self.stop_reason = "word" if stop.found else self.stop_reason
            rest += "" if stop.found else stop.finish()
            if rest:
                yield -1, rest
