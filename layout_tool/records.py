"""Reading whole experts and tensors of any store, with their checksums: what pack, index and verify share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import xxhash

from fomoe_io.cli.common import note
from fomoe_io.storage.expert_layers import BYTES, FILE, OFFSET, ExpertLayer
from fomoe_io.storage.gguf import TensorInfo
from layout_tool.direct import DirectFile, Piece, buffered_notes, gather
from layout_tool.placement import CHUNK_BYTES
from layout_tool.workers import Buffers


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[DirectFile]]:
    """All files open for direct reading; a note on stderr says where that does not work."""
    with ExitStack() as stack:
        files = [stack.enter_context(DirectFile(path)) for path in paths]
        for text in buffered_notes(files):
            note(text)
        yield files


def buffer_bytes(layers: Sequence[ExpertLayer]) -> int:
    """A thread's buffer: a chunk, or the largest record."""
    return max(CHUNK_BYTES, *(layer.record_bytes for layer in layers))


def read_records(
    files: Sequence[DirectFile], layer: ExpertLayer, experts: np.ndarray, buffers: Buffers
) -> tuple[np.ndarray, list[str]]:
    """Read experts as records, one after another into `buffers.out`.

    Returns
    -------
    tuple
        The view of all records, padding zeroed, and the checksum of each.
    """
    view = buffers.out[: len(experts) * layer.record_bytes]
    pieces = []
    for row, extents in enumerate(layer.extents[experts].tolist()):
        place = row * layer.record_bytes
        for extent in extents:
            pieces.append(Piece(extent[FILE], extent[OFFSET], extent[BYTES], place))
            place += extent[BYTES]
    gather(files, pieces, buffers.scratch, view)
    records = view.reshape(len(experts), layer.record_bytes)
    records[:, layer.expert_bytes :] = 0
    return view, [xxhash.xxh3_64_hexdigest(record[: layer.expert_bytes].data) for record in records]


def read_tensor(
    files: Sequence[DirectFile],
    tensor: TensorInfo,
    buffers: Buffers,
    each: Callable[[int, np.ndarray], None] | None = None,
) -> str:
    """Read a tensor chunk by chunk, hand each to `each(offset in the tensor, bytes)` and return its checksum."""
    digest = xxhash.xxh3_64()
    for at in range(0, tensor.bytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, tensor.bytes - at)
        gather(files, [Piece(tensor.file, tensor.offset + at, size, 0)], buffers.scratch, buffers.out)
        digest.update(buffers.out[:size].data)
        if each is not None:
            each(at, buffers.out[:size])
    return digest.hexdigest()
