"""The tensors of a model: which an architecture computes with, of which shape and type; all others are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import gguf
import numpy as np

from fomoe_io.errors import FormatError
from fomoe_io.models.keys import LLAMA_CPP
from fomoe_io.models.shape import Shape
from fomoe_io.storage.expert_layers import ExpertLayer
from fomoe_io.storage.gguf import TensorInfo

EMBEDDING, OUTPUT, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"

_Type = gguf.GGMLQuantizationType
_NO_WEIGHTS = {_Type.I8, _Type.I16, _Type.I32, _Type.I64, _Type.F64, _Type.Q8_1, _Type.Q8_K}
"""Types in which no weight is stored: indices, and what activations are rounded to."""

_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,4})\..+")


class Tensor(NamedTuple):
    """A tensor that an architecture computes with.

    `shape` is in GGUF order.  `is_expanded`: it is read as floats, not multiplied with.  `is_optional`: a model may
    lack it.
    """

    name: str
    shape: tuple[int, ...]
    is_expanded: bool = False
    is_optional: bool = False


def vector(name: str, *shape: int) -> Tensor:
    """Norms and the like."""
    return Tensor(name, shape, is_expanded=True)


def bias(name: str, length: int) -> Tensor:
    """What is added to a product, where the model has it."""
    return Tensor(name, (length,), is_expanded=True, is_optional=True)


# ---- what several architectures share ----


def ends(s: Shape, *, may_tie: bool = True) -> Iterator[Tensor]:
    """Before the first layer and after the last; without an output matrix the embedding is it, where that `may_tie`."""
    yield Tensor(EMBEDDING, (s.columns, s.vocabulary))
    yield Tensor(OUTPUT, (s.columns, s.vocabulary), is_optional=may_tie)
    yield vector(OUTPUT_NORM, s.columns)


def attention(
    s: Shape, prefix: str, names: Iterable[str], *, gated: bool = False, biased: bool = False, has_norms: bool = True
) -> Iterator[Tensor]:
    """Softmax attention; query, key and value in three matrices, or in one where the model has that."""
    queries, keys = s.heads * s.head_columns * (2 if gated else 1), s.kv_heads * s.head_columns
    fused = f"{prefix}.attn_qkv.weight" in names
    parts = {"qkv": queries + 2 * keys} if fused else {"q": queries, "k": keys, "v": keys}
    for part, rows in parts.items():
        yield Tensor(f"{prefix}.attn_{part}.weight", (s.columns, rows))
        if biased:
            yield bias(f"{prefix}.attn_{part}.bias", rows)
    yield Tensor(f"{prefix}.attn_output.weight", (s.heads * s.head_columns, s.columns))
    yield vector(f"{prefix}.attn_norm.weight", s.columns)
    if has_norms:
        yield vector(f"{prefix}.attn_q_norm.weight", s.heads * s.head_columns if s.norms_whole_rows else s.head_columns)
        yield vector(f"{prefix}.attn_k_norm.weight", keys if s.norms_whole_rows else s.head_columns)


def dense(s: Shape, prefix: str, norm: str) -> Iterator[Tensor]:
    """A layer's one network, in the place of experts."""
    yield vector(f"{prefix}.{norm}.weight", s.columns)
    yield Tensor(f"{prefix}.ffn_gate.weight", (s.columns, s.dense_hidden))
    yield Tensor(f"{prefix}.ffn_up.weight", (s.columns, s.dense_hidden))
    yield Tensor(f"{prefix}.ffn_down.weight", (s.dense_hidden, s.columns))


def expert_biases(s: Shape, prefix: str) -> Iterator[Tensor]:
    """What is added to the products of router and experts."""
    yield vector(f"{prefix}.ffn_gate_inp.bias", s.experts)
    yield vector(f"{prefix}.ffn_gate_exps.bias", s.hidden, s.experts)
    yield vector(f"{prefix}.ffn_up_exps.bias", s.hidden, s.experts)
    yield vector(f"{prefix}.ffn_down_exps.bias", s.columns, s.experts)


def experts(s: Shape, prefix: str, norm: str, *, shared_gated: bool = True) -> Iterator[Tensor]:
    """The router, its norm and the shared expert; the routed ones are the store's."""
    yield vector(f"{prefix}.{norm}.weight", s.columns)
    yield Tensor(f"{prefix}.ffn_gate_inp.weight", (s.columns, s.experts))
    if s.shared_hidden:
        if shared_gated:
            yield Tensor(f"{prefix}.ffn_gate_inp_shexp.weight", (s.columns, 1))
        yield Tensor(f"{prefix}.ffn_gate_shexp.weight", (s.columns, s.shared_hidden))
        yield Tensor(f"{prefix}.ffn_up_shexp.weight", (s.columns, s.shared_hidden))
        yield Tensor(f"{prefix}.ffn_down_shexp.weight", (s.shared_hidden, s.columns))


