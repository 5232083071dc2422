"""Checks of gpu/kernels/latent.h against float64 numpy."""

from __future__ import annotations

import numpy as np

from fomoe_io.gpu import kernels
from tests.gpu_shim import reference as ref
from tests.gpu_shim.cases import CLOSE, Runner, activations, normal, poison, quantized


def turned_neighbours(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x: [tokens][...][rotated], angles: [tokens][rotated / 2]; the first of all pairs, then the second ones."""
    shape = (len(x), *[1] * (x.ndim - 2), -1)
    cos, sin = np.cos(angles).reshape(shape), np.sin(angles).reshape(shape)
    a, b = x[..., ::2], x[..., 1::2]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def check_latent_attention(
    runner: Runner,
    rng: np.random.Generator,
    cache: str,
    heads: int,
    sizes: tuple[int, int, int],
    positions: list[int],
) -> None:
    """Consecutive tokens over a cache that holds what came before; `sizes`: own, rotated, latent columns."""
    own, rotated, columns = sizes
    tokens, context, eps = len(positions), max(positions) + 1, 1e-6
    element, close = (np.float32, CLOSE) if cache == "f32" else (np.float16, 5e-4)
    q, latent, key = (
        normal(rng, tokens, heads, own + rotated),
        normal(rng, tokens, columns),
        normal(rng, tokens, rotated),
    )
    norm, rows = normal(rng, columns), normal(rng, context, rotated + columns).astype(element)
    every = np.arange(context)[:, None] * 1e4 ** (-2 * np.arange(rotated // 2) / rotated)
    turns = np.stack([np.cos(every), np.sin(every)], axis=2).astype(np.float32)
    place, device_rows = runner.put(np.array(positions, np.int32)), runner.put(rows)
    inputs = [runner.put(array) for array in (q, latent, key, norm, turns)]
    turned, floats = runner.put(poison(tokens, heads, rotated)), runner.put(poison(tokens * heads, own))
    q8 = runner.put(np.full((tokens * heads, kernels.q8_row_bytes(own)), 0xAA, np.uint8))
    runner.launch(
        f"latent_prepare_{cache}", (heads + 1, tokens, 1), *inputs, place, None, turned, floats, q8, device_rows,
        heads, own, rotated, columns, eps,
    )  # fmt: skip
    np.testing.assert_array_equal(floats.get().reshape(tokens, heads, own), q[..., :own])
    np.testing.assert_array_equal(q8.get(), quantized(runner, floats.get()).get())
    want_turned = turned_neighbours(q[..., own:].astype(np.float64), every[positions])
    assert ref.error(turned.get(), want_turned) < CLOSE
    stored = rows.astype(np.float64)
    stored[positions, :rotated] = turned_neighbours(key.astype(np.float64), every[positions])
    stored[positions, rotated:] = ref.rms_norm(latent.astype(np.float64), norm, eps)
    assert ref.error(device_rows.get(), stored) < close

    absorbed, splits = normal(rng, tokens, heads, columns), kernels.latent_splits(context) + 1
    parts, scale = runner.put(poison(tokens, heads, splits, columns + 2)), 0.3 * (rotated + columns) ** -0.5
    runner.launch(
        f"latent_attention_{cache}", kernels.latent_grid(heads, splits, tokens), turned, runner.put(absorbed),
        device_rows, place, None, parts, heads, splits, rotated, columns, scale,
    )  # fmt: skip
    y = runner.put(poison(tokens * heads, columns))
    sums_q8 = runner.put(np.full((tokens * heads, kernels.q8_row_bytes(columns)), 0xAA, np.uint8))
    grid = (kernels.up(columns, 256), heads, tokens)
    runner.launch("latent_merge", grid, parts, place, y, sums_q8, heads, columns, splits)
    kept = device_rows.get().astype(np.float64)
    query = np.concatenate([turned.get(), absorbed], axis=-1).astype(np.float64)
    want = ref.attention(query, kept[:, None], kept[:, None, rotated:], np.array(positions), scale)
    assert ref.error(y.get(), want.reshape(tokens * heads, columns)) < 2 * CLOSE
    np.testing.assert_array_equal(sums_q8.get(), quantized(runner, y.get()).get())


def check_heads_products(
    runner: Runner, rng: np.random.Generator, name: str, heads: int, rows: int, columns: int, tokens: int
) -> None:
    """Of one token and of many; what a token's becomes does not depend on those beside it."""
    data, weights = ref.random_weights(rng, name, heads * rows, columns)
    w, x = runner.put(data), normal(rng, tokens * heads, columns)

    def product(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        handle, meant = activations(runner, name, x)
        y, count = runner.put(poison(len(x), rows)), len(x) // heads
        grid = kernels.heads_mat_mul_grid(heads, rows, count)
        runner.launch(f"heads_mat_mul_{name}", grid, w, handle, y, heads, rows, columns, count)
        return y.get(), meant

    found, meant = product(x)
    by_head = weights.reshape(heads, rows, columns)
    want = np.einsum("thc,hrc->thr", meant.reshape(tokens, heads, columns), by_head).reshape(-1, rows)
    summed = np.linalg.norm(np.einsum("thc,hrc->thr", np.abs(meant).reshape(tokens, heads, columns), np.abs(by_head)))
    assert np.linalg.norm(found - want) < 1e-6 * summed
    np.testing.assert_array_equal(product(x[-heads:])[0], found[-heads:])
    handle, _ = activations(runner, name, x[:heads])
    for split in {1, kernels.split_of(name, columns)}:
        y = runner.put(poison(heads, rows))
        grid = kernels.heads_mat_vec_grid(name, heads, rows, split)
        runner.launch(f"heads_mat_vec_{name}", grid, w, handle, y, rows, columns, split)
        assert np.linalg.norm(y.get() - want[:heads]) < 1e-6 * summed
