"""How device and host memory are shared: what a GPU engine's budgets hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.experts.slots import SlotLayout
from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import ALIGNMENT_BYTES
from fomoe_io.gpu.kernels import up
from fomoe_io.gpu.weights import kernel_of
from fomoe_io.models.recorder import LAYERS_AHEAD

if TYPE_CHECKING:
    from fomoe_io.models.shape import Shape
    from fomoe_io.storage.expert_layers import ExpertLayer

RECORD_ALIGNMENT_BYTES = 16
"""Of a part in a device record: the widest load of the kernels."""

MOST_GAP_BYTES = 32 << 10
"""Lost in a device record that is laid out as a record on the host."""

CACHE_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """A layer's records on the device.

    Attributes
    ----------
    kernels : formats of gate and up, and of down
    part_bytes : of gate, up, down, whole
    device_offset : where a device's share of each stands
    is_alike : the parts of every expert lie in DRAM as they do on the device, so that kernels can read them there
    slot_bytes : in VRAM and in DRAM
    """

    kernels: tuple[str, str]
    part_bytes: tuple[int, int, int]
    device_offset: tuple[int, int, int]
    slot_bytes: tuple[int, int]
    is_alike: bool


def record_layout(index: int, layer: ExpertLayer, layout: SlotLayout, devices: int = 1) -> RecordLayout:
    """Gate, up and down one after the other, each where the kernels can load it; of each a device's share of the rows.

    Raises
    ------
    FormatError
        The kernels do not know a part's type.
    """
    names = [kernel_of(int(part.type)) for part in layer.parts]
    for part, name in zip(layer.parts, names, strict=True):
        if name is None:
            raise FormatError(
                f"blk.{index} expert {part.name} has type number {int(part.type)}, which the GPU kernels do not know",
                hint="--device cpu",
            )
    if names[0] != names[1]:
        raise FormatError(f"blk.{index} mixes {names[0]} and {names[1]} in gate and up", hint="--device cpu")
    whole = tuple(int(size) for size in layer.extents[0, :, 2])
    gate, up_, down = (size // devices for size in whole)
    second = _aligned(gate)
    places = (0, second, _aligned(second + up_))
    on_host = _common_places(layout, (gate, up_, down)) if devices == 1 else None
    slot = up((on_host or places)[2] + down, ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return RecordLayout(
        (str(names[0]), str(names[2])), (whole[0], whole[1], whole[2]), on_host or places, (slot, layout.slot_bytes),
        on_host is not None,
    )  # fmt: skip


def _common_places(layout: SlotLayout, sizes: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Where up and down stand behind gate, if that is the same for all experts, loads can be aligned, and little room
    is lost between them: then a device record is laid out so too, and a copy of it is one piece."""
    places = layout.part_offset.astype(np.int64) - layout.part_offset[:, :1]
    first = tuple(int(place) for place in places[0])
    is_common = bool((places == places[0]).all()) and not any(place % RECORD_ALIGNMENT_BYTES for place in first)
    gaps = first[1] - sizes[0], first[2] - first[1] - sizes[1]
    if not is_common or min(gaps) < 0 or sum(gaps) > MOST_GAP_BYTES:
        return None
    return first[0], first[1], first[2]


def _aligned(offset: int) -> int:
    return up(offset, RECORD_ALIGNMENT_BYTES) * RECORD_ALIGNMENT_BYTES


def check_shape(s: Shape) -> None:
    """FormatError when the kernels have no size for the model's."""
    limits: list[tuple[str, int, Sequence[int] | range]] = [
        ("experts a layer", s.experts, range(1, kernels.MOST_EXPERTS + 1)),
        ("experts a token", s.used, range(1, kernels.MOST_PICKS + 1)),
        ("expert width", s.hidden, range(32, 1 << 24, 32)),
        ("model width", s.columns, range(32, kernels.NORM_MOST_COLUMNS + 1, 32)),
    ]
    if s.latent:
        limits += [
            ("latents of", s.latent, range(32, kernels.NORM_MOST_COLUMNS + 1, 32)),
            ("a query beside its turning columns of", s.query_columns - s.rotated, range(32, 1 << 16, 32)),
            ("turning columns", s.rotated, range(4, 1 << 16, 4)),
        ]
    else:
        limits.append(("head size", s.head_columns, kernels.HEAD_SIZES))
    if s.state_columns:
        limits.append(("delta-rule head size", s.state_columns, (64, 128)))
        limits.append(("taps of a convolution:", s.conv_taps, range(1, kernels.CONV_MOST_TAPS + 1)))
    for name, value, allowed in limits:
        if value not in allowed:
            raise FormatError(f"the GPU kernels do not take a model with {name} {value}", hint="--device cpu")


