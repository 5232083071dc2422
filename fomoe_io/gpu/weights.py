"""The resident weights in device memory, read with O_DIRECT piece by piece: the host keeps no copy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf
import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import WHOLE, Arena, DeviceMatrix, EmbeddingTable, Part
from fomoe_io.models.tensors import EMBEDDING, OUTPUT, checked
from fomoe_io.storage.reader import Memory, Reader, aligned_memory
from fomoe_io.system.direct_io import aligned_window

if TYPE_CHECKING:
    from fomoe_io.gpu.device import Gpu
    from fomoe_io.storage.gguf import TensorInfo

PIECE_BYTES = 16 << 20
"""Read and copied at once; two of them overlap."""


def kernel_of(type: int) -> str | None:
    """Name of a ggml type's kernels, None when there are none."""
    name = gguf.GGMLQuantizationType(type).name.lower()
    return name if name in kernels.STORED_TYPES else None


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that has its place.

    Attributes
    ----------
    is_expanded : the host makes floats of it
    planes : the format that the device puts in order (gpu/kernels/planes.h), None where all stays as it is in the file
    """

    tensor: TensorInfo
    address: int
    is_expanded: bool
    planes: str | None = None


class DeviceWeights:
    """Resident tensors by name, for the recorder; the interface is that of a :class:`WeightSource`.

    Parameters
    ----------
    tensors : mapping of str to TensorInfo
    arena : Arena
        Where they go; every tensor that is asked for takes its place once.
    part : Part
        What this device computes: tensors of other layers have no place.

    Attributes
    ----------
    planned : dict of str to Planned
        Those that have been asked for.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], arena: Arena, part: Part = WHOLE) -> None:
        self._tensors, self._arena, self._part = tensors, arena, part
        self.planned: dict[str, Planned] = {}
        self.tied = OUTPUT not in tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise FormatError(f"the model has no tensor {name}, which its architecture needs")
        return self._tensors[name]

    def _place(self, tensor: TensorInfo, *, is_expanded: bool, planes: str | None = None) -> int:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if not (self._part.has(int(layer[1])) if layer else self._part.is_last):
            return 0
        if tensor.name not in self.planned:
            size = 4 * int(np.prod(tensor.shape)) if is_expanded else tensor.bytes
            self.planned[tensor.name] = Planned(tensor, self._arena.take(size), is_expanded, planes)
        return self.planned[tensor.name].address

    def matrix(self, name: str, columns: int, rows: int, part: slice | None = None, groups: int = 1) -> DeviceMatrix:
        """A [rows, columns] weight matrix or a `part` of its rows, as floats where no kernel takes its type.

        Raises
        ------
        FormatError
            The file's shape differs, or no kernel takes rows of that length.
        """
        tensor = checked(self._info(name), (columns, rows // groups, groups))
        if columns % 32:
            raise FormatError(
                f"{name} has rows of {columns}; the GPU kernels take multiples of 32", hint="--device cpu"
            )
        stored = kernel_of(int(tensor.type))
        row_bytes = tensor.bytes // rows if stored else 4 * columns
        part = part or slice(0, rows)
        planes = stored if stored and kernels.has_planes(stored, columns) else None
        address = self._place(tensor, is_expanded=stored is None, planes=planes) + part.start * row_bytes
        kernel = kernels.PLANES[planes] if planes else stored or "f32"
        return DeviceMatrix(address, kernel, part.stop - part.start, columns)

    def vector(self, name: str, shape: tuple[int, ...], part: slice | None = None) -> int:
        """Address of a small tensor, or of a `part` of it, as float32 elements."""
        tensor = checked(self._info(name), shape)
        return self._place(tensor, is_expanded=True) + 4 * (part.start if part else 0)

    def embedding(self, columns: int, rows: int) -> tuple[EmbeddingTable, int, int]:
        """(table, file, offset): rows are read from the file, tied to the output or not."""
        tensor = checked(self._info(EMBEDDING), (columns, rows))
        kernel, file_row_bytes = kernel_of(int(tensor.type)), tensor.bytes // rows
        row_bytes = file_row_bytes if kernel else 4 * columns
        return (
            EmbeddingTable(kernel or "f32", int(tensor.type), columns, row_bytes, file_row_bytes),
            tensor.file,
            tensor.offset,
        )


def load_weights(
    targets: Sequence[tuple[DeviceWeights, Gpu]],
    reader: Reader,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Read everything that was asked for, once, and copy it to each device; all have asked for the same."""
    asked = [list(weights.planned.values()) for weights, _ in targets]
    done, total = 0, sum(planned.tensor.bytes for planned in asked[0])
    staging = [aligned_memory(PIECE_BYTES + 2 * reader.block_bytes) for _ in range(2)]
    registrations = [targets[0][1].register(np.frombuffer(memory.view, np.uint8)) for memory in staging]
    try:
        for everywhere in zip(*asked, strict=True):
            if progress is not None:
                progress("weights", done, total)
            tensor, is_expanded, planes = everywhere[0].tensor, everywhere[0].is_expanded, everywhere[0].planes
            done += tensor.bytes
            places = [(gpu, planned.address) for planned, (_, gpu) in zip(everywhere, targets, strict=True)]
            if is_expanded:
                _load_expanded(tensor, places, reader)
            else:
                _load_pieces(tensor, places, reader, staging)
            if planes is not None:
                _to_planes(planes, tensor.bytes, places)
    finally:
        _synchronize(gpu for _, gpu in targets)
        for registration in registrations:
            registration.close()
        for memory in staging:
            memory.close()


def _synchronize(gpus: Iterable[Gpu]) -> None:
    for gpu in gpus:
        gpu.stream.synchronize()


def _load_pieces(tensor: TensorInfo, places: Sequence[tuple[Gpu, int]], reader: Reader, staging: list[Memory]) -> None:
    for i, first in enumerate(range(0, tensor.bytes, PIECE_BYTES)):
        size = min(PIECE_BYTES, tensor.bytes - first)
        memory = staging[i % 2]
        if i >= len(staging):
            _synchronize(gpu for gpu, _ in places)  # the copies out of this half may still run
        start, window = aligned_window(tensor.offset + first, size, reader.block_bytes)
        reader.read_into([(tensor.file, start, memory.address, window)])
        for gpu, address in places:
            gpu.stream.copy_in(address + first, memory.address + tensor.offset + first - start, size)
    _synchronize(gpu for gpu, _ in places)


def _to_planes(name: str, nbytes: int, places: Sequence[tuple[Gpu, int]]) -> None:
    for gpu, address in places:
        gpu.prepare(f"to_planes_{name}", kernels.to_planes_grid(name, nbytes), address).run(gpu.stream)


def _load_expanded(tensor: TensorInfo, places: Sequence[tuple[Gpu, int]], reader: Reader) -> None:
    start, window = aligned_window(tensor.offset, tensor.bytes, reader.block_bytes)
    memory = aligned_memory(window)
    reader.read_into([(tensor.file, start, memory.address, window)])
    skip = tensor.offset - start
    raw = np.frombuffer(memory.view[skip : skip + tensor.bytes], np.uint8)
    values = np.array(gguf.quants.dequantize(raw, tensor.type), np.float32).reshape(-1)
    del raw
    memory.close()
    for gpu, address in places:
        gpu.stream.copy_in(address, values.ctypes.data, values.nbytes)
    _synchronize(gpu for gpu, _ in places)
