"""Routing traces: what every token's router picked, what was computed instead, and where that was found.

`--trace FILE` of fomoe-run and fomoe-ppl writes one; :meth:`Trace.load` gives numpy arrays.  The file is

====================  =====================================================================
8 bytes               ``FOMOETRC``
u32, u32              version, bytes of the header
header                JSON, see :class:`TraceHeader`
records               u16 kind, u16 layer, u32 count, then (all little-endian):
kind 1, a batch       count tokens: f32 weights, u16 picks, u16 chosen, i8 found, each [count, used]
kind 2, a warm start  count experts, hottest first: f64 scores [count], u16 experts [count]
====================  =====================================================================

A batch is one record for every layer in turn (csrc/experts/trace.h); a layer's warm start precedes its batches.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.experts.residency import Decay
from fomoe_io.system.files import check_targets, sync_directory

MAGIC, VERSION = b"FOMOETRC", 1
BATCH, SEED = 1, 2
"""Kinds of records (csrc/experts/trace.h)."""

HEADER_LIMIT_BYTES = 16 << 20
MAX_LAYERS, MAX_EXPERTS, MAX_USED = 1 << 14, 1 << 16, 1 << 10
TRACE_AGAIN = "fomoe-ppl MODEL -f TEXT -b 1 --trace FILE"
_HEAD = struct.Struct("<HHI")
_FOUND_KINDS = 4


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What a trace was recorded on.

    Attributes
    ----------
    model, fingerprint : str
        Name, and fingerprint of the weights.
    experts : tuple of int
        Experts of each layer (0: a dense layer).
    used : int
        Experts a token, per layer.
    slots : tuple of (int, int)
        Slots of each layer in VRAM and DRAM.
    policy : str
    decay : Decay
        Of the policy.
    car : str
        Setting of the cache-aware routing.
    expert_bytes : tuple of int
        Bytes read for an expert of each layer.
    """

    model: str
    fingerprint: str
    experts: tuple[int, ...]
    used: int
    slots: tuple[tuple[int, int], ...]
    policy: str
    decay: Decay
    car: str
    expert_bytes: tuple[int, ...]

    def encode(self) -> bytes:
        """The first bytes of a file: magic, version, length, JSON."""
        text = json.dumps(asdict(self), separators=(",", ":")).encode()
        return MAGIC + struct.pack("<II", VERSION, len(text)) + text

    @classmethod
    def decode(cls, text: bytes, path: Path) -> Self:
        """From the JSON of a file.

        Raises
        ------
        FormatError
        """
        try:
            body = json.loads(text)
            header = cls(
                model=str(body["model"]),
                fingerprint=str(body["fingerprint"]),
                experts=_integers(body["experts"], MAX_EXPERTS),
                used=_integers([body["used"]], MAX_USED)[0],
                slots=tuple(_pair(row) for row in body["slots"]),
                policy=str(body["policy"]),
                decay=Decay(*(float(value) for value in body["decay"])),
                car=str(body["car"]),
                expert_bytes=_integers(body["expert_bytes"], 1 << 40),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FormatError(f"{path}: the trace's header is damaged", hint=TRACE_AGAIN) from None
        layers = len(header.experts)
        if not (
            0 < layers <= MAX_LAYERS
            and len(header.slots) == len(header.expert_bytes) == layers
            and 0 < header.used <= max(header.experts)
        ):
            raise FormatError(f"{path}: the trace's header contradicts itself", hint=TRACE_AGAIN)
        return header


def _integers(values: Any, most: int) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v <= most for v in values):
        raise ValueError
    return tuple(values)


def _pair(row: Any) -> tuple[int, int]:
    vram, dram = _integers(row, MAX_EXPERTS)
    return vram, dram


