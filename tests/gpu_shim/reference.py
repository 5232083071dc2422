"""What the kernels should compute, in float64."""

from __future__ import annotations

import gguf
import numpy as np

from fomoe_io.gpu import kernels

GGML = {
    "q4_k": gguf.GGMLQuantizationType.Q4_K,
    "q5_k": gguf.GGMLQuantizationType.Q5_K,
    "q6_k": gguf.GGMLQuantizationType.Q6_K,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "mxfp4": gguf.GGMLQuantizationType.MXFP4,
}
# where the f16 scales stand in a block
HALVES = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q8_0": (0,)}


STORED = {planes: stored for stored, planes in kernels.PLANES.items()}


def fitting(name: str, columns: int) -> int:
    """So many columns, or the next number of which a type that is kept in planes has whole chunks."""
    chunk = kernels.CHUNK_BLOCKS * kernels.BLOCKS[name][0] if name in STORED else 1
    return kernels.up(columns, chunk) * chunk


def in_planes(name: str, data: np.ndarray) -> np.ndarray:
    """Rows of a file's format as the device keeps them: of eight blocks first all quants, then what else they have."""
    chunks = data.reshape(-1, kernels.CHUNK_BLOCKS, kernels.BLOCKS[name][1])
    if name == "q8_0":
        parts = [chunks[..., 2:], chunks[..., :2]]
    elif name == "q4_k":
        nibbles = chunks[..., 16:].reshape(*chunks.shape[:2], 4, 2, 16)
        parts = [nibbles[..., 0, :], nibbles[..., 1, :], chunks[..., :16]]
    else:
        scales = chunks[..., 192:208].reshape(*chunks.shape[:2], 2, 2, 2, 2)  # halves, pair's place, quarter, sixteen
        parts = [chunks[..., :128], chunks[..., 128:192], np.moveaxis(scales, 3, 5), chunks[..., 208:]]
    return np.concatenate([part.reshape(len(chunks), -1) for part in parts], axis=1).reshape(data.shape)


def random_weights(rng: np.random.Generator, name: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes of a weight type ([rows][row bytes]) and the same as float64 ([rows][columns])."""
    if name in STORED:
        data, values = random_weights(rng, STORED[name], rows, columns)
        return in_planes(STORED[name], data), values
    if name in ("f16", "f32"):
        values = rng.standard_normal((rows, columns)).astype(np.float16 if name == "f16" else np.float32)
        return values.view(np.uint8).reshape(rows, -1), values.astype(np.float64)
    if name == "bf16":
        bits = (rng.standard_normal((rows, columns)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return bits.view(np.uint8).reshape(rows, -1), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    elements, size = gguf.GGML_QUANT_SIZES[GGML[name]]
    blocks = rng.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    if name == "mxfp4":
        blocks[:, 0] = rng.integers(115, 125, len(blocks))  # the exponent
    for at in HALVES.get(name, ()):
        scale = (rng.uniform(0.5, 2.0, len(blocks)) * 1e-3 * rng.choice((-1, 1), len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    data = blocks.reshape(rows, -1)
    return data, gguf.dequantize(data, GGML[name]).astype(np.float64)


def q8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize as ``quantize_q8`` does: bytes as written, and the values they stand for (float64)."""
    tokens, columns = x.shape
    groups = x.astype(np.float32).reshape(tokens, -1, 32)
    d = np.abs(groups).max(axis=2) / np.float32(127)
    q = np.rint(groups / np.where(d == 0, np.float32(1), d)[..., None]).astype(np.int8)
    pairs = np.stack([d, d * q.sum(axis=2, dtype=np.int32).astype(np.float32)], axis=2).astype(np.float32)
    row = np.concatenate([q.reshape(tokens, -1).view(np.uint8), pairs.reshape(tokens, -1).view(np.uint8)], axis=1)
    row = np.pad(row, ((0, 0), (0, -row.shape[1] % 16)))
    return row, (q * d[..., None].astype(np.float64)).reshape(tokens, columns), d


def from_q8(row: np.ndarray, columns: int) -> np.ndarray:
    """The values that Q8 rows stand for, float64."""
    q = row[:, :columns].view(np.int8).astype(np.float64)
    d = np.ascontiguousarray(row[:, columns : columns + columns // 4]).view(np.float32)[:, ::2]
    return (q.reshape(len(row), -1, 32) * d[..., None]).reshape(len(row), columns)


def error(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||; a NaN never passes a comparison with it."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rope(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x: [tokens][heads][dim], angles: [tokens][rotary / 2]; NEOX pairing of the first elements."""
    half = angles.shape[1]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    scale: float,
    sinks: np.ndarray | None = None,
    window: int = 0,
) -> np.ndarray:
    """q: [tokens][heads][dim], keys: [positions][kv_heads][dim], values alike but for dim -> a value for each query."""
    group = q.shape[1] // keys.shape[1]
    out = np.empty((*q.shape[:2], values.shape[2]))
    for t, position in enumerate(positions):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        for h in range(q.shape[1]):
            scores = keys[seen, h // group] @ q[t, h] * scale
            p = np.exp(scores - scores.max())
            rest = 0.0 if sinks is None else np.exp(float(sinks[h]) - scores.max())
            out[t, h] = p / (p.sum() + rest) @ values[seen, h // group]
    return out


def hidden(gate: np.ndarray, up: np.ndarray, *, is_clamped: bool) -> np.ndarray:
    """What an expert makes of its products."""
    if not is_clamped:
        return silu(gate) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (up + 1)


def delta_rule(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    alpha: np.ndarray,
    beta: np.ndarray,
    dt: np.ndarray,
    a: np.ndarray,
    state: np.ndarray,
    key_head_of: np.ndarray,
    eps: float,
) -> np.ndarray:
    """q, k: [tokens][key_heads][k_dim], v: [tokens][value_heads][v_dim]; state [heads][v_dim][k_dim] is moved on."""
    q = q / np.sqrt((q * q).sum(axis=-1, keepdims=True) + eps) / np.sqrt(q.shape[-1])
    k = k / np.sqrt((k * k).sum(axis=-1, keepdims=True) + eps)
    out = np.empty_like(v)
    for t in range(len(v)):
        for h in range(v.shape[1]):
            kk, qq = k[t, key_head_of[h]], q[t, key_head_of[h]]
            state[h] *= np.exp(np.log1p(np.exp(alpha[t, h] + dt[h])) * a[h])
            delta = sigmoid(beta[t, h]) * (v[t, h] - state[h] @ kk)
            state[h] += np.outer(delta, kk)
            out[t, h] = state[h] @ qq
    return out
