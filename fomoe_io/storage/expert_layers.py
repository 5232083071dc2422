"""The routed experts of a model's layers: their matrices, and where each lies."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.storage.gguf import GGUFFile, TensorInfo, tensor_bytes
from fomoe_io.storage.manifest import PART_NAMES, page_up

MAX_EXPERTS = 1 << 16
FILE, OFFSET, BYTES = 0, 1, 2
"""Columns of :attr:`ExpertLayer.extents`."""

_EXPERTS = re.compile(r"blk\.(0|[1-9]\d{0,4})\.ffn_(gate_up|gate|up|down)_exps\.weight")
_SEPARATE_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One of the three matrices of the experts of a layer.

    Attributes
    ----------
    name : {"gate", "up", "down"}
    type : int
        gguf.GGMLQuantizationType
    shape : tuple of int
        (ne0, ne1): columns, rows.
    bytes : int
        Of one expert.
    """

    name: str
    type: int
    shape: tuple[int, int]
    bytes: int


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The routed experts of one layer.

    Attributes
    ----------
    layer : int
    n_experts : int
    parts : tuple of ExpertPart
        gate, up, down.
    extents : numpy.ndarray
        int64 [n_experts, 3, 3]: (file, offset, bytes) of each part of each expert.
    checksums : numpy.ndarray or None
        uint64 [n_experts]: xxh3_64 over gate, up and down.
    frequency : numpy.ndarray or None
        float64 [n_experts]: picks per token in the profile.
    """

    layer: int
    n_experts: int
    parts: tuple[ExpertPart, ExpertPart, ExpertPart]
    extents: np.ndarray
    checksums: np.ndarray | None = None
    frequency: np.ndarray | None = None

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return sum(part.bytes for part in self.parts)

    @property
    def record_bytes(self) -> int:
        """Weights of one expert rounded up to whole pages: its record in a packed store."""
        return page_up(self.expert_bytes)


def experts_of(model: GGUFFile) -> dict[int, ExpertLayer]:
    """Routed experts by layer: `ffn_{gate,up,down}_exps`, or fused `ffn_gate_up_exps` as its two halves.

    Raises
    ------
    FormatError
        When the model has none, or the shapes of a layer do not go together.
    """
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in model.tensors.items():
        match = _EXPERTS.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = tensor
        elif _SEPARATE_EXPERTS.fullmatch(name):
            raise FormatError(
                f"{model.paths[0]} stores each expert as a tensor of its own ({name}), as files before 2024 did",
                hint="convert the model again with a current llama.cpp",
            )
    if not found:
        raise FormatError(
            f"{model.paths[0]} has no routed experts (blk.N.ffn_down_exps.weight)",
            hint="fomoe_io runs Mixture-of-Experts models; run a dense one with llama.cpp",
        )
    return {layer: _layer_of(layer, found[layer]) for layer in sorted(found)}


def resident_tensors(model: GGUFFile) -> dict[str, TensorInfo]:
    """All of a GGUF's tensors that are not of routed experts."""
    return {name: tensor for name, tensor in model.tensors.items() if not _EXPERTS.fullmatch(name)}


def _layer_of(layer: int, tensors: dict[str, TensorInfo]) -> ExpertLayer:
    where = f"blk.{layer}.ffn_*_exps.weight"
    if set(tensors) not in ({"gate", "up", "down"}, {"gate_up", "down"}):
        found = ", ".join(sorted(tensors))
        raise FormatError(f"{where}: found {found}, expected gate, up and down, or gate_up and down")
    for tensor in tensors.values():
        if len(tensor.shape) != 3 or tensor.shape[2] > MAX_EXPERTS:
            raise FormatError(f"{tensor.name} has shape {list(tensor.shape)}, expected [columns, rows, experts]")
    n_experts = tensors["down"].shape[2]
    pieces = []
    for name in PART_NAMES:
        tensor = tensors[name] if name in tensors else tensors["gate_up"]
        rows = tensor.shape[1] if name in tensors else tensor.shape[1] // 2
        part = ExpertPart(
            name, int(tensor.type), (tensor.shape[0], rows), tensor_bytes(tensor.type, (tensor.shape[0], rows))
        )
        stride = tensor.bytes // tensor.shape[2]
        pieces.append((part, tensor, stride, part.bytes if name == "up" and name not in tensors else 0))
    gate, up, down = (piece[0] for piece in pieces)
    shapes_fit = gate.shape == up.shape and down.shape == (gate.shape[1], gate.shape[0])
    if not shapes_fit or {t.shape[2] for t in tensors.values()} != {n_experts} or _odd_rows(tensors):
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(tensors.items()))
        raise FormatError(f"{where}: shapes do not go together: {shapes}")
    extents = np.zeros((n_experts, 3, 3), np.int64)
    ids = np.arange(n_experts, dtype=np.int64)
    for i, (part, tensor, stride, shift) in enumerate(pieces):
        extents[:, i, FILE] = tensor.file
        extents[:, i, OFFSET] = tensor.offset + ids * stride + shift
        extents[:, i, BYTES] = part.bytes
    return ExpertLayer(layer, n_experts, (gate, up, down), extents)


def _odd_rows(tensors: dict[str, TensorInfo]) -> bool:
    return "gate_up" in tensors and tensors["gate_up"].shape[1] % 2 == 1
