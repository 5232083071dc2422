"""Where a manifest says that tensors and experts lie: checked against their sizes, their files and the layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np

from fomoe_io.storage.expert_layers import (
    BYTES,
    FILE,
    MAX_EXPERTS,
    OFFSET,
    ExpertLayer,
    ExpertPart,
    experts_of,
    resident_tensors,
)
from fomoe_io.storage.gguf import GGUFFile, TensorInfo, tensor_bytes
from fomoe_io.storage.manifest import PAGE_BYTES, PART_NAMES, Fields, checksum
from fomoe_io.storage.placement import RESIDENT_FILE, hottest_first, record_places, resident_places


def _kind(fields: Fields) -> gguf.GGMLQuantizationType:
    name = fields.text("type")
    if name not in gguf.GGMLQuantizationType.__members__:
        raise fields.error(f"type {name!r} is unknown; update package gguf: pip install -U gguf")
    return gguf.GGMLQuantizationType[name]


def _shaped(fields: Fields, dimensions: range) -> tuple[gguf.GGMLQuantizationType, tuple[int, ...], int]:
    """(type, shape, bytes), consistent with one another."""
    kind, size = _kind(fields), fields.integer("bytes", 1)
    shape = tuple(int(extent) for extent in fields.integers("shape"))
    if len(shape) not in dimensions or min(shape) < 1:
        raise fields.error(f"shape is {list(shape)}")
    try:
        consistent = tensor_bytes(kind, shape) == size
    except ValueError:
        consistent = False
    if not consistent:
        raise fields.error(f"{size} bytes do not fit type {kind.name} and shape {list(shape)}")
    return kind, shape, size


def resident_of(manifest: Fields, sizes: list[int]) -> tuple[dict[str, TensorInfo], dict[str, int] | None]:
    """The resident tensors, each inside its file, and their checksums when all of them have one."""
    tensors: dict[str, TensorInfo] = {}
    sums: dict[str, int] = {}
    for fields in manifest.objects("resident"):
        name = fields.text("name")
        kind, shape, size = _shaped(fields, range(1, 5))
        file = fields.integer("file", 0, len(sizes) - 1)
        offset = fields.integer("offset", 0, sizes[file] - size)
        if name in tensors:
            raise fields.error(f"tensor {name} occurs twice")
        tensors[name] = TensorInfo(name, kind, shape, file, offset, size)
        if fields.optional("xxh3_64"):
            sums[name] = int(fields.text("xxh3_64", "[0-9a-f]{16}"), 16)
    return tensors, sums if len(sums) == len(tensors) else None


def layer_of(fields: Fields, sizes: list[int], kind: str) -> ExpertLayer:
    """The experts of one layer, each inside its file."""
    n_experts = fields.integer("experts", 1, MAX_EXPERTS)
    found = fields.objects("parts")
    if [part.text("name") for part in found] != list(PART_NAMES):
        raise fields.error("parts are not gate, up, down")
    file_bytes = np.array(sizes, np.int64)
    extents = np.zeros((n_experts, 3, 3), np.int64)
    parts = []
    for i, part in enumerate(found):
        type_, shape, size = _shaped(part, range(2, 3))
        parts.append(ExpertPart(PART_NAMES[i], int(type_), (shape[0], shape[1]), size))
        file, offset = part.integers("file", n_experts), part.integers("offset", n_experts)
        if file.min() < 0 or file.max() >= len(sizes):
            raise part.error(f"names a file beyond the {len(sizes)} of the store")
        if offset.min() < 0 or (offset > file_bytes[file] - size).any():
            raise part.error("an expert lies outside its file")
        extents[:, i, FILE], extents[:, i, OFFSET], extents[:, i, BYTES] = file, offset, size
    layer = ExpertLayer(
        fields.integer("layer", 0, 1 << 16),
        n_experts,
        (parts[0], parts[1], parts[2]),
        extents,
        fields.checksums("xxh3_64", n_experts) if fields.optional("xxh3_64") else None,
        fields.numbers("picks_per_token", n_experts) if fields.optional("picks_per_token") else None,
    )
    if kind == "packed":
        _check_records(fields, layer)
    return layer


def _check_records(fields: Fields, layer: ExpertLayer) -> None:
    """Records of a packed store start on a page, their parts follow one another."""
    file, offset, size = (layer.extents[:, :, column] for column in (FILE, OFFSET, BYTES))
    contiguous = (offset[:, 1:] == offset[:, :-1] + size[:, :-1]).all() and (file == file[:, :1]).all()
    if not contiguous or (offset[:, 0] % PAGE_BYTES).any():
        raise fields.error("a record does not start on a page, or its parts do not follow one another")


def check_disjoint(manifest: Fields, resident: Iterable[TensorInfo], layers: list[ExpertLayer]) -> None:
    """Nothing of a packed store lies on something else."""
    rows = [[t.file, t.offset, t.bytes] for t in resident]
    for layer in layers:
        records = layer.extents[:, 0].copy()
        records[:, BYTES] = layer.expert_bytes
        rows += records.tolist()
    table = np.array(rows, np.int64)
    table = table[np.lexsort((table[:, OFFSET], table[:, FILE]))]
    ends = table[:, OFFSET] + table[:, BYTES]
    same = table[1:, FILE] == table[:-1, FILE]
    if (same & (table[1:, OFFSET] < ends[:-1])).any() or (table[:, OFFSET] < PAGE_BYTES).any():
        raise manifest.error("records or tensors overlap")


def check_packed_places(
    manifest: Fields, sizes: list[int], resident: Iterable[TensorInfo], layers: Iterable[ExpertLayer]
) -> None:
    """Tensors and records lie where `fomoe-layout pack` puts those of this order and striping, and fill their files.

    An extent of another place would be read, and computed with, as well as the right one.
    """
    resident = list(resident)
    offsets, end = resident_places([tensor.bytes for tensor in resident])
    if [(t.file, t.offset) for t in resident] != [(RESIDENT_FILE, offset) for offset in offsets] or sizes[0] != end:
        raise manifest.error("resident: tensors do not follow one another in the first file")
    if not manifest.optional("weights"):
        return  # written before the striping was
    weights = manifest.integers("weights", len(sizes) - 1).tolist()
    if min(weights, default=0) < 1:
        raise manifest.error(f"weights is {weights}, expected a positive number for each file of experts")
    by_number = sorted(layers, key=lambda layer: layer.layer)
    order = [(layer.record_bytes, hottest_first(layer.n_experts, layer.frequency)) for layer in by_number]
    places, ends = record_places(order, weights)
    for layer, place in zip(by_number, places, strict=True):
        if not np.array_equal(layer.extents[:, 0, :BYTES], place):
            raise manifest.error(f"experts: layer {layer.layer} has a record where its layout has none")
    if sizes[1:] != ends:
        raise manifest.error(f"files: experts take {ends} bytes, but the files have {sizes[1:]}")


def check_source_places(
    manifest: Fields, paths: list[Path], resident: Mapping[str, TensorInfo], layers: Mapping[int, ExpertLayer]
) -> None:
    """What an in-place store points at is what the GGUF says itself."""
    source = GGUFFile.open(paths[0])
    if source.paths != paths or checksum(source.metadata_bytes()) != manifest.object("metadata").text("xxh3_64"):
        raise manifest.error("files, or metadata, are not those of the GGUF")
    if resident != resident_tensors(source):
        raise manifest.error("resident: these are not the tensors of the GGUF")
    experts = experts_of(source)
    if set(experts) != set(layers):
        raise manifest.error("experts: these are not the layers of the GGUF")
    for number, layer in layers.items():
        theirs = experts[number]
        if theirs.parts != layer.parts or not np.array_equal(theirs.extents, layer.extents):
            raise manifest.error(f"experts: layer {number} does not lie where the GGUF has it")
