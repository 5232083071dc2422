"""The C ops against float64 numpy: fresh random inputs, many sizes, called through ctypes."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest

from fomoe_io import _cpu
from fomoe_io._cpu import Kernels
from fomoe_io.cpu import dot_library
from tests.reference_model import (
    clamped_swiglu,
    l2_norm,
    rms_norm,
    rope,
    route,
    route_by,
    sigmoid,
    silu,
    softmax,
    softplus,
)

NATIVE = ctypes.CDLL(_cpu.__file__)
SIZES = (1, 3, 31, 64, 128, 255, 256, 2048, 4097)
Type = gguf.GGMLQuantizationType


def f32(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def close(ours: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    scale = np.abs(expected).max() + 1e-30
    assert np.abs(ours - expected).max() <= tolerance * scale


@pytest.mark.parametrize("n", SIZES)
def test_norms(n: int) -> None:
    random = np.random.default_rng(n)
    x, w, y = f32(random, n) * 3, f32(random, n), np.empty(n, np.float32)
    NATIVE.fomoe_rms_norm(n, pointer(x), pointer(w), ctypes.c_float(1e-6), pointer(y))
    close(y, rms_norm(x.astype(np.float64), w))
    NATIVE.fomoe_l2_norm(n, pointer(x), ctypes.c_float(1e-6), ctypes.c_float(0.25), pointer(y))
    close(y, 0.25 * l2_norm(x.astype(np.float64)))


@pytest.mark.parametrize("n", SIZES)
def test_activations(n: int) -> None:
    random = np.random.default_rng(n + 1)
    gate, up, y = f32(random, n) * 8, f32(random, n), np.empty(n, np.float32)
    NATIVE.fomoe_silu_mul(n, pointer(gate), pointer(up), pointer(y))
    close(y, silu(gate.astype(np.float64)) * up)
    NATIVE.fomoe_sigmoid_mul(n, pointer(gate), pointer(up), pointer(y))
    close(y, sigmoid(gate.astype(np.float64)) * up)
    x = gate.copy()
    NATIVE.fomoe_softmax(n, pointer(x))
    close(x, softmax(gate.astype(np.float64)))
    assert abs(float(x.astype(np.float64).sum()) - 1) < 1e-5


def test_extremes_stay_finite() -> None:
    gate = np.array([-1e30, -200, -90, 90, 200, 1e30], np.float32)
    up, y = np.ones(6, np.float32), np.empty(6, np.float32)
    NATIVE.fomoe_silu_mul(6, pointer(gate), pointer(up), pointer(y))
    assert np.isfinite(y).all() and np.abs(y[:3]).max() < 1e-3 * 1e30 and y[3] == 90
    NATIVE.fomoe_softplus.restype = ctypes.c_float
    for value in (-50.0, -1.5, 0.0, 3.0, 19.9, 25.0, 80.0):
        found = NATIVE.fomoe_softplus(ctypes.c_float(value))
        assert found == pytest.approx(float(softplus(np.float64(value))), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("rotated", "columns"), [(16, 16), (64, 256), (32, 40)])
def test_rope(rotated: int, columns: int) -> None:
    random = np.random.default_rng(rotated)
    for position in (0, 1, 777, 200_000):
        x, table = f32(random, 1, columns), np.empty(rotated, np.float32)
        expected = rope(x.astype(np.float64), position, rotated, 1e6)
        frequency = 1e6 ** (-2.0 * np.arange(rotated // 2) / rotated)
        NATIVE.fomoe_rope_table(
            rotated // 2, pointer(frequency), ctypes.c_double(1), ctypes.c_int64(position), pointer(table)
        )
        NATIVE.fomoe_rope_neox(rotated, pointer(table), pointer(x))
        close(x, expected)


@pytest.mark.parametrize(("channels", "taps"), [(5, 2), (64, 4), (515, 4), (16, 7)])
def test_conv(channels: int, taps: int) -> None:
    random = np.random.default_rng(channels)
    w, state = f32(random, channels, taps), np.zeros((taps - 1, channels), np.float32)
    inputs = f32(random, 9, channels)
    padded = np.vstack([np.zeros((taps - 1, channels)), inputs])
    for t in range(9):
        y = np.empty(channels, np.float32)
        NATIVE.fomoe_conv_step(
            channels, taps, pointer(w), pointer(inputs[t]), pointer(state), ctypes.c_int64(channels), pointer(y)
        )
        close(y, silu((w.T.astype(np.float64) * padded[t : t + taps]).sum(0)))
    assert np.array_equal(state, inputs[-(taps - 1) :])


@pytest.mark.parametrize("n", [4, 20, 64, 128])
def test_delta(n: int) -> None:
    random = np.random.default_rng(n)
    state, expected = np.zeros((n, n), np.float32), np.zeros((n, n))
    for _ in range(6):
        q, k, v = l2_norm(f32(random, n)), l2_norm(f32(random, n)), f32(random, n)
        q, k = q.astype(np.float32), k.astype(np.float32)
        beta, decay, out = float(random.random()), float(random.random()), np.empty(n, np.float32)
        NATIVE.fomoe_delta_step(
            n,
            n,
            pointer(q),
            pointer(k),
            pointer(v),
            ctypes.c_float(beta),
            ctypes.c_float(decay),
            pointer(state),
            pointer(out),
        )
        expected *= decay
        expected += np.outer(beta * (v - expected @ k), k)
        close(out, expected @ q, 1e-5)
        close(state, expected, 1e-5)


KV_TYPES = {np.float32: 0, np.float16: 1}


def kept(rows: np.ndarray, kv_type: type) -> np.ndarray:
    """Rows as a cache of that type keeps them."""
    out = np.empty(rows.shape, kv_type)
    NATIVE.fomoe_to_kv(KV_TYPES[kv_type], rows.size, pointer(rows), pointer(out))
    np.testing.assert_array_equal(out, rows.astype(kv_type))
    return out


@pytest.mark.parametrize("kv_type", [np.float32, np.float16])
@pytest.mark.parametrize(("columns", "length"), [(24, 1), (64, 7), (128, 300), (256, 1025)])
def test_attention(columns: int, length: int, kv_type: type) -> None:
    random = np.random.default_rng(length)
    q, keys, values = f32(random, columns) * 3, f32(random, length, columns), f32(random, length, columns)
    keys, values = (kept(rows, kv_type) for rows in (keys, values))
    scores, out = np.empty(length, np.float32), np.empty(columns, np.float32)
    stride = ctypes.c_int64(columns)
    NATIVE.fomoe_attention_head(
        KV_TYPES[kv_type],
        columns,
        columns,
        ctypes.c_int64(length),
        ctypes.c_float(0.3),
        pointer(q),
        pointer(keys),
        stride,
        pointer(values),
        stride,
        pointer(scores),
        None,
        pointer(out),
    )
    close(out, softmax(0.3 * keys.astype(np.float64) @ q) @ values.astype(np.float64), 1e-5)


@pytest.mark.parametrize(("experts", "used"), [(1, 1), (8, 3), (32, 4), (128, 8), (512, 10), (512, 16)])
def test_route(experts: int, used: int) -> None:
    random = np.random.default_rng(experts + used)
    for _ in range(20):
        logits = f32(random, experts) * 4
        p, ids, weights = np.empty(experts, np.float32), np.empty(used, np.int32), np.empty(used, np.float32)
        NATIVE.fomoe_route(
            experts, used, pointer(logits), 1, ctypes.c_float(1), pointer(p), pointer(ids), pointer(weights)
        )
        expected_ids, expected = route(logits.astype(np.float64), used)
        assert np.array_equal(ids, expected_ids)
        close(weights, expected)
    logits[:] = 0.5  # all equal: the lower ids
    NATIVE.fomoe_route(experts, used, pointer(logits), 1, ctypes.c_float(2), pointer(p), pointer(ids), pointer(weights))
    assert np.array_equal(ids, np.arange(used)) and weights.sum() == pytest.approx(2, rel=1e-6)


class NativeRouter(ctypes.Structure):
    _fields_ = (
        ("experts", ctypes.c_int32), ("used", ctypes.c_int32), ("score", ctypes.c_int32), ("bias", ctypes.c_void_p),
        ("groups", ctypes.c_int32), ("groups_used", ctypes.c_int32), ("normalise", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )  # fmt: skip


SCORES = ("softmax", "sigmoid", "logits")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("experts", "used", "groups", "left"), [(1, 1, 1, 1), (12, 4, 1, 1), (256, 8, 8, 4), (8, 2, 8, 3)]
)
def test_routers(score: str, biased: bool, experts: int, used: int, groups: int, left: int) -> None:
    random = np.random.default_rng(experts + used)
    for normalise, scale in ((0, 1.0), (1, 2.5)):
        logits, bias = f32(random, experts) * 3, f32(random, experts)
        router = NativeRouter(
            experts, used, SCORES.index(score), pointer(bias) if biased else None, groups, left, normalise, scale
        )
        scratch, ids, weights = np.empty(2 * experts, np.float32), np.empty(used, np.int32), np.empty(used, np.float32)
        NATIVE.fomoe_route_by(ctypes.byref(router), pointer(logits), pointer(scratch), pointer(ids), pointer(weights))
        expected_ids, expected = route_by(
            logits.astype(np.float64), used, score, bias if biased else 0.0, bool(normalise and score != "logits"),
            scale, groups, left,
        )  # fmt: skip
        assert np.array_equal(ids, expected_ids)
        close(weights, expected)


def test_weights_of_almost_nothing_are_not_made_one() -> None:
    """Their sum is divided by, but by no less than the smallest half float."""
    logits, scratch = np.full(4, -30, np.float32), np.empty(8, np.float32)
    ids, weights = np.empty(2, np.int32), np.empty(2, np.float32)
    router = NativeRouter(4, 2, SCORES.index("sigmoid"), None, 1, 1, 1, 1.0)
    NATIVE.fomoe_route_by(ctypes.byref(router), pointer(logits), pointer(scratch), pointer(ids), pointer(weights))
    close(weights, sigmoid(np.full(2, -30.0)) * 2.0**14)


@pytest.mark.parametrize("n", SIZES)
def test_clamped_swiglu(n: int) -> None:
    random = np.random.default_rng(n)
    gate, up, y = f32(random, n) * 6, f32(random, n) * 6, np.empty(n, np.float32)
    gate[-1], up[-1] = 1e30, 1e30
    NATIVE.fomoe_clamped_swiglu(n, pointer(gate), pointer(up), pointer(y))
    close(y, clamped_swiglu(gate.astype(np.float64), up.astype(np.float64)))


@pytest.mark.parametrize("sink", [-40.0, 0.5, 60.0])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_attention_with_a_sink(length: int, sink: float) -> None:
    random = np.random.default_rng(length)
    q, keys, values = f32(random, 64), f32(random, length, 64), f32(random, length, 64)
    scores, out, stride = np.empty(length, np.float32), np.empty(64, np.float32), ctypes.c_int64(64)
    logit = np.array([sink], np.float32)
    NATIVE.fomoe_attention_head(
        0, 64, 64, ctypes.c_int64(length), ctypes.c_float(0.3), pointer(q), pointer(keys), stride, pointer(values),
        stride, pointer(scores), pointer(logit), pointer(out),
    )  # fmt: skip
    p = softmax(np.append(0.3 * keys.astype(np.float64) @ q, sink))[:length]
    close(out, p @ values, 1e-5)


class NativeType(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32), ("activation_type", ctypes.c_int32), ("block_elements", ctypes.c_int32),
        ("block_bytes", ctypes.c_int32), ("dot", ctypes.c_void_p), ("from_float", ctypes.c_void_p),
        ("to_float", ctypes.c_void_p),
    )  # fmt: skip


DOT = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)
CONVERT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
PORTABLE = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4)


@pytest.fixture(params=["ggml", "portable"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "ggml" and dot_library.ggml_libraries() is None:
        pytest.skip("libggml-python has no wheel for this machine")
    return dot_library.open_kernels(request.param)


def native_type(kernels: Kernels, kind: int) -> NativeType:
    NATIVE.fomoe_type_of.restype = ctypes.POINTER(NativeType)
    return NATIVE.fomoe_type_of(ctypes.c_void_p(kernels.address), kind).contents


def convert(kernels: Kernels, kind: int, x: np.ndarray) -> np.ndarray:
    """An activation row in the type that a weight type wants."""
    t = native_type(kernels, kind)
    if kind == 0:
        return x.view(np.uint8)
    out = np.zeros(len(x) // t.block_elements * t.block_bytes, np.uint8)
    CONVERT(t.from_float)(pointer(x), pointer(out), len(x))
    return out


@pytest.mark.parametrize("kind", PORTABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n", [256, 512, 2048, 2080])
def test_dot(kernels: Kernels, kind: Type, n: int) -> None:
    """Exact up to float summation once the activation is what its quantizer made of it."""
    from tests.tiny_model import random_blocks

    random = np.random.default_rng(n + int(kind))
    t = native_type(kernels, int(kind))
    if n % t.block_elements or (n % 256 and t.activation_type == 15):
        pytest.skip("no whole blocks")
    raw = np.array(random_blocks(kind, (n, 1), 0.1, random))
    weights = gguf.quants.dequantize(raw, kind).astype(np.float64).reshape(-1)
    x = f32(random, n)
    activation = convert(kernels, t.activation_type, x)
    result = np.empty(1, np.float32)
    DOT(t.dot)(n, pointer(result), 0, pointer(raw), 0, pointer(activation), 0, 1)
    if t.activation_type == 15:  # Q8_K: float scale, 256 int8, 16 sums
        blocks = activation.reshape(-1, 292)
        seen = (blocks[:, :4].copy().view(np.float32) * blocks[:, 4:260].copy().view(np.int8)).reshape(-1)
    elif t.activation_type == 0:
        seen = x
    else:
        seen = gguf.quants.dequantize(activation, Type(t.activation_type)).reshape(-1)
    expected = float(weights @ seen.astype(np.float64))
    assert abs(float(result[0]) - expected) <= 1e-5 * float(np.abs(weights) @ np.abs(seen.astype(np.float64)))
    assert np.abs(seen - x).max() <= 0.02 * np.abs(x).max()  # and the quantizer is close to the truth


@pytest.mark.skipif(dot_library.ggml_libraries() is None, reason="libggml-python has no wheel for this machine")
@pytest.mark.parametrize("kind", [8, 15])
def test_portable_quantizers_equal_ggml(kind: int) -> None:
    x = f32(np.random.default_rng(kind), 4096) * 5
    x[256:512] = 0
    results = [convert(dot_library.open_kernels(name), kind, x).tobytes() for name in ("ggml", "portable")]
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", PORTABLE[1:], ids=lambda kind: kind.name)
def test_expand(kernels: Kernels, kind: Type) -> None:
    from tests.tiny_model import random_blocks

    raw = np.array(random_blocks(kind, (512, 1), 0.1, np.random.default_rng(1)))
    y = np.empty(512, np.float32)
    CONVERT(native_type(kernels, int(kind)).to_float)(pointer(raw), pointer(y), 512)
    close(y, gguf.quants.dequantize(raw, kind).reshape(-1), 1e-6)
