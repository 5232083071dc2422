"""A session: one token timeline on an engine, with its KV caches and recurrent state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fomoe_io.backend import RECORDS, Batch, Span, filled
from fomoe_io.errors import UsageError

if TYPE_CHECKING:
    from fomoe_io._gate import Gate
    from fomoe_io.backend import Backend
    from fomoe_io.models.shape import Shape


@dataclass(slots=True)
class Usage:
    """What an engine's sessions have read, and how long it took."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    def clear(self) -> None:
        """Begin anew."""
        self.prompt_tokens = self.generated_tokens = 0
        self.prompt_seconds = self.decode_seconds = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session at a moment: what its tokens have left behind.  Made by :meth:`Session.snapshot`.

    Attributes
    ----------
    position : int
        Tokens read.
    rows : numpy.ndarray
        uint8 [position, row_bytes]: KV of each token.
    recurrent : numpy.ndarray
        uint8 [recurrent_bytes]
    """

    position: int
    rows: np.ndarray
    recurrent: np.ndarray


class Session:
    """Made by :meth:`Engine.session`; several of one engine take turns, and never from two threads at a time.

    Attributes
    ----------
    position : int
        Tokens read so far.
    context_tokens : int
        Tokens it can hold.
    records : dict of str to numpy.ndarray
        What the last :meth:`evaluate` was asked to record.
    """

    def __init__(self, backend: Backend, gate: Gate, shape: Shape, context_tokens: int, usage: Usage) -> None:
        self._backend, self._gate, self._shape, self._usage = backend, gate, shape, usage
        self._state = backend.new_state()
        self._decode_logits = self._state.token_logits(shape.vocabulary)
        self._broken = self._is_closed = False
        self.position = 0
        self.context_tokens = context_tokens
        self.records: dict[str, np.ndarray] = {}

    @property
    def is_broken(self) -> bool:
        """Whether it stopped in the middle of a token, by an error or an interrupt, and must be reset."""
        return self._broken

    def _check_open(self) -> None:
        self._gate.check()
        if self._is_closed:
            raise UsageError("the session is closed")

    def reset(self) -> None:
        """Forget everything: the next token is the first."""
        self._check_open()
        with self._gate:
            self._state.clear()
            self.position = 0
            self._broken = False

    # ---- what tokens leave behind ----

    @property
    def row_bytes(self) -> int:
        """KV of a token, in all layers: a row that later tokens read and none changes."""
        return self._state.row_bytes

    @property
    def recurrent_bytes(self) -> int:
        """What every token changes.  0: attention alone, and the session can be cut at any token."""
        return self._state.recurrent_bytes

    def rows(self, first: int, count: int) -> np.ndarray:
        """KV of tokens, from `first` on: uint8 [count, row_bytes]; also of a session that stopped after them."""
        self._check_open()
        self._check_range(first, count, self.position)
        if self._gate.is_mine:  # for another session, which takes them at the moment
            return self._state.save_rows(first, count)
        with self._gate:
            return self._state.save_rows(first, count)

    def recurrent(self) -> np.ndarray:
        """What is recurrent, as the tokens so far have left it: uint8 [recurrent_bytes]."""
        self._check_open()
        if self._broken:
            raise UsageError("the session stopped in the middle of a token after an error; reset() it first")
        with self._gate:
            return self._state.save_recurrent()

    def snapshot(self) -> Snapshot:
        """All of it; `restore` makes a session of the same model and kernels go on from there, to the same bits."""
        recurrent = self.recurrent()
        return Snapshot(self.position, self.rows(0, self.position), recurrent)

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where a snapshot was taken, whatever was read since, or in another session.

        Raises
        ------
        UsageError
            It is of another model, or longer than this session's context.
        """
        self.resume(snapshot.position, snapshot.recurrent, [snapshot.rows])

    def resume(self, position: int, recurrent: np.ndarray, pieces: Iterable[np.ndarray] = (), known: int = 0) -> None:
        """Stand at a position: the `known` first rows are this session's own, the others come in pieces.

        Parameters
        ----------
        position : int
        recurrent : numpy.ndarray
            What :meth:`recurrent` gave there.
        pieces : iterable of numpy.ndarray
            What :meth:`rows` gave, one after the other; looked at one by one.
        known : int
            Rows that the session has, of the same tokens.

        Raises
        ------
        UsageError
            Sizes do not fit; the session must be reset then.
        """
        self._check_open()
        self._check_range(0, known, min(self.position, position))
        self._check_range(0, position, self.context_tokens)
        if recurrent.shape != (self.recurrent_bytes,):
            raise UsageError("what is recurrent in this state is not this model's")
        with self._gate:
            self._broken = True
            self._state.load_recurrent(recurrent)
            for rows in pieces:
                if rows.shape[1:] != (self.row_bytes,) or known + len(rows) > position:
                    raise UsageError("the rows of this state are not this model's")
                self._state.load_rows(known, rows)
                known += len(rows)
            if known != position:
                raise UsageError(f"this state has {known} rows of {position}")
            self.position = position
            self._broken = False

    def truncate(self, position: int) -> None:
        """Forget the tokens from `position` on.

        Raises
        ------
        UsageError
            There are fewer; or the model has a recurrent state, which can't be wound back, and it is not 0.
        """
        if position == 0:
            self.reset()
            return
        if self.recurrent_bytes and position != self.position:
            raise UsageError("a recurrent state can't be wound back", hint="restore() a snapshot, or reset()")
        self.resume(position, np.empty(0, np.uint8) if not self.recurrent_bytes else self.recurrent(), known=position)

    @staticmethod
    def _check_range(first: int, count: int, most: int) -> None:
        if first < 0 or count < 0 or first + count > most:
            raise UsageError(f"tokens {first} to {first + count} are not among the {most} that there are")

    # ---- reading ----

    def checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The tokens as int32; UsageError when this session can't read them now."""
        self._check_open()
        ids = token_ids(tokens, self._shape.vocabulary)
        if self.position + len(ids) > self.context_tokens:
            raise UsageError(
                f"{self.position} + {len(ids)} tokens exceed the context of {self.context_tokens}",
                hint=f"-c {self.position + len(ids)} (the model was trained on {self._shape.context_tokens})",
            )
        if self._broken:
            raise UsageError("the session stopped in the middle of a token after an error; reset() it first")
        return ids

    def _run(self, batch: Batch, logits: np.ndarray) -> None:
        self._broken = True
        self._backend.run(batch, logits)
        self._broken = False
        self.position += len(batch.spans[0].ids)  # its own

    def _span(self, ids: np.ndarray, outputs: int, prompt_tokens: int = 1) -> Span:
        return Span(self._state, ids, self.position, outputs, prompt_tokens)

    def prefill(
        self,
        tokens: Sequence[int] | np.ndarray,
        progress: Callable[[int, int], None] | None = None,
        *,
        prompt_tokens: int | None = None,
    ) -> np.ndarray:
        """Read tokens in batches.

        Parameters
        ----------
        tokens : sequence of int
        progress : callable, optional
            Called with (tokens done, tokens in all) after each batch.
        prompt_tokens : int, optional
            Of the prompt that they are a piece of, if it is read in several: how long a prompt is may decide how it is
            computed, how it is cut may not.

        Returns
        -------
        numpy.ndarray
            float32 [vocabulary]: logits after the last token.
        """
        self._check_open()
        with self._gate:
            ids = self.checked(tokens)
            started = time.monotonic()
            logits = np.empty((1, self._shape.vocabulary), np.float32)
            batch = self._backend.budgets.batch_tokens
            for first in range(0, len(ids), batch):
                part = ids[first : first + batch]
                outputs = 1 if first + batch >= len(ids) else 0
                self._gate.check_run()
                self._run(Batch([self._span(part, outputs, prompt_tokens or len(ids))]), logits[:outputs])
                if progress:
                    progress(first + len(part), len(ids))
            self._usage.prompt_tokens += len(ids)
            self._usage.prompt_seconds += time.monotonic() - started
        return logits[0]

    def decode(self, token: int) -> np.ndarray:
        """Read one token; float32 [vocabulary], valid until the next call or the session is closed.

        The only step in which cache-aware routing (`EngineConfig.car`) may act: batches are exact.
        """
        self._check_open()
        with self._gate:
            ids = self.checked([token])
            started = time.monotonic()
            self._run(Batch([self._span(ids, 1)], may_substitute=True), self._decode_logits)
            self._usage.generated_tokens += 1
            self._usage.decode_seconds += time.monotonic() - started
        return self._decode_logits[0]

    def evaluate(self, tokens: Sequence[int] | np.ndarray, *, record: Sequence[str] = ()) -> np.ndarray:
        """Read tokens in batches and return the logits of every position.

        Parameters
        ----------
        tokens : sequence of int
        record : sequence of str
            Any of `experts` (int32 [layers, n, used]), `weights` (float32, alike), `router_logits`
            (float32 [layers, n, experts]), `layer_output` (float32 [layers, n, columns]) and `final_norm`
            (float32 [n, columns]); found in `records` afterwards.

        Returns
        -------
        numpy.ndarray
            float32 [n, vocabulary]
        """
        self._check_open()
        with self._gate:
            ids = self.checked(tokens)
            started = time.monotonic()
            logits = np.empty((len(ids), self._shape.vocabulary), np.float32)
            batch = self._backend.budgets.batch_tokens
            pieces: dict[str, list[np.ndarray]] = {name: [] for name in record}
            for first in range(0, len(ids), batch):
                part = ids[first : first + batch]
                self._gate.check_run()
                records = {name: self._record_array(name, len(part)) for name in record}
                span = self._span(part, len(part), len(ids))
                self._run(Batch([span], records=records), logits[first : first + batch])
                for name, array in records.items():
                    pieces[name].append(array)
            axis = {name: 0 if name == "final_norm" else 1 for name in record}
            self.records = {name: np.concatenate(parts, axis[name]) for name, parts in pieces.items()}
            self._usage.prompt_tokens += len(ids)
            self._usage.prompt_seconds += time.monotonic() - started
        return logits

    def _record_array(self, name: str, tokens: int) -> np.ndarray:
        s = self._shape
        if name not in RECORDS:
            raise UsageError(f"can't record {name!r}; known: {', '.join(RECORDS)}")
        if name == "final_norm":
            return np.empty((tokens, s.columns), np.float32)
        width = {"experts": s.used, "weights": s.used, "router_logits": s.experts, "layer_output": s.columns}[name]
        if name == "experts":
            return np.full((s.layers, tokens, width), -1, np.int32)  # what dense layers keep
        return np.zeros((s.layers, tokens, width), np.float32)

    def close(self) -> None:
        """Give the state's memory back.  Idempotent; before or after the engine's.

        Raises
        ------
        UsageError
            A run is at work.
        """
        if self._is_closed:
            return
        if self._gate.is_shut or self._gate.is_foreign:
            self._is_closed = True
            self._state.close()
            return
        with self._gate:
            self._is_closed = True
            self._state.close()


