"""One answer: a prompt read in pieces, then token after token, until it ends or nobody wants it any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fomoe_io.kept.timeline import Timeline
from fomoe_io.serve.jobs import Ended, Event, Piece, Progress, Run, Started, StopType, Timings, Work
from fomoe_io.serve.sampling import Chooser, Probability
from fomoe_io.text.generation import StopText
from fomoe_io.text.tokenizer import StreamDecoder, Tokenizer

PIECE_SECONDS = 1.0
"""So long others wait for a piece at least, where smaller ones would cost little."""

LONG_SECONDS = 0.5
"""A piece that takes so long may be ended within, and is worth a place to go on from before it."""

LEAST_PIECE_TOKENS = 16

PATIENCE_PIECES = 64
"""Until a size that was too dear is tried again: what came from the drive may lie in memory by then."""


class PieceSize:
    """Tokens of a prompt to read at once.

    Where a piece takes long it is halved, as long as that costs less than a quarter of the speed: when experts come
    from the drive, half the tokens may need nearly as many of them, and whoever waits is worse off with smaller pieces.

    Parameters
    ----------
    most : int
        The engine's batch.
    is_fixed : bool
    """

    def __init__(self, most: int, *, is_fixed: bool = False) -> None:
        self.tokens = most
        self.is_long = True  # as far as is known
        self._most = most
        self._is_fixed = is_fixed
        self._best_rate = 0.0
        self._patience = 0

    def measured(self, tokens: int, seconds: float) -> None:
        """Learn from a piece."""
        self.is_long = seconds >= LONG_SECONDS
        if self._is_fixed or tokens < self.tokens:
            return
        rate = tokens / max(seconds, 1e-9)
        if rate < 0.75 * self._best_rate:
            self.tokens = min(2 * self.tokens, self._most)
            self._best_rate, self._patience = 0.0, PATIENCE_PIECES
        elif self._patience:
            self._patience -= 1
        elif seconds > PIECE_SECONDS and tokens >= 2 * LEAST_PIECE_TOKENS:
            self._best_rate = max(self._best_rate, rate)
            self.tokens = tokens // 2


class Unwanted(Exception):
    """The client has left, or the server is going down."""


class Answering:
    """The state of one run.

    Parameters
    ----------
    tokenizer : Tokenizer
    work : Work
    run_number : int
    emit : callable
        Takes events.
    check : callable
        Raises :class:`Unwanted` when the answer is no longer wanted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        work: Work,
        run_number: int,
        emit: Callable[[Event], None],
        check: Callable[[], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._work = work
        self._run: Run = work.runs[run_number]
        self._number = run_number
        self._emit = emit
        self._check = check
        self._prompt = self._run.tokens
        self._cached = 0
        self._prompt_seconds = 0.0
        self._count = 0
        self._first_token = 0.0

    @property
    def timings(self) -> Timings:
        """So far."""
        seconds = time.monotonic() - self._first_token if self._count else 0.0
        prompt = len(self._prompt) - self._cached
        return Timings(self._cached, prompt, self._prompt_seconds, self._count, seconds)

    def answer(self, timeline: Timeline, piece: PieceSize) -> None:
        """Read the prompt and generate."""
        logits = self._read(timeline, piece)
        self._first_token = time.monotonic()
        self._generate(timeline, logits)

    def _read(self, timeline: Timeline, piece: PieceSize) -> np.ndarray:
        started = time.monotonic()
        tokens = self._begun(timeline)
        self._prompt = tokens
        self._cached = len(timeline.tokens)
        self._emit(Started(self._number, len(tokens), self._cached))
        done, logits = self._cached, None
        while done < len(tokens):
            self._check()
            self._emit(Progress(self._number, len(tokens), self._cached, done, self._prompt_seconds))
            part = tokens[done : done + piece.tokens]
            if piece.is_long:
                timeline.stand_by()
            before = time.monotonic()
            logits = timeline.read(part)
            piece.measured(len(part), time.monotonic() - before)
            done += len(part)
            self._prompt_seconds = time.monotonic() - started
        self._emit(Progress(self._number, len(tokens), self._cached, done, self._prompt_seconds))
        assert logits is not None  # a timeline leaves at least one token to read
        return logits

    def _begun(self, timeline: Timeline) -> Any:
        """The prompt, in the form of which more is known."""
        run, other = self._run, self._run.other
        if other is not None and self._work.reuse and timeline.unread(other.tokens) < timeline.unread(run.tokens):
            return timeline.begin(other.tokens, turn=other.turn)
        return timeline.begin(run.tokens, turn=run.turn, reuse=self._work.reuse)

    def _generate(self, timeline: Timeline, logits: np.ndarray) -> None:
        work, tokenizer = self._work, self._tokenizer
        chooser = Chooser(self._run.choosing, self._prompt)
        decoder, stop = StreamDecoder(tokenizer), StopText(work.stops)
        stop_type: StopType = "limit"
        texts: list[str] = []
        while self._count != work.most:
            self._check()
            token, probability = chooser.choose(logits)
            if token in tokenizer.eog_ids and not work.ignore_eos:
                stop_type = "eos"
                break
            chooser.accept(token)
            self._count += 1
            texts.append(decoder.add(token))
            self._show(token, stop.add(texts[-1]), probability)
            if chooser.is_over:
                stop_type = "eos"
                break
            if stop.found or self._count == work.most or len(timeline.tokens) >= timeline.context_tokens:
                break
            logits = timeline.decode(token)
        if not stop.found:
            texts.append(decoder.finish())
            rest = stop.add(texts[-1])
            rest += "" if stop.found else stop.finish()
            if rest:
                self._show(-1, rest, None)
        word = _first_of(work.stops, "".join(texts)) if stop.found else ""
        self._emit(Ended(self._number, "word" if stop.found else stop_type, word, self.timings))

    def _show(self, token: int, text: str, probability: Probability | None) -> None:
        self._emit(Piece(self._number, token, text, probability, self.timings))


def _first_of(stops: Sequence[str], text: str) -> str:
    """The stop string that comes first in a text."""
    return min((stop for stop in stops if stop and stop in text), key=text.index, default="")
