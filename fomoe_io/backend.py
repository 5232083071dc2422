"""What an engine asks of the machine that computes: the protocol that `cpu/backend.py` and `gpu/backend.py` fulfil."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from fomoe_io.errors import BudgetError
from fomoe_io.units import format_bytes

if TYPE_CHECKING:
    from fomoe_io._cpu import Trace

RECORDS = ("experts", "weights", "router_logits", "layer_output", "final_norm")
"""What a batch may be asked to record."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """What the memory was shared into.

    Attributes
    ----------
    ram_bytes, vram_bytes : int
        The bounds themselves; `vram_bytes` is 0 on a CPU.
    resident_bytes, workspace_bytes : int
        Weights that stay, and activations.
    state_bytes : int
        Of all sessions together.
    vram_pool_bytes, pool_bytes : int
        Experts in VRAM, and in host memory.
    kept_bytes : int
        Sessions that are kept beside the open ones.
    lookahead_bytes : int
        Of `pool_bytes`, buffers for experts that are read before they are asked for.
    batch_tokens : int
        Of a full batch.
    slots : tuple of (int, int)
        Experts of each layer in VRAM (on a CPU a simulated one) and in DRAM.
    """

    ram_bytes: int
    resident_bytes: int
    state_bytes: int
    workspace_bytes: int
    pool_bytes: int
    batch_tokens: int
    slots: tuple[tuple[int, int], ...]
    vram_bytes: int = 0
    vram_pool_bytes: int = 0
    kept_bytes: int = 0
    lookahead_bytes: int = 0

    @property
    def slot_table(self) -> np.ndarray:
        """`slots` as int32 [layers, 2]."""
        return np.array(self.slots, np.int32).reshape(-1, 2)


def kept_text(budgets: Budgets) -> str:
    """Of a banner's line."""
    return f", kept sessions {format_bytes(budgets.kept_bytes)}" if budgets.kept_bytes else ""


def lookahead_text(budgets: Budgets) -> str:
    """Of a banner's line."""
    return f", lookahead {format_bytes(budgets.lookahead_bytes)}" if budgets.lookahead_bytes else ""