@dataclass(frozen=True, slots=True)
class Mail:
    """Offsets of each layer's post, answer and guesses (gpu/kernels/router.h) in memory that host and device share.

    The first cache line holds the word that stops a wait.
    """

    pairs: int
    layers: int
    guesses: int = 0

    @property
    def post_bytes(self) -> int:
        """Of one layer's post."""
        return up(8 * (1 + 2 * self.pairs), CACHE_LINE_BYTES) * CACHE_LINE_BYTES

    @property
    def answer_bytes(self) -> int:
        """Of one layer's answer."""
        return up(kernels.ANSWER_BYTES * self.pairs, CACHE_LINE_BYTES) * CACHE_LINE_BYTES

    @property
    def guess_bytes(self) -> int:
        """Of what one layer guesses of another."""
        return up(8 * self.guesses, CACHE_LINE_BYTES) * CACHE_LINE_BYTES

    def post(self, layer: int) -> int:
        """Offset of a layer's post."""
        return CACHE_LINE_BYTES + layer * (self.post_bytes + self.answer_bytes + LAYERS_AHEAD * self.guess_bytes)

    def answer(self, layer: int) -> int:
        """Offset of a layer's answer."""
        return self.post(layer) + self.post_bytes

    def guess(self, layer: int) -> tuple[int, ...]:
        """Offsets of what is guessed of a layer, by the one before it and by those before that."""
        first = self.answer(layer) + self.answer_bytes
        return tuple(first + i * self.guess_bytes for i in range(LAYERS_AHEAD))

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.post(self.layers)


@dataclass(frozen=True, slots=True)
class Header:
    """What the host sends before each run, as offsets in one block: run number, positions, states, embeddings."""

    tokens: int
    row_bytes: int

    @property
    def positions(self) -> int:
        """int32 [tokens]"""
        return ALIGNMENT_BYTES

    @property
    def states(self) -> int:
        """uint64 [tokens]: where the memory of each one's session begins"""
        return self.positions + up(4 * self.tokens, ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def embedding(self) -> int:
        """uint8 [tokens, row_bytes]"""
        return self.states + up(8 * self.tokens, ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.embedding + up(self.tokens * self.row_bytes, ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def size_classes(records: Mapping[int, RecordLayout]) -> dict[tuple[int, int], int]:
    """Numbers of the distinct slot sizes: layers of one size share spare buffers."""
    return {sizes: i for i, sizes in enumerate(dict.fromkeys(r.slot_bytes for r in records.values()))}


def pool_places(
    records: Mapping[int, RecordLayout], slots: np.ndarray, spares: tuple[int, int], tier: int
) -> tuple[dict[int, int], dict[int, int], int]:
    """Where each layer's slots and each class's spares begin in a tier's pool.

    Returns
    -------
    (layer -> offset, class -> offset, bytes of the pool)
    """
    place = 0
    layers: dict[int, int] = {}
    classes: dict[int, int] = {}
    for layer, record in records.items():
        layers[layer] = place
        place += int(slots[layer, tier]) * record.slot_bytes[tier]
    for sizes, number in size_classes(records).items():
        classes[number] = place
        place += spares[tier] * sizes[tier]
    return layers, classes, place


def native_device_layers(
    count: int,
    records: Mapping[int, RecordLayout],
    layouts: Mapping[int, SlotLayout],
    layers: Mapping[int, ExpertLayer],
    pools: tuple[dict[int, int], dict[int, int]],
    words: Sequence[tuple[int, int, int]],
    posts: Mail,
) -> list[dict[str, Any] | None]:
    """What `_gpu.DeviceExperts` takes; addresses are the host's, but for the VRAM pool's.

    words: of each device, where its tables begin, and its mail, for the host and for the device.
    """
    numbers = size_classes(records)
    most = max(layer.n_experts for layer in layers.values())
    result: list[dict[str, Any] | None] = []
    for index in range(count):
        if index not in records:
            result.append(None)
            continue
        record, layout = records[index], layouts[index]
        result.append(
            {
                "experts": layers[index].n_experts,
                "size_class": numbers[record.slot_bytes],
                "extents": layout.extents,
                "extent_count": layout.extent_count,
                "part_offset": layout.part_offset,
                "device_offset": record.device_offset,
                "part_bytes": record.part_bytes,
                "is_alike": record.is_alike,
                "pool": (pools[0][index], pools[1][index]),
                "post": words[0][1] + posts.post(index),
                "guess": [words[0][1] + offset for offset in posts.guess(index)] if posts.guesses else [],
                "words": [
                    {
                        "table": tables + 8 * most * index,
                        "answer": mail + posts.answer(index),
                        "answer_on_device": on_device + posts.answer(index),
                    }
                    for tables, mail, on_device in words
                ],
            }
        )
    return result
