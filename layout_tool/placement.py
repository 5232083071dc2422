"""Where everything of a model goes in a packed store.  Pure arithmetic: nothing is read or written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fomoe_io.storage.expert_layers import BYTES, FILE, OFFSET, ExpertLayer
from fomoe_io.storage.gguf import TensorInfo
from fomoe_io.storage.manifest import VERSION
from fomoe_io.storage.placement import RESIDENT_FILE, hottest_first, record_places, resident_places
from fomoe_io.storage.store import Store

CHUNK_BYTES = 8 << 20
"""Written at once: large enough for any drive's bandwidth, small enough that a few threads need little memory."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A data file of the store: in which target, its name and its size."""

    target: int
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """A packed store before it is written.

    Attributes
    ----------
    store_id : str
        Follows from the model, the order of the experts and the striping: the same pack again has the same one.
    files : tuple of PlannedFile
        resident.bin, then one file of experts a target.
    resident : tuple of TensorInfo
        As they will lie in the store.
    experts : dict of int to ExpertLayer
        Extents as they will be in the store.
    order : dict of int to numpy.ndarray
        Expert ids of each layer, hottest first.
    weights : tuple of int
        Records each target gets in turn.
    """

    store_id: str
    files: tuple[PlannedFile, ...]
    resident: tuple[TensorInfo, ...]
    experts: dict[int, ExpertLayer]
    order: dict[int, np.ndarray]
    weights: tuple[int, ...]

    def target_bytes(self, target: int) -> int:
        """Bytes of the data files in one target."""
        return sum(file.bytes for file in self.files if file.target == target)


@dataclass(frozen=True, slots=True)
class Run:
    """Records of one layer that follow one another in a file: what is written at once."""

    layer: int
    experts: np.ndarray
    file: int
    offset: int
    record_bytes: int

    @property
    def bytes(self) -> int:
        """Of all its records."""
        return len(self.experts) * self.record_bytes


def place(source: Store, frequencies: Mapping[int, np.ndarray], weights: Sequence[int]) -> Placement:
    """Place a model's tensors.

    Parameters
    ----------
    source : Store
        The model, in place.
    frequencies : mapping of int to numpy.ndarray
        Layer -> float64 [experts]; layers without one keep the order of their ids.
    weights : sequence of int
        Records each target gets in turn; their number is the number of targets.
    """
    tensors = sorted(source.resident.values(), key=lambda t: (t.file, t.offset))
    offsets, resident_end = resident_places([tensor.bytes for tensor in tensors])
    resident = [
        replace(tensor, file=RESIDENT_FILE, offset=offset) for tensor, offset in zip(tensors, offsets, strict=True)
    ]
    layers = sorted(source.experts.items())
    order = {number: hottest_first(layer.n_experts, frequencies.get(number)) for number, layer in layers}
    places, ends = record_places([(layer.record_bytes, order[number]) for number, layer in layers], weights)
    experts = {}
    for (number, layer), place in zip(layers, places, strict=True):
        extents = layer.extents.copy()
        sizes = layer.extents[0, :, BYTES]
        extents[:, :, FILE] = place[:, :1]
        extents[:, :, OFFSET] = place[:, 1:] + np.cumsum(sizes) - sizes
        experts[number] = replace(layer, extents=extents, frequency=frequencies.get(number))
    files = [PlannedFile(0, "resident.bin", resident_end)]
    files += [PlannedFile(target, f"experts-{target:02d}.bin", end) for target, end in enumerate(ends)]
    store_id = _store_id(source.fingerprint, order, frequencies, weights)
    return Placement(store_id, tuple(files), tuple(resident), experts, order, tuple(weights))


def _store_id(
    fingerprint: str, order: Mapping[int, np.ndarray], frequencies: Mapping[int, np.ndarray], weights: Sequence[int]
) -> str:
    digest = hashlib.sha256(f"{VERSION} {fingerprint} {list(weights)}".encode())
    for layer, ids in sorted(order.items()):
        digest.update(np.ascontiguousarray(ids, "<i8").tobytes())
        if layer in frequencies:
            digest.update(np.ascontiguousarray(frequencies[layer], "<f8").tobytes())
    return digest.hexdigest()[:32]


def runs(layer: ExpertLayer, limit_bytes: int = CHUNK_BYTES) -> Iterator[Run]:
    """Split the records of a packed layer into runs of at most `limit_bytes`, in file order."""
    file, offset = layer.extents[:, 0, FILE], layer.extents[:, 0, OFFSET]
    by_place = np.lexsort((offset, file))
    most = max(1, limit_bytes // layer.record_bytes)
    first = 0
    for last in range(1, len(by_place) + 1):
        if last < len(by_place) and last - first < most:
            here, previous = by_place[last], by_place[last - 1]
            if file[here] == file[previous] and offset[here] == offset[previous] + layer.record_bytes:
                continue
        ids = by_place[first:last]
        yield Run(layer.layer, ids, int(file[ids[0]]), int(offset[ids[0]]), layer.record_bytes)
        first = last
