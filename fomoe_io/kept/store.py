"""What is kept of an engine's sessions: in memory within a bound, and on a drive within another."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import numpy as np
import xxhash

from fomoe_io.errors import FormatError
from fomoe_io.kept.answers import Answers, TextEnd, TextOf, text_ends
from fomoe_io.kept.folder import Folder
from fomoe_io.kept.piece_file import Head, PieceReader
from fomoe_io.kept.pieces import BLOCK_TOKENS, Piece, best_checkpoint, best_cut, extend, walk
from fomoe_io.ram_budget import kept_work_bytes, least_kept_bytes

APART_ON_DRIVE_TOKENS = 48
"""Between checkpoints that are worth a file: what a restart may cost to read again."""

VERSION = 1
"""Of the pieces' form."""

HELPER_SHARE = 4
"""A prompt of less than a quarter of another's tokens does not push it out of memory ..."""
STALE_SECONDS = 3600.0
"""... unless that one was not used for so long."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a state looks like, and what can use it.

    Attributes
    ----------
    row_bytes, recurrent_bytes : int
        See :class:`fomoe_io.session.Session`.
    fingerprint : str
    """

    row_bytes: int
    recurrent_bytes: int
    fingerprint: str

    @property
    def work_bytes(self) -> int:
        """What moving pieces takes for a moment: a block, and the buffer of a file."""
        return kept_work_bytes(self.row_bytes)


def form_fingerprint(*parts: object) -> str:
    """One name for all that must be alike: weights, arithmetic, sizes."""
    return xxhash.xxh3_128_hexdigest(json.dumps([str(part) for part in (VERSION, *parts)]).encode())


class Place(NamedTuple):
    """Where a session can stand: the blocks up to there, and the tokens of a last piece."""

    position: int
    blocks: list[Piece]
    last: Piece | None
    taken: int


class Lender(Protocol):
    """A session that has read something: what it has need not be in memory a second time, and others can have it.

    Attributes
    ----------
    live : list of Piece
        Blocks whose KV it has.
    """

    live: list[Piece]

    def own(self) -> list[Piece]:
        """Blocks and checkpoints whose KV it has, each after those that it depends on."""

    def lend(self, piece: Piece) -> np.ndarray | None:
        """KV of a piece, where it has it."""


RowsOf = Callable[[int, int], np.ndarray]
"""KV of tokens (first, count) that a session has."""


