"""What a recording of a model for a GPU is made of: arenas of addresses, activation rows, matrices, launches.

Addresses come from an :class:`Arena`, so that a model recorded once on an arena without memory tells how much it
needs, and once more on the device gives its launches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fomoe_io.backend import StateParts
from fomoe_io.gpu import kernels
from fomoe_io.gpu.kernels import up
from fomoe_io.models.recorder import KvType

if TYPE_CHECKING:
    from fomoe_io.models.rope import Rope

F32, Q8, HALF = 0, 1, 2
"""Forms of an activation: floats, a row of ``gpu/kernels/activations.h``, or (in batches) halves."""

ALIGNMENT_BYTES = 256
FLAG_BYTES = 64
"""From one word that somebody waits for to the next: a line of a processor's cache."""


class Arena:
    """A bump allocator over one device buffer; without one (base 0) it only counts."""

    def __init__(self, base: int = 0) -> None:
        self.base, self.bytes = base, 0

    def take(self, nbytes: int) -> int:
        """An aligned address."""
        address = self.base + self.bytes
        self.bytes += up(nbytes, ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return address


@dataclass(slots=True)
class DeviceRows:
    """One activation row a token: floats, or Q8 rows."""

    address: int
    columns: int
    type: int = F32

    @property
    def stride_bytes(self) -> int:
        """From one token to the next."""
        sizes = {F32: 4 * self.columns, Q8: kernels.q8_row_bytes(self.columns), HALF: 2 * self.columns}
        return sizes[self.type]


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """A [rows, columns] weight matrix in device memory; `kernel` names its format."""

    address: int
    kernel: str
    rows: int
    columns: int

    @property
    def activation_type(self) -> int:
        """What a product with it reads."""
        return Q8 if self.kernel in kernels.QUANTIZED_TYPES else F32

    @property
    def row_bytes(self) -> int:
        """From one row to the next."""
        block, block_bytes = kernels.BLOCKS[self.kernel]
        return self.columns // block * block_bytes


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """Token embeddings in a file.

    Attributes
    ----------
    kernel : the format in which rows are sent to the device
    type : ggml's number of the file's format; the host expands rows to floats when the device does not know it
    row_bytes, file_row_bytes : of a row as it is sent, and in the file
    """

    kernel: str
    type: int
    columns: int
    row_bytes: int
    file_row_bytes: int


@dataclass(slots=True)
class LaunchSpec:
    """A launch that has not been bound to a device yet.

    `beside`, `forks` and `joins` are those of :class:`device.Step`; `guesses`: of lookahead, whose launches change no
    others' results.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: list[Any]
    beside: bool = False
    forks: bool = False
    joins: bool = False
    guesses: bool = False


@dataclass(frozen=True, slots=True)
class DeviceExpertLayer:
    """What the kernels must know of a layer's routed experts.

    Attributes
    ----------
    gate_kernel, down_kernel : formats of gate and up, and of down
    device_offset : where gate, up and down stand in a record
    table, post, answer : addresses as the device sees them (gpu/kernels/router.h)
    guess : such addresses, of what is guessed a layer ahead, and more
    """

    gate_kernel: str
    down_kernel: str
    device_offset: tuple[int, int, int]
    table: int
    post: int
    answer: int
    guess: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Words that every layer's kernels share: the run's number (device), the word that stops a wait (host)."""

    run: int
    stop: int


@dataclass(frozen=True, slots=True)
class Part:
    """The layers that a device computes, where several share a model.

    Attributes
    ----------
    owner : tuple of int
        Which device computes each layer; empty: this one all of them.
    index : int
        This device's.
    exchange : int
        Address of what devices hand to one another, as this one sees it.
    columns : int
        Of the residual stream.
    """

    owner: tuple[int, ...] = ()
    index: int = 0
    exchange: int = 0
    columns: int = 0

    def has(self, layer: int) -> bool:
        """Whether a layer is computed here; those before the first and after the last belong to these."""
        return not self.owner or self.owner[max(0, min(layer, len(self.owner) - 1))] == self.index

    @property
    def is_last(self) -> bool:
        """Whether logits are made here."""
        return self.has(len(self.owner))

    @property
    def is_in_turn(self) -> bool:
        """Whether every layer's next is another device's."""
        return bool(self.owner) and all(a != b for a, b in pairwise(self.owner))

    def hop(self, number: int) -> tuple[int, int, int]:
        """Addresses of the rows that the so-manieth change of devices hands over, of the word that follows them, and
        of the one that follows the first row where that is handed over early."""
        rows = self.exchange + number * hop_bytes(self.columns)
        flag = rows + 8 * self.columns
        return rows, flag, flag + FLAG_BYTES


WHOLE = Part()
"""One device computes everything."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of every product the rows that a device makes, where several compute each layer together (kernels/gather.h).

    Attributes
    ----------
    index, count : int
        Which of how many devices.
    outbox, inbox : int
        Addresses, as this one sees them, of the memory that it writes for the others and of what they write: the same
        one for all by default.  0 while counting.
    """

    index: int = 0
    count: int = 1
    outbox: int = 0
    inbox: int = 0

    def of(self, rows: int) -> slice:
        """This device's of so many rows; what does not go round is the last one's."""
        each, is_last = rows // self.count, self.index + 1 == self.count
        return slice(self.index * each, rows if is_last else (self.index + 1) * each)


ALONE = Share()
"""One device makes all rows."""


def length(run: slice) -> int:
    """How many it has."""
    return int(run.stop - run.start)


def hop_bytes(columns: int) -> int:
    """Of one change of devices: two rows, and two words on lines of their own."""
    return up(8 * columns + 2 * FLAG_BYTES, ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class DeviceState:
    """Places in a session's memory, which begins at `base`; `parts` are offsets in it.  A new session clears what is
    recurrent."""

    def __init__(self, base: int) -> None:
        self._arena = Arena(base)
        self.parts = StateParts()

    @property
    def bytes(self) -> int:
        """Of one session."""
        return self._arena.bytes

    def take(self, nbytes: int, *, zeroed: bool) -> int:
        """Reserve memory; return its place."""
        if zeroed:
            self.parts.recurrent.append((self._arena.bytes, nbytes))
        return self._arena.take(nbytes)

    def take_cache(self, positions: int, row_bytes: int) -> int:
        """Reserve keys or values, a row a position."""
        self.parts.streams.append((self._arena.bytes, row_bytes))
        return self._arena.take(positions * row_bytes)


@dataclass(slots=True)
class Memory:
    """The arenas of a recording: shared by the programs of a token and of batches, so they are laid out once.

    Sessions' memory begins at `state_base` where there is one session; where there are several, that is 0 and the
    launches learn each token's from words beside its position.  Rows have room for `batch_tokens` tokens.  Once
    `is_complete`, nothing new may be asked for: the device's buffer ends with what was.
    """

    arena: Arena
    state_base: int
    has_many_states: bool
    kv_type: KvType
    batch_tokens: int
    context_tokens: int
    rows: dict[tuple[str, int, int], DeviceRows] = field(default_factory=dict)
    scratch: dict[str, int] = field(default_factory=dict)
    ropes: dict[int, Rope] = field(default_factory=dict)  # of which a table lies at an address
    constants: dict[int, bytes] = field(default_factory=dict)  # what lies at an address from the start
    is_complete: bool = False

    def row(self, name: str, columns: int, type: int) -> DeviceRows:
        """Rows by name; who asks for the same name, width and form shares them."""
        key = (name, columns, type)
        if key not in self.rows:
            assert not self.is_complete, name
            rows = DeviceRows(0, columns, type)
            rows.address = self.arena.take(rows.stride_bytes * self.batch_tokens)
            self.rows[key] = rows
        return self.rows[key]

    def rope_table(self, rope: Rope, name: str) -> DeviceRows:
        """Float rows, one a position of the context."""
        columns = 2 * len(rope.frequencies)
        address = self.words(name, 4 * columns * self.context_tokens)
        self.ropes[address] = rope
        return DeviceRows(address, columns)

    def constant(self, name: str, data: bytes) -> int:
        """Address of what the host writes once."""
        address = self.words(name, len(data))
        self.constants[address] = data
        return address

    def states(self, name: str) -> int | None:
        """Where the words lie that say where the tokens' sessions are."""
        return self.scratch[name] if self.has_many_states else None

    def words(self, name: str, nbytes: int) -> int:
        """Other device memory by name."""
        if name not in self.scratch:
            assert not self.is_complete, name
            self.scratch[name] = self.arena.take(nbytes)
        return self.scratch[name]
