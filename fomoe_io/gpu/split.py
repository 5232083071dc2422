"""How several devices share a model where nobody has said it: by arithmetic, from what is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fomoe_io.errors import FormatError
from fomoe_io.gpu.exchange import check_share

if TYPE_CHECKING:
    from fomoe_io.gpu.device import Gpu
    from fomoe_io.open_model import OpenModel

EXCHANGES = 4
"""Of a layer whose rows are divided: what attention reads, what it gives, what gate and up make, what down makes."""

EXCHANGE_US, PEER_EXCHANGE_US = 6.4, 2.3
"""Of one, through the host's memory and by each other's: by so much a layer of the 397B's shape took longer on two
H200s than half of its reading saves (bench/results/2026-11-two-cards.md)."""

LEAST_FREE_SHARE = 0.8
"""Of what is free: the rest is for sessions' state, activations and what the driver takes later."""

MOST_WEIGHTS_SHARE = 8
"""One part in so many of a device's memory may go to weights that it would not have with layers of its own: of the 397B
on cards of 16 GB it would be a fifth, and the experts that it displaces cost more reads than the rows save."""

MEASURED_BYTES, ROUNDS = 256 << 20, 5


def choose(opened: OpenModel, gpus: Sequence[Gpu]) -> str:
    """`tensor` where reading some of a layer's rows saves more than the exchanges cost, else `layer`.

    Unlike devices, other shares than equal ones, a model whose rows cannot be divided and one whose weights, of which
    every device would have all, would leave few experts room take `layer`.  Where nobody has named the devices and the
    first has room for the whole model, that is `none`: the first alone.
    """
    if _pays(opened, gpus) and _leaves_room(opened, gpus):
        return "tensor"
    is_alone = opened.config.device == "auto" and _has_room(opened, gpus[0], 1)
    return "none" if is_alone else "layer"


def _has_room(opened: OpenModel, gpu: Gpu, devices: int) -> bool:
    """Whether a device holds its share of all experts, beside all that stays."""
    experts = sum(int(layer.extents[..., 2].sum()) for layer in opened.model.experts.values())
    return experts // devices + _resident_bytes(opened) < LEAST_FREE_SHARE * gpu.free_bytes()


def _leaves_room(opened: OpenModel, gpus: Sequence[Gpu]) -> bool:
    more = _resident_bytes(opened) * (1 - 1 / len(gpus))
    return _has_room(opened, gpus[0], len(gpus)) or more < gpus[0].free_bytes() / MOST_WEIGHTS_SHARE


def _resident_bytes(opened: OpenModel) -> int:
    return sum(tensor.bytes for tensor in opened.model.resident.values())


def _pays(opened: OpenModel, gpus: Sequence[Gpu]) -> bool:
    kinds = {(gpu.info.name, gpu.info.memory_bytes) for gpu in gpus}
    if len(kinds) > 1 or len(set(opened.config.tensor_split or (1.0,))) > 1:
        return False
    try:
        check_share(opened.shape, len(gpus))
    except FormatError:
        return False
    saved_us = 1e6 * layer_bytes(opened) * (1 - 1 / len(gpus)) / read_bandwidth(gpus[0])
    each_us = PEER_EXCHANGE_US if opened.config.peer_memory else EXCHANGE_US
    return saved_us > EXCHANGES * each_us


def layer_bytes(opened: OpenModel) -> float:
    """What a token reads of a layer: its experts and the weights that stay, without those at the model's ends."""
    experts = opened.model.experts
    chosen = sum(opened.shape.used * int(layer.extents[0, :, 2].sum()) for layer in experts.values())
    dense = sum(tensor.bytes for name, tensor in opened.model.resident.items() if name.startswith("blk."))
    return (chosen + dense) / opened.shape.layers


def read_bandwidth(gpu: Gpu, nbytes: int = MEASURED_BYTES, per_processor: int = 8) -> float:
    """Bytes a second of plain loads of so many bytes (at most a part of what is free), by blocks a multiprocessor."""
    nbytes = min(nbytes, gpu.free_bytes() // 4) // 16 * 16
    blocks = per_processor * max(1, gpu.info.multiprocessors)
    pool, out = gpu.allocate(nbytes), gpu.allocate(32 * blocks)
    launch = gpu.prepare("read_memory", (blocks, 1, 1), pool, nbytes, out, blocks)
    begin, end, best = gpu.event(is_timed=True), gpu.event(is_timed=True), 0.0
    for _ in range(ROUNDS):
        gpu.stream.record(begin)
        launch.run(gpu.stream)
        gpu.stream.record(end)
        end.synchronize()
        best = max(best, nbytes / max(end.milliseconds_since(begin), 1e-6) * 1e3)
    pool.free()
    out.free()
    return best