def read_together(
    parts: Sequence[tuple[Session, Sequence[int] | np.ndarray]], *, prompt_tokens: Sequence[int] | None = None
) -> np.ndarray:
    """Read tokens of several sessions of one engine in batches that they share: an expert is read once for all of them.

    Parameters
    ----------
    parts : sequence of (Session, sequence of int)
        Each session once.
    prompt_tokens : sequence of int, optional
        Of each, as :meth:`Session.prefill` has it.

    Returns
    -------
    numpy.ndarray
        float32 [parts, vocabulary]: logits after the last token of each, the same bits as from a `prefill` of its own.

    Raises
    ------
    UsageError
        There is none, one session comes twice, is of another engine, closed or broken, or has no room for its tokens.
    """
    one = _checked_together(parts)
    with one._gate:
        started = time.monotonic()
        count, logits = _run_together(one, parts, prompt_tokens)
        one._usage.prompt_tokens += count
        one._usage.prompt_seconds += time.monotonic() - started
    return logits


def decode_together(parts: Sequence[tuple[Session, int]]) -> np.ndarray:
    """Read a token of each of several sessions, as :meth:`Session.decode` does.

    In one batch, so that no expert is read twice for them, but where that would change bits: a GPU has other kernels
    for single tokens, and cache-aware routing acts on these alone.

    Parameters
    ----------
    parts : sequence of (Session, int)
        Each session once.

    Returns
    -------
    numpy.ndarray
        float32 [parts, vocabulary]: the same bits as from a `decode` of each.

    Raises
    ------
    UsageError
        As of :func:`read_together`.
    """
    spans = [(session, [token]) for session, token in parts]
    one = _checked_together(spans)
    if not one._backend.joins_tokens:
        return np.stack([session.decode(token).copy() for session, token in parts])
    with one._gate:
        started = time.monotonic()
        count, logits = _run_together(one, spans)
        one._usage.generated_tokens += count
        one._usage.decode_seconds += time.monotonic() - started
    return logits