class KeptSessions:
    """Pieces of what sessions have read.

    Parameters
    ----------
    form : Form
    memory_bytes : int
        For pieces in memory and for moving them.
    folder : Folder or None
        The drive's part.

    Attributes
    ----------
    held_bytes : int
        Of pieces in memory.
    answers : Answers
        What was sampled.
    lenders : set of Lender
        Sessions that share it, for as long as somebody has them.
    """

    def __init__(self, form: Form, memory_bytes: int, folder: Folder | None = None) -> None:
        self.form, self.folder = form, folder
        self._most_bytes = max(0, memory_bytes - form.work_bytes)
        self.held_bytes = 0
        self.lenders: WeakSet[Lender] = WeakSet()
        self._held: set[Piece] = set()
        self.root = Piece(None, b"")
        self._clock = 0
        self._texts: dict[TextEnd, Piece] = {}
        self.answers = Answers()
        if not self.is_enough:
            self.folder = None
        if self.folder is not None:
            self._attach(self.folder)

    @property
    def is_enough(self) -> bool:
        """Whether there is memory for the least that is of use: one checkpoint."""
        return self._most_bytes + self.form.work_bytes >= self.least_bytes

    @property
    def least_bytes(self) -> int:
        """What it takes to be of use."""
        return least_kept_bytes(self.form.row_bytes, self.form.recurrent_bytes)

    @property
    def can_cut(self) -> bool:
        """Whether a session can stand after any token."""
        return self.form.recurrent_bytes == 0

    def _attach(self, folder: Folder) -> None:
        """What earlier processes have left."""
        blocks = {"": self.root}
        for found in folder.scan():
            head = found.head
            parent = blocks.get(head.parent)
            sizes = (head.row_bytes, head.recurrent_bytes or self.form.recurrent_bytes)
            if parent is None or parent.end != head.first or sizes != (self.form.row_bytes, self.form.recurrent_bytes):
                continue  # what it goes on from has left the folder
            piece = parent.hang(found.tokens, is_checkpoint=head.is_checkpoint)
            if piece.key != head.key or not (head.is_checkpoint or head.tokens == BLOCK_TOKENS):
                self.forget(piece)
                continue
            piece.file, piece.seconds, piece.text_end = found.path, found.seconds, head.text_end
            if head.text_end is not None:
                self._texts[head.text_end] = piece
            if not head.is_checkpoint:
                blocks[head.key] = piece

    # ---- finding ----

    def find(self, tokens: Any, most: int) -> Place | None:
        """The last place within the first `most` tokens where a session can stand; None: there is none."""
        while True:
            path = walk(self.root, tokens)
            if self.can_cut:
                last, count = best_cut(path, tokens, most)
                place = Place(last.first + count, path[1:], last, count)
                if last is path[-1]:
                    place = self._cut_to(path, most)
            else:
                checkpoint = best_checkpoint(path, tokens, most)
                if checkpoint is None:
                    return None
                place = Place(checkpoint.end, checkpoint.path()[:-1], checkpoint, checkpoint.count)
            if place.position <= 0:
                return None
            missing = self._missing(place)
            if missing is None:
                return place
            self.forget(missing)

    @staticmethod
    def _cut_to(path: list[Piece], most: int) -> Place:
        """The end of a path, or `most` where that is earlier."""
        blocks = [piece for piece in path[1:] if piece.end <= most]
        if len(blocks) == len(path) - 1:
            return Place(path[-1].end, blocks, None, 0)
        last = path[len(blocks) + 1]
        return Place(most, blocks, last, most - last.first)

    def _missing(self, place: Place) -> Piece | None:
        """A piece whose file another process has removed."""
        for piece in [*place.blocks, *([place.last] if place.last is not None else [])]:
            if piece.file is not None and (self.folder is None or not self.folder.touch(piece.file)):
                piece.file = None
                if not piece.memory_bytes:
                    return piece
        return None

    def replayed(self, tokens: Any, text_of: TextOf) -> Any:
        """A prompt with the tokens of answers as they were chosen, where it repeats all of an answer's text.

        Parameters
        ----------
        tokens : array of int
        text_of : callable
            A token's bytes.
        """
        found = text_ends(tokens, text_of, self._texts.keys() | self.answers.known)
        wholes = [(place, key) for place, key in found if key in self._texts]
        if not wholes:
            return self.answers.replayed(tokens, 0, found, text_of)
        place, key = wholes[-1]
        sampled = self._texts[key].all_tokens()
        later = [pair for pair in found if pair[0] > place]
        rest = self.answers.replayed(tokens, place, later, text_of) if later else tokens[place:]
        return sampled + rest

    # ---- using ----

    def use(self, pieces: Iterable[Piece]) -> None:
        """They were useful now."""
        self._clock += 1
        now = time.time()
        for piece in pieces:
            piece.used, piece.seconds = self._clock, now

    def rows(self, place: Place, known: int) -> Iterator[np.ndarray]:
        """KV of a place's tokens from `known` on.

        Raises
        ------
        Unusable
            A file is damaged: it is forgotten.
        """
        for piece in place.blocks:
            if piece.end > known:
                yield self._rows_of(piece)[max(0, known - piece.first) :]
        if place.last is not None and place.taken and place.position > known:
            yield self._rows_of(place.last)[max(0, known - place.last.first) : place.taken]

    def _rows_of(self, piece: Piece) -> np.ndarray:
        if piece.rows is not None:
            return piece.rows
        for lender in self.lenders:
            rows = lender.lend(piece)
            if rows is not None:
                return rows
        return self._load(piece, lambda reader: np.concatenate(list(reader.rows(BLOCK_TOKENS))))

    def recurrent(self, place: Place) -> np.ndarray:
        """What is recurrent there.

        Raises
        ------
        Unusable
        """
        last = place.last
        if self.can_cut:
            return np.empty(0, np.uint8)
        assert last is not None
        if last.recurrent is not None:
            return last.recurrent
        found = self._load(last, lambda reader: reader.recurrent())
        if self.make_room(found.nbytes, last.end, [*place.blocks, last]):
            last.recurrent = found
            self._hold(last, found.nbytes)
        return found

    def _load(self, piece: Piece, read: Callable[[PieceReader], np.ndarray]) -> np.ndarray:
        reader = None if self.folder is None or piece.file is None else self.folder.open(piece.file)
        try:
            if reader is None:
                raise Unusable
            with reader:
                found = read(reader)
                assert self.folder is not None
                self.folder.read_bytes += found.nbytes
                return found
        except (OSError, FormatError) as error:
            assert self.folder is not None and piece.file is not None
            self.folder.cannot_use(piece.file, error)
            self.forget(piece)
            raise Unusable from None
        except Unusable:
            self.forget(piece)
            raise

    # ---- keeping ----

    def extend(self, tokens: Any) -> list[Piece]:
        """The blocks of what a session has read, the root first; new ones are without KV as yet."""
        return extend(self.root, tokens)

    def checkpoint(self, tokens: Any, recurrent: np.ndarray | None, text_end: TextEnd | None) -> Piece | None:
        """A place at the end of what a session has read; None when there is no room for it.

        Parameters
        ----------
        tokens : array of int
        recurrent : numpy.ndarray or None
            As :meth:`Session.recurrent` gives it; None of a model that can be cut.
        text_end : (int, int) or None
            When an answer ends here.
        """
        path = self.extend(tokens)
        tail = tokens[path[-1].end :].tobytes()
        known = path[-1].checkpoints.get(tail)
        size = 0 if recurrent is None else recurrent.nbytes
        if known is None and size and not self.make_room(size, len(tokens), path):
            return None
        piece = path[-1].hang(tail, is_checkpoint=True)
        if recurrent is not None and piece.recurrent is None and (known is None or known.file is None):
            piece.recurrent = recurrent
            self._hold(piece, size)
        if text_end is not None:
            piece.text_end = text_end
            self._texts[text_end] = piece
        self.use([*path, piece])
        return piece

    def hold(self, piece: Piece, rows_of: RowsOf, length: int, keep: Sequence[Piece]) -> bool:
        """Take a piece's KV from the session that has it; False when there is no room.

        Parameters
        ----------
        piece : Piece
        rows_of : callable
        length : int
            Tokens of the prompt for whose sake.
        keep : sequence of Piece
            What must not make room.
        """
        if piece.rows is not None:
            return True
        if not self.make_room(piece.count * self.form.row_bytes, length, keep):
            return False
        piece.rows = rows_of(piece.first, piece.count)
        self._hold(piece, piece.rows.nbytes)
        return True

    def _hold(self, piece: Piece, size: int) -> None:
        self._held.add(piece)
        self.held_bytes += size

    def write(self, piece: Piece, rows_of: RowsOf, keep: Sequence[Piece]) -> bool:
        """Make a file of a piece, unless there is one.  Whether there is one now."""
        if piece.file is not None or self.folder is None:
            return piece.file is not None
        if piece.is_checkpoint and piece.recurrent is None and not self.can_cut:
            return False
        assert piece.parent is not None
        none = np.empty(0, np.uint8)
        recurrent = none if piece.recurrent is None else piece.recurrent
        head = Head(
            self.form.fingerprint, piece.key, piece.parent.key, piece.first, piece.count, self.form.row_bytes,
            recurrent.nbytes, piece.is_checkpoint, piece.text_end,
        )  # fmt: skip
        rows = rows_of(piece.first, piece.count) if piece.rows is None else piece.rows
        files = [p.file for p in keep if p.file is not None]
        piece.file = self.folder.write(head, piece.tokens, [rows], recurrent, files)
        return piece.file is not None

    # ---- making room ----

    def has_room(self, size: int) -> bool:
        """Whether there is, without letting go of anything."""
        return self.held_bytes + size <= self._most_bytes

    def make_room(self, size: int, length: int, keep: Iterable[Piece] = ()) -> bool:
        """Let go of what was used longest ago, for a prompt of `length` tokens."""
        if size > self._most_bytes:
            return False
        kept, now = set(keep), time.time()
        while self.held_bytes + size > self._most_bytes:
            twice = [p for lender in self.lenders for p in lender.live if p.rows is not None and p not in kept]
            if twice:
                self._drop_rows(twice[0])
                continue
            victims = [p for p in self._loose() if p not in kept and not _is_above(p, length, now)]
            if not victims:
                return False
            self.release(min(victims, key=lambda p: (p.used, -p.end)))
        return True

    def _loose(self) -> list[Piece]:
        """What memory can let go of: a piece with a file, or one that nothing depends on."""
        self._held = {piece for piece in self._held if piece.memory_bytes}
        return [piece for piece in self._held if piece.file is not None or not _is_needed(piece)]

    def _drop_rows(self, piece: Piece) -> None:
        """A session has them, too."""
        assert piece.rows is not None
        self.held_bytes -= piece.rows.nbytes
        piece.rows = None

    def release(self, piece: Piece) -> None:
        """Let go of what a piece holds in memory; without a file it is forgotten."""
        self.held_bytes -= piece.memory_bytes
        piece.rows = piece.recurrent = None
        if piece.file is None:
            self.forget(piece)

    def forget(self, piece: Piece) -> None:
        """Take a piece out, with all that depends on it."""
        for lost in piece.below():
            self.held_bytes -= lost.memory_bytes
            lost.rows = lost.recurrent = None
            if lost.text_end is not None and self._texts.get(lost.text_end) is lost:
                del self._texts[lost.text_end]
        piece.cut_off()


class Unusable(Exception):
    """A piece's file can't be used; it is forgotten, and another place can be looked for."""


def _is_needed(piece: Piece) -> bool:
    """Whether something that is kept depends on it."""
    return any(other is not piece and (other.memory_bytes or other.file) for other in piece.below())


def _is_above(piece: Piece, length: int, now: float) -> bool:
    """Whether it is worth more than a prompt of `length` tokens, which may be a helper's."""
    return piece.end >= HELPER_SHARE * length and now - piece.seconds < STALE_SECONDS


def as_tokens(tokens: Sequence[int]) -> Any:
    """An array."""
    return tokens if isinstance(tokens, array) else array("i", tokens)