@dataclass(slots=True)
class LayerTrace:
    """All batches of one layer, one after another.

    Attributes
    ----------
    tokens : numpy.ndarray
        int64 [batches]: tokens of each batch; their sum is n.
    picks : numpy.ndarray
        uint16 [n, used]: the router's picks, most probable first.
    weights : numpy.ndarray
        float32 [n, used]: their weights.
    chosen : numpy.ndarray
        uint16 [n, used]: what was computed; differs from the picks under cache-aware routing.
    found : numpy.ndarray or None
        int8 [n, used]: where the chosen ones were found: 0 VRAM, 1 DRAM, 2 NVMe, 3 on the way from NVMe.  The first
        token of a batch that wants an expert finds it where it was, the others where it is computed from.
        None when the trace comes from another program's cache.
    seeds, seed_scores : numpy.ndarray
        uint16 and float64 [m]: the warm start, hottest first.
    """

    tokens: np.ndarray
    picks: np.ndarray
    weights: np.ndarray
    chosen: np.ndarray
    found: np.ndarray | None
    seeds: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    seed_scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.float64))


@dataclass(slots=True)
class Trace:
    """A trace in memory.

    Attributes
    ----------
    header : TraceHeader
    batch_tokens : numpy.ndarray
        int64 [batches]: by how much each batch moves the clock (a layer may have computed fewer of them).
    layers : dict of int to LayerTrace
    """

    header: TraceHeader
    batch_tokens: np.ndarray
    layers: dict[int, LayerTrace]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `--trace` has written.

        Raises
        ------
        FormatError
            When it is no trace, of another version, cut off, or names layers or experts that its header lacks.
        """
        path = Path(path)
        if not path.is_file():
            raise FormatError(f"trace {path} does not exist", hint=TRACE_AGAIN)
        data = np.fromfile(path, np.uint8)
        fixed = len(MAGIC) + 8
        if len(data) < fixed or data[: len(MAGIC)].tobytes() != MAGIC:
            raise FormatError(f"{path} is no routing trace", hint=TRACE_AGAIN)
        version, size = struct.unpack("<II", data[len(MAGIC) : fixed].tobytes())
        if version != VERSION:
            raise FormatError(f"{path} has trace version {version}, this program reads {VERSION}", hint=TRACE_AGAIN)
        if size > min(HEADER_LIMIT_BYTES, len(data) - fixed):
            raise FormatError(f"{path}: the trace's header is cut off", hint=TRACE_AGAIN)
        header = TraceHeader.decode(data[fixed : fixed + size].tobytes(), path)
        return cls(header, *_records(data, fixed + size, header, path))

    @property
    def tokens(self) -> int:
        """Tokens of the longest layer."""
        return int(self.batch_tokens.sum())


def _records(data: np.ndarray, start: int, header: TraceHeader, path: Path) -> tuple[np.ndarray, dict[int, LayerTrace]]:
    table = _walk(data, start, header, path)
    batches = table[table[:, 0] == BATCH]
    if not len(batches):
        raise FormatError(f"{path}: the trace has no tokens", hint=TRACE_AGAIN)
    # a batch goes through the layers in ascending order
    first = np.concatenate(([True], batches[1:, 1] <= batches[:-1, 1]))
    number = np.cumsum(first) - 1
    layers = {}
    for layer in np.unique(batches[:, 1]).tolist():
        mine = batches[:, 1] == layer
        tokens = np.zeros(number[-1] + 1, np.int64)
        tokens[number[mine]] = batches[mine, 2]
        if (tokens > batches[first, 2]).any():
            raise FormatError(f"{path}: layer {layer} computed more tokens than a batch had", hint=TRACE_AGAIN)
        layers[layer] = _layer(data, batches[mine, 3], batches[mine, 2], tokens, header, layer, path)
    for _, layer, count, offset in table[table[:, 0] == SEED].tolist():
        scores = data[offset : offset + 8 * count].view("<f8")
        seeds = data[offset + 8 * count : offset + 10 * count].view("<u2")
        if layer not in layers:
            continue
        if not np.isfinite(scores).all() or seeds.max(initial=0) >= header.experts[layer]:
            raise FormatError(f"{path}: the warm start of layer {layer} is damaged", hint=TRACE_AGAIN)
        layers[layer].seeds, layers[layer].seed_scores = seeds.copy(), scores.copy()
    return batches[first, 2].copy(), layers


def _walk(data: np.ndarray, start: int, header: TraceHeader, path: Path) -> np.ndarray:
    """int64 [records, 4]: kind, layer, count and offset of the payload, each within the file."""
    rows: list[tuple[int, int, int, int]] = []
    size, layers, raw = len(data), len(header.experts), data.data
    unit = {BATCH: header.used * 9, SEED: 10}
    while start < size:
        if start + _HEAD.size > size:
            raise FormatError(f"{path}: the trace ends in the middle of a record", hint=TRACE_AGAIN)
        kind, layer, count = _HEAD.unpack_from(raw, start)
        start += _HEAD.size
        if kind not in unit or layer >= layers or not header.experts[layer] or not count:
            raise FormatError(f"{path}: byte {start - _HEAD.size} of the trace starts no record", hint=TRACE_AGAIN)
        rows.append((kind, layer, count, start))
        start += count * unit[kind]
    if start > size:
        raise FormatError(f"{path}: the trace ends in the middle of a record", hint=TRACE_AGAIN)
    return np.array(rows, np.int64).reshape(-1, 4)


def _layer(
    data: np.ndarray,
    offsets: np.ndarray,
    counts: np.ndarray,
    tokens: np.ndarray,
    header: TraceHeader,
    layer: int,
    path: Path,
) -> LayerTrace:
    n, used = int(counts.sum()), header.used
    starts = np.cumsum(counts) - counts
    columns = [np.empty((n, used), kind) for kind in ("<f4", "<u2", "<u2", "i1")]
    for count in np.unique(counts).tolist():
        # records of one size at a time: bytes [records, size of a column], then rows of the column
        same = counts == count
        at = offsets[same]
        rows = (starts[same][:, None] + np.arange(count)).ravel()
        for column in columns:
            width = count * used * column.itemsize
            column[rows] = data[at[:, None] + np.arange(width)].view(column.dtype).reshape(-1, used)
            at = at + width
    weights, picks, chosen, found = columns
    experts = header.experts[layer]
    if picks.max() >= experts or chosen.max() >= experts:
        raise FormatError(f"{path}: layer {layer} names an expert beyond its {experts}", hint=TRACE_AGAIN)
    if not np.isfinite(weights).all() or found.min() < 0 or found.max() >= _FOUND_KINDS:
        raise FormatError(f"{path}: a record of layer {layer} is damaged", hint=TRACE_AGAIN)
    return LayerTrace(tokens, picks, weights, chosen, found)


def check_trace_target(path: Path) -> None:
    """Refuse a name that no trace can get.

    Raises
    ------
    OSError
    """
    check_targets([path])
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file; a trace replaces what has its name", str(path))


class TraceFile:
    """A trace being written: under a temporary name until :meth:`finish`.

    Parameters
    ----------
    path : Path
    header : TraceHeader

    Raises
    ------
    OSError
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        check_trace_target(path)
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._stream = self._partial.open("wb", buffering=0)
        try:
            self._stream.write(header.encode())
        except BaseException:
            self.discard()
            raise

    @property
    def descriptor(self) -> int:
        """Where records are to be appended."""
        return self._stream.fileno()

    def finish(self, error: int = 0) -> None:
        """Make the file appear under its name; or, after a failed write (a negative errno), remove it.

        Raises
        ------
        OSError
        """
        try:
            if error:
                raise OSError(-error, os.strerror(-error), str(self.path))
            os.fsync(self.descriptor)
            self._partial.replace(self.path)
            sync_directory(self.path.parent)
        except BaseException:
            self.discard()
            raise
        self._stream.close()

    def leave(self) -> None:
        """Close a copy of the file that another process goes on writing."""
        self._stream.close()

    def discard(self) -> None:
        """Leave nothing behind; what has the file's name stays."""
        self._stream.close()
        with contextlib.suppress(OSError):
            self._partial.unlink()


def expert_counts(trace: Trace) -> dict[int, np.ndarray]:
    """How often each expert was picked: layer -> int64 [experts]."""
    return {
        number: np.bincount(layer.picks.ravel(), minlength=trace.header.experts[number])
        for number, layer in trace.layers.items()
    }
