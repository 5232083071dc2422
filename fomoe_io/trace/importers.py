"""Routing traces of other programs.

BigMoeOnEdge writes ``route_trace v1``: comma-separated ``turn,phase,step,layer,slot,expert,weight,residency,
expert_bytes``, one row for every pick, after comment lines that give the model's shape.  Phase 0 is the prompt (one
batch), phase 1 decoding; the last layer may have computed the prompt's last token only.  `residency` is that of its own
cache and is left out.  The co-activation files of mbolt hold sums over a whole run, not its sequence: no trace.
"""

from __future__ import annotations

import lzma
import re
from pathlib import Path

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.experts.residency import DECAY
from fomoe_io.trace.trace import MAGIC, MAX_EXPERTS, MAX_LAYERS, MAX_USED, LayerTrace, Trace, TraceHeader

ROUTE_TRACE = b"# route_trace v1"
XZ_MAGIC = b"\xfd7zXZ\0"
LIMIT_BYTES = 1 << 30
"""Of the text; 64 decoded tokens of a 36-layer model take 0.5 MB."""
MOST_NUMBER = 1 << 53
"""Of turns, steps and ids: beyond, a float64 is no whole number, and NaN is beyond, too."""

_SHAPE = re.compile(r"# model=(\S+).* n_layer=(\d{1,5}) n_expert=(\d{1,5}) n_expert_used=(\d{1,4})")
_EXPERT_BYTES = re.compile(r"# layer=(\d{1,5}) expert_bytes=(\d{1,12})\b")
_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


def open_trace(path: str | Path) -> Trace:
    """A trace of our own or a BigMoeOnEdge one (also xz-compressed), told apart by how the file starts.

    Raises
    ------
    FormatError
    """
    path = Path(path)
    if not path.is_file():
        return Trace.load(path)
    with path.open("rb") as stream:
        start = stream.read(len(ROUTE_TRACE))
    if start.startswith(MAGIC) or not (start == ROUTE_TRACE or start.startswith(XZ_MAGIC)):
        return Trace.load(path)
    return _of_route_trace(_text(path, compressed=start.startswith(XZ_MAGIC)), path)


def _text(path: Path, *, compressed: bool) -> str:
    try:
        with lzma.open(path) if compressed else path.open("rb") as stream:
            data = stream.read(LIMIT_BYTES + 1)
    except (lzma.LZMAError, EOFError):
        raise FormatError(f"{path}: the xz file is damaged or cut off") from None
    if len(data) > LIMIT_BYTES:
        raise FormatError(f"{path}: more than {LIMIT_BYTES:,} bytes of text are no route_trace")
    return data.decode("utf-8", errors="replace")


def _header(lines: list[str], path: Path) -> TraceHeader:
    shape = next((match for line in lines if (match := _SHAPE.match(line))), None)
    if shape is None:
        raise FormatError(f"{path}: no line '# model=... n_layer= n_expert= n_expert_used=' (not a route_trace?)")
    layers, experts, used = (int(value) for value in shape.groups()[1:])
    if not (0 < layers <= MAX_LAYERS and 0 < experts <= MAX_EXPERTS and 0 < used <= min(experts, MAX_USED)):
        raise FormatError(f"{path}: {layers} layers of {experts} experts, {used} a token, make no sense")
    sizes = [0] * layers
    for line in lines:
        match = _EXPERT_BYTES.match(line)
        if match and int(match[1]) < layers:
            sizes[int(match[1])] = int(match[2])
    return TraceHeader(
        model=Path(shape[1]).name,
        fingerprint="",
        experts=(experts,) * layers,
        used=used,
        slots=((0, 0),) * layers,
        policy="",
        decay=DECAY,
        car="",
        expert_bytes=tuple(sizes),
    )


def _of_route_trace(text: str, path: Path) -> Trace:
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    header = _header(comments, path)
    rows = [line for line in lines if line and not line.startswith("#")]
    if not rows or rows[0] != _COLUMNS:
        raise FormatError(f"{path}: the columns are not {_COLUMNS}")
    try:
        table = np.array([line.split(",") for line in rows[1:]], np.float64).reshape(-1, 9)
    except ValueError:
        raise FormatError(f"{path}: a row does not have nine numbers (cut off?)") from None
    if not (np.abs(table[:, :6]) < MOST_NUMBER).all():
        raise FormatError(f"{path}: a row has a number that counts nothing")
    ids = table[:, :6].astype(np.int64)
    turn, phase, step, layer, slot, expert = ids.T
    limits = ((layer, len(header.experts)), (slot, header.used), (expert, header.experts[0]), (phase, 2))
    if not len(table) or not np.isfinite(table).all() or any((v < 0).any() or (v >= n).any() for v, n in limits):
        raise FormatError(f"{path}: a row names a layer, rank or expert that the header lacks")
    # a turn's prompt is one batch, then every step is one
    _, batch = np.unique(np.stack([turn, phase, step * phase]), axis=1, return_inverse=True)
    order = np.lexsort((slot, step, layer, batch.ravel()))
    return _trace(header, table[order, 6], ids[order], batch.ravel()[order], path)


def _trace(header: TraceHeader, weights: np.ndarray, ids: np.ndarray, batch: np.ndarray, path: Path) -> Trace:
    layers, batches = {}, int(batch.max()) + 1
    for number in np.unique(ids[:, 3]).tolist():
        mine = np.flatnonzero(ids[:, 3] == number)
        slots = ids[mine, 4].reshape(-1, header.used) if len(mine) % header.used == 0 else None
        if slots is None or (slots != np.arange(header.used)).any():
            raise FormatError(f"{path}: a token of layer {number} does not have {header.used} picks")
        picks = ids[mine, 5].reshape(-1, header.used).astype(np.uint16)
        tokens = np.bincount(batch[mine][:: header.used], minlength=batches)
        rows = weights[mine].reshape(-1, header.used).astype(np.float32)
        layers[int(number)] = LayerTrace(tokens, picks, rows, picks, None)
    batch_tokens = np.max([layer.tokens for layer in layers.values()], axis=0)
    return Trace(header, batch_tokens, layers)
