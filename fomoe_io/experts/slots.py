"""From the store's extents to slots: what is read for an expert, where it lands, how many slots memory holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType

from fomoe_io.storage.gguf import tensor_bytes
from fomoe_io.system.direct_io import LEAST_BLOCK_BYTES

if TYPE_CHECKING:
    from fomoe_io.storage.expert_layers import ExpertLayer

EXTENT = np.dtype(
    [("offset", "<u8"), ("bytes", "<u4"), ("slot_offset", "<u4"), ("file", "<i4"), ("unused", "<i4")], align=True
)
"""csrc/experts/expert_reads.h, fomoe_extent."""

PARTS = 3


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """How the experts of one layer lie in slots.

    Attributes
    ----------
    extents : numpy.ndarray
        EXTENT records [experts, 3]; the first `extent_count[e]` are used.
    extent_count : numpy.ndarray
        int32 [experts]
    part_offset : numpy.ndarray
        uint32 [experts, 3]: where gate, up and down start in the slot.
    slot_bytes : int
    """

    extents: np.ndarray
    extent_count: np.ndarray
    part_offset: np.ndarray
    slot_bytes: int


def slot_layout(layer: ExpertLayer, block_bytes: int = LEAST_BLOCK_BYTES) -> SlotLayout:
    """Join the parts of each expert that are neighbours on disk into aligned reads.

    A packed record becomes one read; an expert of an in-place store up to three, each with the rest of its
    first and last block of `block_bytes`, what direct reads are multiples of.
    """
    file, offset, size = (layer.extents[:, :, i] for i in range(3))
    experts = len(file)
    start = offset // block_bytes * block_bytes
    end = -(-(offset + size) // block_bytes) * block_bytes
    extents = np.zeros((experts, PARTS), EXTENT)
    extent_count = np.zeros(experts, np.int32)
    part_offset = np.zeros((experts, PARTS), np.uint32)
    used_bytes = np.zeros(experts, np.int64)
    rows = np.arange(experts)
    for part in range(PARTS):
        if part:
            last = extent_count - 1
            previous = extents[rows, last]
            previous_end = previous["offset"] + previous["bytes"]
            joined = (
                (previous["file"] == file[:, part])
                & (start[:, part] <= previous_end)
                & (start[:, part] >= previous["offset"])
            )
        else:
            joined = np.zeros(experts, bool)
        fresh, j = rows[~joined], rows[joined]
        extents["file"][fresh, extent_count[fresh]] = file[fresh, part]
        extents["offset"][fresh, extent_count[fresh]] = start[fresh, part]
        extents["bytes"][fresh, extent_count[fresh]] = end[fresh, part] - start[fresh, part]
        extents["slot_offset"][fresh, extent_count[fresh]] = used_bytes[fresh]
        part_offset[fresh, part] = used_bytes[fresh] + offset[fresh, part] - start[fresh, part]
        used_bytes[fresh] += end[fresh, part] - start[fresh, part]
        extent_count[fresh] += 1
        if len(j):
            last = extent_count[j] - 1
            base = extents["offset"][j, last].astype(np.int64)
            size_now = np.maximum(extents["bytes"][j, last].astype(np.int64), end[j, part] - base)
            used_bytes[j] += size_now - extents["bytes"][j, last]
            extents["bytes"][j, last] = size_now
            part_offset[j, part] = extents["slot_offset"][j, last] + offset[j, part] - base
    return SlotLayout(extents, extent_count, part_offset, int(used_bytes.max()))


def share_slots(slot_bytes: Mapping[int, int], experts: int, pool_bytes: int, least: int) -> dict[int, int] | None:
    """Slots of each layer that fit in `pool_bytes`: equal counts, one more for the first layers while it fits.

    Parameters
    ----------
    slot_bytes : mapping of int to int
        Of each layer that has experts.
    experts : int
        Slots a layer at most.
    pool_bytes : int
    least : int
        Slots a layer at least: None when they do not fit.
    """
    row_bytes = sum(slot_bytes.values())
    each = min(experts, pool_bytes // row_bytes)
    if each < least:
        return None
    slots = dict.fromkeys(slot_bytes, each)
    left = pool_bytes - each * row_bytes
    for layer, size in slot_bytes.items():
        if each == experts or left < size:
            break
        slots[layer] += 1
        left -= size
    return slots


def native_layers(
    count: int,
    layers: Mapping[int, ExpertLayer],
    layouts: Mapping[int, SlotLayout],
    slots: Mapping[int, int],
    pool_address: int,
) -> tuple[list[dict[str, Any] | None], int]:
    """What `_cpu.Experts` takes: one description a layer, with the layers' pools one after another.

    Returns the list and the bytes of all pools.
    """
    result: list[dict[str, Any] | None] = []
    place = 0
    for index in range(count):
        if index not in layers:
            result.append(None)
            continue
        layer, layout = layers[index], layouts[index]
        result.append(
            {
                "experts": layer.n_experts,
                "types": [int(part.type) for part in layer.parts],
                "row_bytes": [tensor_bytes(GGMLQuantizationType(part.type), part.shape[:1]) for part in layer.parts],
                "extents": layout.extents,
                "extent_count": layout.extent_count,
                "part_offset": layout.part_offset,
                "pool": pool_address + place,
                "slot_bytes": layout.slot_bytes,
            }
        )
        place += slots[index] * layout.slot_bytes
    return result, place


def tier_slots(count: int, slots: Mapping[int, int], vram: Mapping[int, int] | None = None) -> np.ndarray:
    """int32 [layers, 2]: slots of the (simulated) VRAM tier and of DRAM."""
    table = np.zeros((count, 2), np.int32)
    for layer, total in slots.items():
        fast = min(vram[layer], total) if vram else 0
        table[layer] = fast, total - fast
    return table


def slot_pairs(slots: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Slots int [layers, 2] as plain numbers."""
    return tuple((int(vram), int(dram)) for vram, dram in slots)


def hottest_first(frequency: Sequence[float] | np.ndarray) -> np.ndarray:
    """Expert ids by descending frequency, equal ones by id."""
    return np.argsort(-np.asarray(frequency), kind="stable").astype(np.int32)
