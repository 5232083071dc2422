"""Checks of the many-token kernels (gpu/kernels/tile.h) against float64 numpy; a tile's makeup changes nothing."""

from __future__ import annotations

import numpy as np

from fomoe_io.gpu import kernels
from tests.gpu_shim import reference as ref
from tests.gpu_shim.cases import Handle, Runner, activations, expert_form, make_records, normal, poison

TILE = np.dtype([("record", np.uint64), ("first", np.uint32), ("count", np.uint32)])


def check_mat_mul(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int, tokens: int) -> None:
    data, weights = ref.random_weights(rng, name, rows, columns)
    values = normal(rng, tokens, columns)
    w = runner.put(data)

    def product(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        handle, meant = activations(runner, name, x)
        y = runner.put(poison(len(x), rows))
        grid = kernels.mat_mul_grid(rows, len(x))
        runner.launch(f"mat_mul_{name}", grid, w, handle, y, rows, columns, len(x))
        return y.get(), meant

    found, meant = product(values)
    summed = np.linalg.norm(np.abs(meant) @ np.abs(weights).T)
    assert np.linalg.norm(found - meant @ weights.T) < 1e-6 * summed
    others = np.concatenate([normal(rng, 5, columns), values[-2:]])
    kept = min(2, tokens)
    np.testing.assert_array_equal(product(others)[0][-kept:], found[-kept:])


def tiles_of(
    picks: np.ndarray, records: list[Handle], experts: list[int], rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(tiles, order) of the pairs of some experts, as device_batch.c makes them; shuffled within each by `rng`."""
    tiles, order = [], []
    for expert in experts:
        pairs = np.flatnonzero(picks.ravel() == expert)
        if rng is not None:
            rng.shuffle(pairs)
        for first in range(0, len(pairs), kernels.TILE_TOKENS):
            part = pairs[first : first + kernels.TILE_TOKENS]
            tiles.append((records[expert].pointer, len(order), len(part)))
            order += part.tolist()
    return np.array(tiles, TILE), np.array(order, np.int32)


def check_group(
    runner: Runner,
    rng: np.random.Generator,
    gate_type: str,
    down_type: str,
    ff: int,
    columns: int,
    tokens: int,
    experts: int,
    used: int,
    is_biased: bool = False,
) -> None:
    records, offsets, weights = make_records(runner, rng, experts, gate_type, down_type, ff, columns)
    picks = np.stack([rng.choice(experts, used, replace=False) for _ in range(tokens)]).astype(np.int32)
    pairs = tokens * used
    x, values = activations(runner, gate_type, normal(rng, tokens, columns))
    shared, scalar = normal(rng, tokens, columns), normal(rng, tokens)
    biases, form = expert_form(runner, rng, picks, (experts, ff, columns), is_biased=is_biased)
    shares = rng.uniform(0, 1, (tokens, used)).astype(np.float32)

    def run(waves: list[list[int]], shuffle: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        hidden = runner.put(np.full((pairs, kernels.q8_row_bytes(ff)), 0xAA, np.uint8))
        floats, out = runner.put(poison(pairs, ff)), runner.put(poison(pairs, columns))
        for wave in waves:
            tiles, order = tiles_of(picks, records, wave, shuffle)
            if not len(tiles):
                continue
            tile, sorted_pairs = runner.put(tiles.view(np.uint8)), runner.put(order)
            runner.launch(
                f"group_gate_up_{gate_type}", kernels.group_gate_up_grid(ff, len(tiles)), tile, sorted_pairs, 0,
                offsets["up"], x, hidden, floats, ff, columns, used, form, 0,
            )  # fmt: skip
            runner.launch(
                f"group_down_{down_type}", kernels.group_down_grid(columns, len(tiles)), tile, sorted_pairs,
                offsets["down"], floats if down_type in kernels.FLOAT_TYPES else hidden, out, columns, ff, 0, columns,
            )  # fmt: skip
        y = runner.put(poison(tokens, columns))
        runner.launch(
            "combine_picks", (kernels.up(columns, 256), tokens, 1), out, runner.put(shares), runner.put(shared),
            runner.put(scalar), y, columns, used, form, 0, columns,
        )  # fmt: skip
        return y.get(), (floats.get() if down_type in kernels.FLOAT_TYPES else ref.from_q8(hidden.get(), ff))

    found, hidden = run([list(range(experts))])
    want = ref.sigmoid(scalar.astype(np.float64))[:, None] * shared
    for pair, expert in enumerate(picks.ravel()):
        gate, up, down = weights[expert]
        token = pair // used
        gate_bias, up_bias, down_bias = (bias[expert] for bias in biases)
        products = values[token] @ gate.T + gate_bias, values[token] @ up.T + up_bias
        exact = ref.hidden(*products, is_clamped=is_biased)
        rounding = 1e-5 if down_type in kernels.FLOAT_TYPES else 0.02
        assert ref.error(hidden[pair], exact) < rounding
        want[token] += shares.ravel()[pair].astype(np.float64) * (hidden[pair] @ down.T + down_bias)
    assert ref.error(found, want) < 1e-5
    order = rng.permutation(experts)
    cut = int(rng.integers(1, experts))
    again, _ = run([order[:cut].tolist(), order[cut:].tolist()], rng)
    np.testing.assert_array_equal(again, found)