Parts = Sequence[tuple[Session, Sequence[int] | np.ndarray]]


def _checked_together(parts: Parts) -> Session:
    """One of them."""
    sessions = [session for session, _ in parts]
    if not parts or len({id(s) for s in sessions}) < len(parts) or len({id(s._backend) for s in sessions}) > 1:
        raise UsageError("sessions read together are of one engine, and each comes once")
    for session in sessions:
        session._check_open()
    return sessions[0]


def _run_together(one: Session, parts: Parts, prompt_tokens: Sequence[int] | None = None) -> tuple[int, np.ndarray]:
    """(tokens read, logits after the last of each)"""
    ids = [session.checked(tokens) for session, tokens in parts]
    of_prompt = prompt_tokens or [len(tokens) for tokens in ids]
    logits = np.empty((len(parts), one._shape.vocabulary), np.float32)
    done = 0
    for batch in filled([len(tokens) for tokens in ids], one._backend.budgets.batch_tokens):
        one._gate.check_run()
        inside = [parts[i][0] for i, _, _ in batch]
        spans = [
            session._span(ids[i][first:last], int(last == len(ids[i])), of_prompt[i])
            for session, (i, first, last) in zip(inside, batch, strict=True)
        ]
        ends = sum(span.outputs for span in spans)
        for session in inside:
            session._broken = True
        one._backend.run(Batch(spans), logits[done : done + ends])
        done += ends
        for session, span in zip(inside, spans, strict=True):
            session._broken = False
            session.position += len(span.ids)
    return sum(map(len, ids)), logits


def token_ids(tokens: Sequence[int] | np.ndarray, vocabulary: int) -> np.ndarray:
    """Tokens as int32 [n].

    Raises
    ------
    UsageError
        There is none, or one is no integer of 0..vocabulary - 1: the message names the first.
    """
    if type(tokens) is list and len(tokens) == 1 and type(tokens[0]) is int and 0 <= tokens[0] < vocabulary:
        return np.array(tokens, np.int32)  # what every step of decoding asks: a seventh of the time of what follows
    try:
        ids = np.asarray(tokens)
    except ValueError:  # sequences of several lengths
        ids = np.empty(())
    if ids.ndim != 1 or not len(ids):
        raise UsageError("a session reads one or more tokens: a flat sequence of integers")
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
        for place, token in enumerate(tokens):
            if not _is_integer(token) or not 0 <= token < vocabulary:
                shown = token.item() if isinstance(token, np.generic) else token
                raise UsageError(f"token {place} is {shown!r}, expected an integer of 0..{vocabulary - 1}")
    return np.ascontiguousarray(ids, np.int32)


def _is_integer(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)
