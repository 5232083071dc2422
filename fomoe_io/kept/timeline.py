"""A session with the tokens that it has read, which begins where the longest known beginning of a prompt ends."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io.errors import FormatError, UsageError
from fomoe_io.kept.answers import TextEnd, text_end, text_ends
from fomoe_io.kept.piece_file import Head, PieceReader, write_piece
from fomoe_io.kept.pieces import BLOCK_TOKENS, Piece, common, walk
from fomoe_io.kept.store import APART_ON_DRIVE_TOKENS, KeptSessions, Place, Unusable, as_tokens
from fomoe_io.session import Session, decode_together, read_together
from fomoe_io.text.tokenizer import Tokenizer

BEFORE_END_TOKENS = 4
"""A checkpoint stands so far before a prompt's end: templates differ in how an answer begins."""
EVERY_TOKENS = 2048
"""Between checkpoints of a long prompt."""
APART_TOKENS = 16
"""Checkpoints that are nearer than this cost more than reading again."""


class Timeline:
    """What front ends read prompts and answers with.

    Parameters
    ----------
    session : Session
    kept : KeptSessions
    tokenizer : Tokenizer

    Attributes
    ----------
    tokens : array of int
        What the session has read.
    prompt_tokens : int or None
        Of the prompt at hand: those that were to be read.
    live : list of Piece
        The blocks whose KV the session has.
    session, kept, tokenizer
        As given.
    """

    def __init__(self, session: Session, kept: KeptSessions, tokenizer: Tokenizer) -> None:
        self.session, self.kept = session, kept
        self.context_tokens = session.context_tokens
        self.tokens: Any = array("i")
        self.tokenizer = tokenizer
        self._texts: dict[int, bytes] = {}
        self._text_end: TextEnd | None = None
        self._answer_first = 0
        self._is_replayed = False
        self._stops: list[int] = []
        self.prompt_tokens: int | None = None
        self._passing: Piece | None = None
        self.live: list[Piece] = []
        kept.lenders.add(self)

    @property
    def is_sound(self) -> bool:
        """Whether the session stands where `tokens` end: after an error it may not."""
        return not self.session.is_broken and self.session.position == len(self.tokens)

    def _text_of(self, token: int) -> bytes:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode_bytes(token, special=True)
        return self._texts[token]

    # ---- a prompt ----

    def begin(self, prompt: Sequence[int], *, turn: int | None = None, reuse: bool = True) -> Any:
        """Stand where the longest known beginning of a prompt ends, at least one token short of all.

        Parameters
        ----------
        prompt : sequence of int
        turn : int, optional
            Where the last message of the user begins in it.
        reuse : bool
            False: read all of it.

        Returns
        -------
        array of int
            The prompt, with the tokens of earlier answers as they were chosen; what is not in :attr:`tokens` yet is
            to be read.
        """
        given = as_tokens(prompt)
        tokens = self._replayed(given) if reuse else given
        self._stand(tokens, len(tokens) - 1 if reuse else 0)
        self._text_end, self._answer_first = None, len(tokens)
        self._is_replayed = tokens != given
        self.prompt_tokens = len(tokens) - len(self.tokens)
        self._plan(tokens, None if turn is None else turn + len(tokens) - len(given))
        return tokens

    def unread(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens `begin` would leave to be read, as far as can be told without beginning."""
        tokens = self._replayed(as_tokens(prompt))
        place = self.kept.find(tokens, len(tokens) - 1)
        return len(tokens) - max(self._here(tokens, len(tokens) - 1), place.position if place else 0)

    def _replayed(self, tokens: Any) -> Any:
        end = self._text_end
        if end is not None and len(self.tokens) < len(tokens) and tokens[: len(self.tokens)] != self.tokens:
            for place, _ in text_ends(tokens, self._text_of, {end}):
                return self._fitting(self.tokens + tokens[place:], tokens)
        return self._fitting(self.kept.replayed(tokens, self._text_of), tokens)

    def _fitting(self, replayed: Any, tokens: Any) -> Any:
        return replayed if len(replayed) < self.context_tokens else tokens

    def _here(self, tokens: Any, most: int) -> int:
        """Where the session could stand with what it has."""
        same = min(common(self.tokens, tokens), self.session.position)
        if self.kept.can_cut:
            return min(same, most)
        return same if self.is_sound and same == len(self.tokens) <= most else 0

    def _stand(self, tokens: Any, most: int) -> None:
        while True:
            here, place = self._here(tokens, most), self.kept.find(tokens, most)
            if place is None or place.position <= here:
                break
            if self._restore(tokens, place):
                return
        if here == len(self.tokens) and self.is_sound:
            return
        self._leave(here)
        self.session.truncate(here)
        self.tokens = tokens[:here]
        self._note_live()

    def _restore(self, tokens: Any, place: Place) -> bool:
        """Whether it worked."""
        known = min(common(self.tokens, tokens), self.session.position, place.position)
        self._leave(known, [*place.blocks, *([] if place.last is None else [place.last])])
        try:
            self.session.resume(place.position, self.kept.recurrent(place), self.kept.rows(place, known), known)
        except (Unusable, UsageError):
            self.kept.forget(place.last or place.blocks[-1])
            self.session.reset()
            self.tokens = array("i")
            self.live = []
            return False
        self.tokens = tokens[: place.position]
        self._note_live()
        return True

    def _note_live(self) -> None:
        self.live = walk(self.kept.root, self.tokens)[1:]

    def _leave(self, known: int, keep: Sequence[Piece] = ()) -> None:
        """The session is about to lose what it has beyond the `known` tokens: keep it elsewhere."""
        if len(self.tokens) - max(known, self._last_place()) >= APART_TOKENS:
            self.checkpoint()
        own, last, shared = self.own(), self._last_place(), self._shared()
        self.live = []
        keep = [*keep, *(p for p in own if not p.is_checkpoint or p.end == last)]
        for piece in own:
            if piece.end <= known or piece.rows is not None or piece.file is not None or not piece.is_attached:
                continue
            if piece in shared:
                continue
            is_of_use = self.kept.can_cut or piece.end <= last
            if not is_of_use or not self.kept.hold(piece, self.session.rows, len(self.tokens), keep):
                self.kept.forget(piece)
                if not piece.is_checkpoint:  # all others depend on it
                    break

    def own(self) -> list[Piece]:
        """The pieces whose KV the session has, each after those that it depends on."""
        end = min(len(self.tokens), self.session.position)
        path = walk(self.kept.root, self.tokens[:end])
        pieces = [piece for block in path for piece in [block, *block.checkpoints.values()]][1:]
        return [p for p in pieces if p.end <= end and self.tokens[p.first : p.end].tobytes() == p.tokens]

    def _shared(self) -> set[Piece]:
        """Pieces that other sessions have, too."""
        return {piece for lender in self.kept.lenders if lender is not self for piece in lender.own()}

    def lend(self, piece: Piece) -> np.ndarray | None:
        """KV of a piece, where the session has it."""
        return self.session.rows(piece.first, piece.count) if piece in self.own() else None

    def share(self) -> None:
        """Let other sessions begin with what this one has read."""
        if len(self.kept.lenders) > 1 and self.kept.is_enough and self.is_sound:
            self.kept.extend(self.tokens)
            self._note_live()

    def _last_place(self, *, on_drive: bool = False) -> int:
        """Where the last checkpoint of what the session has read stands."""
        return max((p.end for p in self.own() if p.is_checkpoint and (p.file or not on_drive)), default=0)

    # ---- reading ----

    def _plan(self, tokens: Any, turn: int | None) -> None:
        """Where checkpoints will stand."""
        self._stops = []
        if not self.kept.is_enough:
            return
        known, end = len(self.tokens), len(tokens)
        wanted = list(range(EVERY_TOKENS, end, EVERY_TOKENS))
        if not self.kept.can_cut:
            wanted = [turn or 0, end - BEFORE_END_TOKENS, *wanted]
        for place in wanted:
            if known + APART_TOKENS <= place < end and all(abs(place - p) >= APART_TOKENS for p in self._stops):
                self._stops.append(place)
        self._stops.sort()

    def read(self, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Read a piece of a prompt; logits after it.

        Parameters
        ----------
        tokens : sequence of int
        progress : callable, optional
            Called with (tokens done, tokens in all) after each batch.
        """
        first, done, logits = len(self.tokens), 0, np.empty(0, np.float32)
        while done < len(tokens):
            part = tokens[done : done + self.until_stop(len(tokens) - done)]
            told = None if progress is None else _shifted(progress, done, len(tokens))
            logits = self._read(part, told)
            done = len(self.tokens) - first
            self.stop()
        return logits

    def until_stop(self, most: int) -> int:
        """How many of the next tokens to read at once, so that a checkpoint can be made in its place."""
        here = len(self.tokens)
        return min([stop - here for stop in self._stops if here < stop <= here + most], default=most)

    def stop(self) -> None:
        """Keep this place, if it is one of those that were planned."""
        if len(self.tokens) in self._stops:
            if not self.kept.can_cut:
                self.checkpoint()
            self.flush()

    def _read(self, tokens: Sequence[int], progress: Callable[[int, int], None] | None) -> np.ndarray:
        before = self.session.position
        try:
            return self.session.prefill(tokens, progress, prompt_tokens=self.prompt_tokens)
        finally:  # also what an interrupt has left
            self.tokens.extend(tokens[: self.session.position - before])

    def decode(self, token: int) -> np.ndarray:
        """Read a token of the answer; logits after it, valid until the next call."""
        logits = self.session.decode(token)
        self.tokens.append(token)
        return logits

    def standing(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens the session has, where it stands."""
        return self._here(self._replayed(as_tokens(prompt)), len(prompt) - 1)

    # ---- keeping ----

    def checkpoint(self) -> Piece | None:
        """Keep this place, while there is room."""
        if not self.is_sound or not self.tokens or not self.kept.is_enough:
            return None
        recurrent = None if self.kept.can_cut else self.session.recurrent()
        end = self._text_end
        if end is None and self._is_replayed and len(self.tokens) <= self._answer_first:
            end = text_end(self.tokens, self._text_of)  # its text alone would be other tokens
        piece = self.kept.checkpoint(self.tokens, recurrent, end)
        if piece is self._passing:
            self._passing = None
        self._note_live()
        return piece

    def stand_by(self) -> None:
        """Keep this place until the next such: a run that is given up before its end costs what it has read alone.

        Where memory has room to spare; a model that can be cut needs none.
        """
        if self.kept.can_cut or not self.is_sound or not self.tokens or self._last_place() == len(self.tokens):
            return
        self._pass()
        if self.kept.has_room(self.session.recurrent_bytes):
            self._passing = self.checkpoint()

    def _pass(self) -> None:
        """Let go of the place that was kept for the moment."""
        piece, self._passing = self._passing, None
        if piece is not None and piece.is_attached:
            self.kept.release(piece)

    def end(self) -> None:
        """An answer is over, or was given up: what it has read stays known."""
        if self.session.is_broken and self.kept.can_cut and self.session.position == len(self.tokens):
            self.session.truncate(len(self.tokens))  # what it was given up in has left nothing that counts
        if not self.is_sound:
            return
        self._pass()
        self._text_end = text_end(self.tokens, self._text_of)
        if len(self.tokens) > self._answer_first:
            self.kept.answers.add(self._text_end, self.tokens, self._answer_first)
        if self.kept.folder is not None and len(self.tokens) >= BLOCK_TOKENS:
            if len(self.tokens) - self._last_place(on_drive=True) >= APART_ON_DRIVE_TOKENS:
                self.checkpoint()
            self.flush()

    def flush(self) -> None:
        """Write what the session has read to the drive: whole blocks, and the checkpoints that are apart enough."""
        kept = self.kept
        if kept.folder is None or not kept.folder.is_usable or len(self.tokens) < BLOCK_TOKENS:
            return
        path = kept.extend(self.tokens)
        kept.use(path)
        self._note_live()
        last = 0
        for piece in sorted(self.own(), key=lambda p: (p.end, p.is_checkpoint)):
            if piece is self._passing:
                continue
            is_apart = not piece.is_checkpoint or piece.end - last >= APART_ON_DRIVE_TOKENS
            if is_apart and not kept.write(piece, self.session.rows, path) and not piece.is_checkpoint:
                return
            if piece.is_checkpoint and piece.file is not None:
                last = piece.end

    # ---- files ----

    def save(self, path: Path) -> tuple[int, int]:
        """Write the session to one file; (tokens, bytes).

        Raises
        ------
        UsageError
            It has read nothing, or has stopped in the middle of a token.
        OSError
        """
        if not self.is_sound or not self.tokens:
            raise UsageError("there is nothing to save")
        form, recurrent = self.kept.form, self.session.recurrent()
        head = Head(
            form.fingerprint, "", "", 0, len(self.tokens), form.row_bytes, recurrent.nbytes, True,
            text_end(self.tokens, self._text_of),
        )  # fmt: skip
        return len(self.tokens), write_piece(path, head, self.tokens.tobytes(), self._all_rows(), recurrent)

    def _all_rows(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.tokens), BLOCK_TOKENS):
            yield self.session.rows(first, min(BLOCK_TOKENS, len(self.tokens) - first))

    def load(self, path: Path) -> tuple[int, int]:
        """Stand where a session was saved; (tokens, bytes).

        Raises
        ------
        UsageError
            The file is of another model, or longer than the context.
        FormatError
            It is damaged.
        OSError
        """
        with PieceReader(path) as reader:
            head, form = reader.head, self.kept.form
            if (head.fingerprint, head.row_bytes, head.recurrent_bytes) != (
                form.fingerprint, form.row_bytes, form.recurrent_bytes,
            ) or head.first:  # fmt: skip
                raise UsageError(f"{path.name} is of another model or other arithmetic")
            if head.tokens > self.context_tokens:
                raise UsageError(f"{path.name} has {head.tokens} tokens, and the context {self.context_tokens}")
            self._leave(0)
            try:
                self.session.resume(head.tokens, reader.recurrent(), reader.rows(BLOCK_TOKENS))
            except (OSError, FormatError, UsageError):
                self.reset()
                raise
            self.tokens, self._text_end = reader.token_array(), head.text_end
            self._note_live()
            return head.tokens, path.stat().st_size

    def reset(self) -> None:
        """Let the session forget; what is kept stays."""
        self._leave(0)
        self.session.reset()
        self.tokens, self._text_end = array("i"), None
        self.live = []

    def erase(self) -> None:
        """Forget what the session has read, and do not keep it elsewhere."""
        shared = self._shared()
        for piece in self.own()[::-1]:
            if piece.rows is None and piece.file is None and piece not in shared:
                self.kept.forget(piece)
        self.session.reset()
        self.tokens, self._text_end, self.live = array("i"), None, []

    def close(self) -> None:
        """Give the session's memory back."""
        self.kept.lenders.discard(self)
        self.session.close()


def read_all(parts: Sequence[tuple[Timeline, Sequence[int]]]) -> list[np.ndarray]:
    """Read pieces of several prompts in batches that they share; logits after each."""
    logits = [np.empty(0, np.float32)] * len(parts)
    left = dict(enumerate(parts))
    while left:
        cut = [(i, t, tokens[: t.until_stop(len(tokens))]) for i, (t, tokens) in left.items()]
        before = [timeline.session.position for _, timeline, _ in cut]
        lengths = [timeline.prompt_tokens or len(tokens) for _, timeline, tokens in cut]
        try:
            found = read_together([(t.session, tokens) for _, t, tokens in cut], prompt_tokens=lengths)
        finally:  # also what an interrupt has left
            for (_, timeline, tokens), position in zip(cut, before, strict=True):
                timeline.tokens.extend(tokens[: timeline.session.position - position])
        for (i, timeline, tokens), row in zip(cut, found, strict=True):
            timeline.stop()
            logits[i] = row
            left[i] = (timeline, left[i][1][len(tokens) :])
        left = {i: part for i, part in left.items() if len(part[1])}
    return logits


def decode_all(parts: Sequence[tuple[Timeline, int]]) -> np.ndarray:
    """Read a token of each of several answers at once; float32 [parts, vocabulary]: logits after them."""
    logits = decode_together([(timeline.session, token) for timeline, token in parts])
    for timeline, token in parts:
        timeline.tokens.append(token)
    return logits


def _shifted(progress: Callable[[int, int], None], first: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(first + done, total)