@dataclass(frozen=True, slots=True)
class Counters:
    """What was counted since the backend was opened.

    Attributes
    ----------
    requests : experts asked for, by token
    vram_hits, dram_hits, nvme_hits : where they were found
    evictions, promotions, demotions, substitutions, offers : of the residency's and cache-aware routing's decisions
    nvme_reads, nvme_bytes, stall_ns : reads of experts, and how long the arithmetic waited for them
    groups : runs of expert products on a CPU
    prefetches, prefetch_useful, prefetch_late, prefetch_bytes, prefetch_wasted_bytes : reads ahead: experts, those of
        them that were then asked for, and before they had come; bytes, and those that nobody asked for
    sent_ahead, sent_ahead_useful, sent_ahead_wasted_bytes : experts of which something was sent to a device before
        anybody had asked for them, those of them that were then asked for, and bytes of the others
    back_filled_bytes : read into a GPU's DRAM after others had stood in for the experts
    layers, served_layers : layers run on a device, and those among them in which the host had something to bring
    misses : experts that the host had to bring to a device
    up_bytes, down_bytes, copy_stall_ns : over the link, and how long the device waited for copies
    before_reads_ns, after_reads_ns, post_stall_ns, host_ns : between a layer's post and its first read, between its
        last read and the answer, waiting for posts, and all the host's own work
    """

    requests: int = 0
    vram_hits: int = 0
    dram_hits: int = 0
    nvme_hits: int = 0
    evictions: int = 0
    promotions: int = 0
    demotions: int = 0
    substitutions: int = 0
    offers: int = 0
    nvme_reads: int = 0
    nvme_bytes: int = 0
    stall_ns: int = 0
    groups: int = 0
    prefetches: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    sent_ahead: int = 0
    sent_ahead_useful: int = 0
    sent_ahead_wasted_bytes: int = 0
    back_filled_bytes: int = 0
    layers: int = 0
    served_layers: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    copy_stall_ns: int = 0
    misses: int = 0
    host_ns: int = 0
    before_reads_ns: int = 0
    after_reads_ns: int = 0
    post_stall_ns: int = 0

    def since(self, before: Self) -> Self:
        """What was counted after `before`."""
        return type(self)(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


@dataclass(slots=True)
class StateParts:
    """Where the parts of a session's memory lie, as its recorder has laid them out.

    Attributes
    ----------
    streams : list of (int, int)
        Where each part of the KV caches begins, and the bytes of a position in it: one position follows another.
    recurrent : list of (int, int)
        (Where, bytes) of what every token writes anew; zero before the first.
    """

    streams: list[tuple[int, int]] = field(default_factory=list)
    recurrent: list[tuple[int, int]] = field(default_factory=list)

    @property
    def row_bytes(self) -> int:
        """Of a position, in all streams."""
        return sum(width for _, width in self.streams)

    @property
    def recurrent_bytes(self) -> int:
        """Of all that is recurrent."""
        return sum(size for _, size in self.recurrent)


class State(Protocol):
    """The memory of one session, KV caches and recurrent state: made by its backend, which alone looks inside.

    KV is a row a token, which nothing changes once it is written; the rest can only be kept as a whole.
    """

    @property
    def row_bytes(self) -> int:
        """KV of a token, in all layers."""

    @property
    def recurrent_bytes(self) -> int:
        """What every token changes; 0: a state can be cut at any token."""

    def clear(self) -> None:
        """Zero what the next token would see of earlier ones."""

    def save_rows(self, first: int, count: int) -> np.ndarray:
        """uint8 [count, row_bytes]: KV of tokens from `first` on."""

    def load_rows(self, first: int, rows: np.ndarray) -> None:
        """Put back what `save_rows` gave."""

    def save_recurrent(self) -> np.ndarray:
        """uint8 [recurrent_bytes]"""

    def load_recurrent(self, saved: np.ndarray) -> None:
        """Put back what `save_recurrent` gave."""

    def token_logits(self, vocabulary: int) -> np.ndarray:
        """float32 [1, vocabulary] that logits of single tokens come to soonest; its own until it is closed."""

    def close(self) -> None:
        """Give it back.  Idempotent."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one session that are read together.

    Attributes
    ----------
    state : State
    ids : numpy.ndarray
        int32 [tokens]
    position : int
        Of the first in its session.
    outputs : int
        How many of the last get logits: none, one or all.
    prompt_tokens : int
        Of the prompt that they are a part of.  How products are computed may depend on it, and never on how memory or
        options cut the prompt.
    """

    state: State
    ids: np.ndarray
    position: int
    outputs: int
    prompt_tokens: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What is run at once.

    Attributes
    ----------
    spans : sequence of Span
        Of different sessions.
    may_substitute : bool
        Each span is one token, in which cache-aware routing may act.
    records : mapping of str to numpy.ndarray
        What the only span shall leave behind, of RECORDS; see :meth:`Session.evaluate` for shapes.
    """

    spans: Sequence[Span]
    may_substitute: bool = False
    records: Mapping[str, np.ndarray] = field(default_factory=dict)


def together(spans: Sequence[Span], most_tokens: int) -> Iterator[list[Span]]:
    """The spans in order, cut into batches of up to so many tokens; a longer span is a batch of its own."""
    batch: list[Span] = []
    for span in spans:
        if batch and sum(len(other.ids) for other in batch) + len(span.ids) > most_tokens:
            yield batch
            batch = []
        batch.append(span)
    yield batch


def filled(lengths: Sequence[int], most_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Parts of so many tokens, cut into batches that are full but for the last: (which part, first, last) of each."""
    batch: list[tuple[int, int, int]] = []
    room = most_tokens
    for i, length in enumerate(lengths):
        first = 0
        while first < length:
            last = min(length, first + room)
            batch.append((i, first, last))
            room -= last - first
            first = last
            if not room:
                yield batch
                batch, room = [], most_tokens
    if batch:
        yield batch


class Joined:
    """The spans of a batch, a token after another.

    Attributes
    ----------
    ids : numpy.ndarray
        int32 [tokens]
    positions : numpy.ndarray
        int64 [tokens], of each in its session.
    output_rows : numpy.ndarray
        int32 [outputs]: the tokens that get logits.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        lengths = [len(span.ids) for span in spans]
        self.ids = np.ascontiguousarray(np.concatenate([span.ids for span in spans]), np.int32)
        self.positions = np.concatenate([np.arange(s.position, s.position + len(s.ids)) for s in spans])
        ends = np.cumsum(lengths)
        rows = [np.arange(end - span.outputs, end) for span, end in zip(spans, ends, strict=True)]
        self.output_rows = np.concatenate(rows).astype(np.int32)
        self._lengths, self._ends = lengths, ends

    def of_tokens(self, values: Sequence[int]) -> np.ndarray:
        """uint64 [tokens]: a value of each span at each of its tokens."""
        return np.repeat(np.array(values, np.uint64), self._lengths)

    def output_runs(self, most: int) -> Iterator[tuple[int, int]]:
        """(first, count) of tokens one after another that get logits, up to so many at a time."""
        for span, end in zip(self.spans, self._ends, strict=True):
            for first in range(end - span.outputs, end, most):
                yield int(first), int(min(most, end - first))


class Backend(Protocol):
    """A model on a machine: memory, programs and the routed experts.  One caller at a time."""

    @property
    def device_name(self) -> str:
        """Where the model is computed, for people."""

    @property
    def computed_by(self) -> str:
        """What computes, for the banner."""

    @property
    def kernels(self) -> str:
        """Whose arithmetic it is: results of the same kernels are the same."""

    @property
    def joins_tokens(self) -> bool:
        """Whether single tokens of several sessions in one batch have the bits of each alone."""

    @property
    def threads(self) -> int:
        """Threads of the host that compute."""

    @property
    def budgets(self) -> Budgets:
        """What the memory was shared into."""

    def memory_lines(self, again: str) -> list[str]:
        """Where the memory goes, for the banner; `again`: how to ask for the same budget."""

    def record(self, trace: Trace) -> None:
        """Write what runs from now on do into a trace."""

    def warm(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """Bring experts into a layer's free slots, the first in order before any is asked for.  ReadError."""

    def new_state(self) -> State:
        """Memory for another session, with nothing in it.  BudgetError when there is none left."""

    def run(self, batch: Batch, logits: np.ndarray) -> None:
        """Read tokens; logits float32 [outputs of all spans, vocabulary] are written.  ReadError, DeviceError."""

    def picks(self) -> np.ndarray:
        """int64 [layers, experts]: how often the router has picked each."""

    def tiers(self) -> np.ndarray:
        """int8 [layers, experts]: where each is, 0 VRAM, 1 DRAM, 2 the drive."""

    def counters(self) -> Counters:
        """What has been counted."""

    def add_statistics(self, result: dict[str, Any], change: Counters) -> None:
        """What only this backend knows."""

    def reset_statistics(self) -> None:
        """What `add_statistics` tells begins anew."""

    def close(self) -> None:
        """Give everything back; nobody is inside, and nobody will be."""


class StatePool:
    """Places for the states of sessions: as many as the budget has room for.

    Parameters
    ----------
    count : int
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))[::-1]

    def take(self) -> int:
        """A free place.

        Raises
        ------
        BudgetError
            There is none.
        """
        if not self._free:
            many = "1 session" if self.count == 1 else f"{self.count} sessions"
            raise BudgetError(
                f"the engine has memory for {many}, and so many are open",
                hint=f"close() one, or open the engine with sessions={self.count + 1}",
            )
        return self._free.pop()

    def give(self, place: int) -> None:
        """A place that is free again."""
        assert place not in self._free
        self._free.append(place)


class PooledState:
    """What the states of all backends have in common: a place in a pool, given back once.

    Parameters
    ----------
    pool : StatePool

    Raises
    ------
    BudgetError
        It is full.
    """

    _is_open = False  # of one that was never made: __del__ sees it

    def __init__(self, pool: StatePool) -> None:
        self._pool, self.place = pool, pool.take()
        self._is_open = True

    def token_logits(self, vocabulary: int) -> np.ndarray:
        """float32 [1, vocabulary] for its single tokens."""
        return np.empty((1, vocabulary), np.float32)

    def _release(self) -> None:
        """Give memory of its own back."""

    def close(self) -> None:
        """Give it back.  Idempotent."""
        if self._is_open:
            self._is_open = False
            self._release()
            self._pool.give(self.place)

    def __del__(self) -> None:
        self.close()
