"""Answers as they were sampled: a history that repeats an answer's text gets its tokens, not those of encoding it."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import xxhash

MOST_TOKENS = 1 << 18
"""Of all answers together."""
LEAD_TOKENS = 8
"""Before an answer: a token of the encoded history may reach across its beginning."""

TextEnd = tuple[int, int]
"""Bytes of a text, and their hash: what a history is recognised by."""
TextOf = Callable[[int], bytes]


def text_end(tokens: Any, text_of: TextOf) -> TextEnd:
    """Of the text of tokens."""
    text = b"".join(text_of(token) for token in tokens)
    return len(text), xxhash.xxh3_64_intdigest(text)


def text_ends(tokens: Any, text_of: TextOf, known: Set[TextEnd]) -> list[tuple[int, TextEnd]]:
    """(tokens, known text) of all known texts that a prompt begins with and that end where one of its tokens ends."""
    lengths = {length for length, _ in known}
    if not lengths:
        return []
    digest, length, most, found = xxhash.xxh3_64(), 0, max(lengths), []
    for place, token in enumerate(tokens, 1):
        text = text_of(token)
        digest.update(text)
        length += len(text)
        if length in lengths and text:
            end = (length, digest.intdigest())
            if end in known:
                found.append((place, end))
        if length >= most:
            break
    return found


class Answers:
    """The latest ones."""

    def __init__(self) -> None:
        self._answers: dict[TextEnd, tuple[Any, int]] = {}
        self._held_tokens = 0

    @property
    def known(self) -> Set[TextEnd]:
        """What they are found by."""
        return self._answers.keys()

    def add(self, end: TextEnd, tokens: Any, first: int) -> None:
        """An answer: `tokens` of all up to its end, which begins at token `first`."""
        lead = min(first, LEAD_TOKENS)
        self._drop(end)
        self._answers[end] = (tokens[first - lead :], lead)
        self._held_tokens += len(tokens) - first + lead
        while self._held_tokens > MOST_TOKENS:
            self._drop(next(iter(self._answers)))

    def _drop(self, end: TextEnd) -> None:
        if end in self._answers:
            self._held_tokens -= len(self._answers.pop(end)[0])

    def replayed(self, tokens: Any, first: int, ends: list[tuple[int, TextEnd]], text_of: TextOf) -> Any:
        """The tokens of a prompt from `first` on, with those of the answers that end at `ends`."""
        ends = [(place, end) for place, end in ends if end in self._answers]
        if not ends:
            return tokens[first:]
        places, length = {0: 0}, 0
        for place, token in enumerate(tokens, 1):
            length += len(text_of(token))
            places.setdefault(length, place)
        found = tokens[:0]
        for place, end in ends:
            sampled, lead = self._answers[end]
            begin = end[0] - sum(len(text_of(token)) for token in sampled[lead:])
            while begin not in places and lead:
                lead -= 1
                begin -= len(text_of(sampled[lead]))
            start = places.get(begin, -1)
            if start >= first:
                found += tokens[first:start] + sampled[lead:]
                first = place
        return found + tokens[first:]