# ---- checks ----


def same_shape(found: Iterable[int], expected: Iterable[int]) -> bool:
    """Whether two shapes are the same; dimensions of 1 at the end do not count, as in ggml."""
    return _stripped(found) == _stripped(expected)


def _stripped(shape: Iterable[int]) -> tuple[int, ...]:
    extents = list(shape)
    while len(extents) > 1 and extents[-1] == 1:
        extents.pop()
    return tuple(extents)


@cache
def expands(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether a tensor of the type can be read as floats."""
    if kind in _NO_WEIGHTS:
        return False
    try:
        gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def check_tensors(
    declared: Iterable[Tensor], found: Mapping[str, TensorInfo], s: Shape, architecture: str
) -> dict[str, TensorInfo]:
    """The resident tensors that are computed with.

    Raises
    ------
    FormatError
        One is missing, of another shape or of a type that holds no weights, or there is one that nobody computes with:
        the model is not what its architecture says.
    """
    used: dict[str, TensorInfo] = {}
    for tensor in declared:
        info = found.get(tensor.name)
        if info is not None:
            _check_tensor(tensor, info)
            used[tensor.name] = info
        elif not tensor.is_optional:
            raise FormatError(f"the model has no tensor {tensor.name}, which its architecture needs")
    unknown = [name for name in found if name not in used and not s.layers <= _block_of(name) < s.blocks]
    if unknown:
        more = f" (nor with {len(unknown) - 1} others)" if len(unknown) > 1 else ""
        raise FormatError(
            f"tensor {unknown[0]} is none that {architecture} is computed with here{more}", hint=LLAMA_CPP
        )
    return used


def _block_of(name: str) -> int:
    """Number of the block that a tensor belongs to, -1 when its name says none."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else -1


def checked(tensor: TensorInfo, shape: Iterable[int]) -> TensorInfo:
    """The tensor, when its shape is that; else FormatError."""
    if not same_shape(tensor.shape, shape):
        raise FormatError(f"{tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def _check_tensor(tensor: Tensor, info: TensorInfo) -> None:
    checked(info, tensor.shape)
    if info.type in _NO_WEIGHTS or (tensor.is_expanded and not expands(info.type)):
        raise FormatError(f"{tensor.name} has type {info.type.name}, in which no such tensor is stored")


def check_drafts(s: Shape, names: Iterable[str], experts: Iterable[int]) -> None:
    """Blocks that are left out because they only draft are such: else a layer would be lost without a word.

    Raises
    ------
    FormatError
    """
    names = set(names)
    drafts = {_block_of(name) for name in names}.union(experts) & set(range(s.layers, s.blocks))
    for block in sorted(drafts):
        if f"blk.{block}.nextn.eh_proj.weight" not in names:
            raise FormatError(
                f"nextn_predict_layers says that block {block} drafts, but it has no blk.{block}.nextn.eh_proj.weight"
            )


def check_experts(layers: Mapping[int, ExpertLayer], s: Shape) -> dict[int, ExpertLayer]:
    """The routed experts that are computed with, by layer.

    Raises
    ------
    FormatError
        A layer has none, or others than its sizes say, or there is a layer too many.
    """
    expected = [(s.columns, s.hidden), (s.columns, s.hidden), (s.hidden, s.columns)]
    for layer in s.expert_layers:
        if layer not in layers:
            raise FormatError(f"layer {layer} has no expert tensors (blk.{layer}.ffn_*_exps.weight)")
        found = layers[layer]
        shapes = [tuple(part.shape) for part in found.parts]
        if found.n_experts != s.experts or shapes != expected:
            raise FormatError(
                f"layer {layer} has {found.n_experts} experts of shapes {shapes}, expected {s.experts} of {expected}"
            )
        for part in found.parts:
            if _Type(part.type) in _NO_WEIGHTS:
                raise FormatError(
                    f"blk.{layer} expert {part.name} has type {_Type(part.type).name}, in which no weights are stored"
                )
    surplus = [layer for layer in layers if layer >= s.blocks]
    if surplus:
        raise FormatError(f"blk.{surplus[0]} has experts, but block_count is {s.blocks}")
    dense = [layer for layer in layers if layer < s.dense_layers]
    if dense:
        raise FormatError(f"blk.{dense[0]} has experts, but leading_dense_block_count is {s.dense_layers}")
    return {layer: layers[layer] for layer in s.expert_layers}
