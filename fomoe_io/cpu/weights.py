"""The resident weights: everything but the routed experts, read once into huge-page memory.

Each tensor is read with O_DIRECT into an aligned window, so nothing is copied and the page cache keeps no
second copy of what the process holds anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import gguf
import numpy as np

from fomoe_io._cpu import Kernels, Matrix
from fomoe_io.errors import FormatError
from fomoe_io.models.tensors import EMBEDDING, OUTPUT, checked
from fomoe_io.storage.reader import Memory, Reader, ReadRequest, aligned_memory
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES, aligned_window

if TYPE_CHECKING:
    from fomoe_io.storage.gguf import TensorInfo

PIECE_BYTES = 128 << 20
"""Read at once, at least: then it is told how much is there."""


def _pieces(requests: list[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Few enough for a drive never to wait between them, many enough to show how far they are."""
    piece: list[ReadRequest] = []
    for request in requests:
        piece.append(request)
        if sum(size for *_, size in piece) >= PIECE_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece


class Weights:
    """Resident tensors by name, as matrices and vectors for the recorder.

    Parameters
    ----------
    tensors : mapping of str to TensorInfo
        What to load; the token embedding is left on disk unless it is also the output matrix.
    kernels : Kernels
        What they are multiplied with.
    float_activations : bool
        Matrices expand their rows to float32 instead of quantizing activations.
    block_bytes : int
        What reads are multiples of (`Reader.block_bytes`).
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        kernels: Kernels,
        *,
        float_activations: bool,
        block_bytes: int = LEAST_BLOCK_BYTES,
    ) -> None:
        self._tensors = tensors
        self._kernels = kernels
        self._loaded = False
        self._float_activations = float_activations
        self._vectors: dict[str, np.ndarray] = {}
        self._addresses: dict[str, int] = {}
        self.tied = OUTPUT not in tensors
        loaded = [t for t in tensors.values() if self.tied or t.name != EMBEDDING]
        self._requests: list[ReadRequest] = []
        windows = [(t, *aligned_window(t.offset, t.bytes, block_bytes)) for t in loaded]
        self.bytes = sum(size for _, _, size in windows)
        # address space alone: memory is taken when load() fills it
        self._memory: Memory = aligned_memory(max(self.bytes, LEAST_BLOCK_BYTES))
        place = self._memory.address
        for tensor, start, size in windows:
            self._addresses[tensor.name] = place + tensor.offset - start
            self._requests.append((tensor.file, start, place, size))
            place += size

    def load(self, reader: Reader, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Read everything; before that, matrices have addresses and vectors are zeros."""
        done = 0
        for piece in _pieces(self._requests):
            if progress is not None:
                progress("weights", done, self.bytes)
            reader.read_into(piece)
            done += sum(request[3] for request in piece)
        if progress is not None:
            progress("weights", self.bytes, self.bytes)
        self._loaded = True

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise FormatError(f"the model has no tensor {name}, which its architecture needs")
        return self._tensors[name]

    def _check_type(self, tensor: TensorInfo) -> None:
        if self._kernels.type_info(int(tensor.type)) is None:
            raise FormatError(
                f"{tensor.name} has type {gguf.GGMLQuantizationType(tensor.type).name}, "
                "which the CPU kernels in use do not know",
                hint="pip install libggml-python (its kernels know every GGUF type), or another quantization",
            )

    def matrix(self, name: str, columns: int, rows: int, part: slice | None = None, groups: int = 1) -> Matrix:
        """A [rows, columns] weight matrix, or the rows of a `part` of it; FormatError when the file's shape differs."""
        tensor = checked(self._info(name), (columns, rows // groups, groups))
        self._check_type(tensor)
        part = part or slice(0, rows)
        address = self._addresses[name] + part.start * (tensor.bytes // rows)
        count = part.stop - part.start
        return Matrix(self._kernels, address, int(tensor.type), count, columns, self._float_activations, self._memory)

    def embedding(self, columns: int, rows: int) -> tuple[Matrix, int, int]:
        """(matrix, file, offset): in memory when tied to the output (file -1), else read a row at a time."""
        tensor = self._info(EMBEDDING)
        if self.tied:
            return self.matrix(EMBEDDING, columns, rows), -1, 0
        self._check_type(checked(tensor, (columns, rows)))
        return Matrix(self._kernels, 0, int(tensor.type), rows, columns, False, None), tensor.file, tensor.offset

    def vector(self, name: str, shape: tuple[int, ...], part: slice | None = None) -> np.ndarray:
        """A small tensor of any type, or a `part` of it, as contiguous float32; FormatError when its shape differs."""
        if name not in self._vectors:
            tensor = checked(self._info(name), shape)
            if not self._loaded:
                return np.zeros(math.prod(shape), np.float32)[part or slice(None)]
            view = self._memory.view[self._addresses[name] - self._memory.address :][: tensor.bytes]
            raw = np.frombuffer(view, np.uint8)
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(tensor.type))
            self._vectors[name] = np.array(values, np.float32).reshape(-1)
        return self._vectors[name][part or slice(None)]

    def close(self) -> None:
        """Give the memory back."""
        self._vectors.clear()
        self._memory.close()
