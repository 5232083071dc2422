"""Checks of every kernel against float64 numpy.  A runner launches them: on the CPU double or on a real device."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fomoe_io.gpu import kernels
from fomoe_io.gpu.launches import FORM
from tests.gpu_shim import reference as ref

# Float32 arithmetic in another order, and exp to 2 ulp: far below 1e-5 of the norm, far above any wrong index.
CLOSE = 3e-6


class Handle(Protocol):
    pointer: int
    parts: list[Handle]

    def get(self) -> np.ndarray: ...


class Runner(Protocol):
    def put(self, array: np.ndarray) -> Handle: ...

    def launch(self, name: str, grid: tuple[int, int, int], *arguments: Any) -> None: ...


def poison(*shape: int) -> np.ndarray:
    """Floats that no kernel may leave behind."""
    return np.full(shape, np.nan, np.float32)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def quantized(runner: Runner, x: np.ndarray) -> Handle:
    """x as Q8 rows on the device, by the kernel itself."""
    tokens, columns = x.shape
    row = runner.put(np.full((tokens, kernels.q8_row_bytes(columns)), 0xAA, np.uint8))
    runner.launch("quantize_q8", (kernels.up(columns, 256), tokens, 1), runner.put(x), row, columns)
    return row


def check_quantize(runner: Runner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    x = normal(rng, tokens, columns) * np.exp(normal(rng, tokens, 1))
    x[0, :32] = 0  # a group of zeros has no scale
    got = quantized(runner, x).get()
    want, values, d = ref.q8(x)
    # The scale is a division by 127: a GPU's own division may differ in the last bit, and a byte on the edge by one.
    bytes_off = np.abs(got[:, :columns].view(np.int8).astype(int) - want[:, :columns].view(np.int8))
    assert bytes_off.max() <= 1 and bytes_off.mean() < 1e-3
    assert np.abs(ref.from_q8(got, columns) - x).max() <= np.abs(d).max() * 0.51
    assert ref.error(ref.from_q8(got, columns), values) < 1e-3
    got_pairs = np.ascontiguousarray(got[:, columns : columns + columns // 4]).view(np.float32).reshape(tokens, -1, 2)
    sums = got[:, :columns].view(np.int8).reshape(tokens, -1, 32).sum(axis=2, dtype=np.int32)
    np.testing.assert_allclose(got_pairs[..., 1], got_pairs[..., 0] * sums, rtol=1e-6)


def activations(runner: Runner, name: str, x: np.ndarray) -> tuple[Handle, np.ndarray]:
    """The vector as the type's kernels take it, and what it then stands for."""
    if name in kernels.FLOAT_TYPES:
        return runner.put(x), x.astype(np.float64)
    row = quantized(runner, x)
    return row, ref.from_q8(row.get(), x.shape[1])


def check_mat_vec(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int, tokens: int) -> None:
    data, weights = ref.random_weights(rng, name, rows, columns)
    x, values = activations(runner, name, normal(rng, tokens, columns))
    w, want = runner.put(data), values @ weights.T
    # Of what is added up, not of the sum: a few rows may sum to nearly nothing.
    summed = np.linalg.norm(np.abs(values) @ np.abs(weights).T)
    for split in {1, 2, kernels.split_of(name, columns)}:
        y = runner.put(poison(tokens, rows))
        grid = kernels.mat_vec_grid(name, rows, split, tokens)
        runner.launch(f"mat_vec_{name}", grid, w, x, y, rows, columns, split)
        assert np.linalg.norm(y.get() - want) < 1e-6 * summed, split


def check_planes(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    planes, (data, _) = kernels.PLANES[name], ref.random_weights(rng, name, rows, columns)
    x, _ = activations(runner, name, normal(rng, 1, columns))
    assert kernels.has_planes(name, columns) and not kernels.has_planes(name, columns - kernels.BLOCKS[name][0])
    found, w = [], runner.put(data)
    for kernel in (name, planes):
        if kernel == planes:
            runner.launch(f"to_planes_{name}", kernels.to_planes_grid(name, data.nbytes), w)
            np.testing.assert_array_equal(w.get(), ref.in_planes(name, data))
        y, split = runner.put(poison(rows)), kernels.split_of(kernel, columns)
        runner.launch(f"mat_vec_{kernel}", kernels.mat_vec_grid(kernel, rows, split), w, x, y, rows, columns, split)
        found.append(y.get())
    np.testing.assert_array_equal(*found)


def check_mat_vec_many(runner: Runner, rng: np.random.Generator, name: str, rows: list[int], columns: int) -> None:
    """Several matrices in one launch give the very bits of one launch each."""
    split = kernels.split_of(name, columns)
    x, _ = activations(runner, name, normal(rng, 1, columns))
    weights = [runner.put(ref.random_weights(rng, name, count, columns)[0]) for count in rows]
    alone, together = ([runner.put(poison(count)) for count in rows] for _ in range(2))
    for w, y, count in zip(weights, alone, rows, strict=True):
        runner.launch(f"mat_vec_{name}", kernels.mat_vec_grid(name, count, split), w, x, y, count, columns, split)
    unused = kernels.MAT_VEC_MANY - len(rows)
    blocks = sum(kernels.mat_vec_grid(name, count, split)[0] for count in rows)
    runner.launch(
        f"mat_vec_many_{name}", (blocks, 1, 1), *weights, *[None] * unused, *together, *[None] * unused, *rows,
        *[0] * unused, x, columns, split,
    )  # fmt: skip
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.get(), b.get())


def check_expand(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    data, weights = ref.random_weights(rng, name, rows, columns)
    ids = rng.integers(0, rows, 3).astype(np.int32)
    y = runner.put(poison(3, columns))
    grid = (kernels.up(columns, 1024), 3, 1)
    runner.launch(f"expand_{name}", grid, runner.put(data), runner.put(ids), y, columns)
    np.testing.assert_allclose(y.get(), weights[ids], rtol=1e-6, atol=1e-7)


def make_records(
    runner: Runner, rng: np.random.Generator, experts: int, gate_type: str, down_type: str, ff: int, columns: int
) -> tuple[list[Handle], dict[str, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Experts as records (gate | up | down), the offsets in a record, and their float64 weights."""
    records, weights, offsets = [], [], {}
    for _ in range(experts):
        gate, gate_values = ref.random_weights(rng, gate_type, ff, columns)
        up, up_values = ref.random_weights(rng, gate_type, ff, columns)
        down, down_values = ref.random_weights(rng, down_type, columns, ff)
        offsets = {"up": gate.nbytes, "down": gate.nbytes + up.nbytes}
        records.append(runner.put(np.concatenate([gate.ravel(), up.ravel(), down.ravel()])))
        weights.append((gate_values, up_values, down_values))
    return records, offsets, weights


def expert_form(
    runner: Runner, rng: np.random.Generator, ids: np.ndarray, sizes: tuple[int, int, int], *, is_biased: bool
) -> tuple[list[np.ndarray], Handle | None]:
    """Biases of gate, up and down, and what tells the kernels of them and of clamps; zeros and nothing without."""
    experts, ff, columns = sizes
    if not is_biased:
        return [np.zeros((experts, size), np.float32) for size in (ff, ff, columns)], None
    biases = [np.float32(scale) * normal(rng, experts, size) for scale, size in ((5, ff), (5, ff), (1, columns))]
    parts = [runner.put(part) for part in (ids.astype(np.int32), *biases)]
    words = struct.pack(FORM, *(part.pointer for part in parts), 1)
    form = runner.put(np.frombuffer(words, np.uint8))
    form.parts = parts  # they live as long
    return biases, form


def check_experts(
    runner: Runner,
    rng: np.random.Generator,
    gate_type: str,
    down_type: str,
    ff: int,
    columns: int,
    picks: int,
    tokens: int,
    is_biased: bool = False,
) -> None:
    """All resident, then some that have come late, then some read in place: right, and the same bits.

    With biases the activation is clamped, too, and the inputs reach its limits.
    """
    experts = picks + 2
    records, offsets, weights = make_records(runner, rng, experts, gate_type, down_type, ff, columns)
    ids = np.stack([rng.permutation(experts)[:picks] for _ in range(tokens)])
    share = rng.uniform(0.1, 1, (tokens, picks)).astype(np.float32)
    x, values = activations(runner, gate_type, normal(rng, tokens, columns))
    biases, form = expert_form(runner, rng, ids, (experts, ff, columns), is_biased=is_biased)
    shared, gate = normal(rng, tokens, columns), normal(rng, tokens)
    addresses = np.array([records[e].pointer for e in ids.ravel()], np.uint64)
    is_late = rng.random(addresses.size) < 0.4
    is_late[0], is_late[-1] = True, False
    pairs, results = addresses.size, []
    run, stop, reply = (
        runner.put(np.ones(1, np.uint32)),
        runner.put(np.zeros(1, np.uint32)),
        runner.put(np.zeros(pairs)),
    )
    for late_mask, in_place in ((np.zeros(pairs, bool), 0), (is_late, 0), (is_late, 1)):
        here = runner.put(np.where(late_mask, np.uint64(0), addresses))
        late = runner.put(np.where(late_mask, addresses | np.uint64(in_place), np.uint64(0)))
        hidden = runner.put(np.full((pairs, kernels.q8_row_bytes(ff)), 0xAA, np.uint8))
        floats = runner.put(poison(pairs, ff))
        y = runner.put(poison(tokens, columns))
        runner.launch(
            f"experts_gate_up_{gate_type}", kernels.gate_up_grid(ff, pairs), here, late, reply, run, stop,
            0, offsets["up"], x, hidden, floats, ff, columns, picks, form, 0, in_place,
        )  # fmt: skip
        runner.launch(
            f"experts_down_{down_type}", kernels.down_grid(columns, tokens),
            here, late, offsets["down"], hidden if down_type in kernels.QUANTIZED_TYPES else floats,
            runner.put(share), runner.put(shared), runner.put(gate), y, columns, ff, picks, form, 0, columns,
        )  # fmt: skip
        results.append((floats.get(), hidden.get(), y.get()))
    for result in results[1:]:
        for first, second in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(first, second)
    floats_got, hidden_got, y_got = results[0]
    want_hidden = np.empty((pairs, ff))
    want = shared * ref.sigmoid(gate.astype(np.float64))[:, None]
    hidden_used = ref.from_q8(hidden_got, ff) if down_type in kernels.QUANTIZED_TYPES else floats_got
    for pair in range(pairs):
        token, rank = divmod(pair, picks)
        expert = ids[token, rank]
        gate_w, up_w, down_w = weights[expert]
        gate_bias, up_bias, down_bias = (bias[expert] for bias in biases)
        products = gate_w @ values[token] + gate_bias, up_w @ values[token] + up_bias
        want_hidden[pair] = ref.hidden(*products, is_clamped=is_biased)
        want[token] += share[token, rank].astype(np.float64) * (down_w @ hidden_used[pair] + down_bias)
    assert ref.error(floats_got, want_hidden) < CLOSE
    np.testing.assert_allclose(ref.from_q8(hidden_got, ff), floats_got, atol=np.abs(floats_got).max() / 127 * 0.51)
    assert ref.error(y_got, want) < CLOSE


def check_absent_expert_is_nan(runner: Runner, rng: np.random.Generator) -> None:
    records, offsets, _ = make_records(runner, rng, 2, "q4_k", "q4_k", 256, 256)
    table = runner.put(np.array([records[0].pointer, 0], np.uint64))
    hidden = quantized(runner, normal(rng, 2, 256))
    y = runner.put(np.zeros((1, 256), np.float32))
    share = runner.put(np.array([0.5, 0.5], np.float32))
    runner.launch(
        "experts_down_q4_k", kernels.down_grid(256), table, None, offsets["down"], hidden, share, None, None, y,
        256, 256, 2, None, 0, 256,
    )  # fmt: skip
    assert np.isnan(y.get()).all()


def check_rms_norm(runner: Runner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    x, residual, weight = normal(rng, tokens, columns), normal(rng, tokens, columns), normal(rng, columns)
    for add in (None, residual):
        device_x, y = runner.put(x), runner.put(poison(tokens, columns))
        q8 = runner.put(np.full((tokens, kernels.q8_row_bytes(columns)), 0xAA, np.uint8))
        r = None if add is None else runner.put(add)
        runner.launch("rms_norm", (tokens, 1, 1), device_x, r, runner.put(weight), y, q8, columns, 1e-6)
        total = x if add is None else x + add
        np.testing.assert_array_equal(device_x.get(), total)
        got = y.get()
        assert ref.error(got, ref.rms_norm(total.astype(np.float64), weight, 1e-6)) < CLOSE
        np.testing.assert_array_equal(q8.get(), quantized(runner, got).get())


def check_add_bias(runner: Runner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    x, bias = normal(rng, tokens, columns), normal(rng, columns)
    device_x = runner.put(x)
    runner.launch("add_bias", (kernels.up(columns, 256), tokens, 1), device_x, runner.put(bias), columns)
    np.testing.assert_array_equal(device_x.get(), x + bias)


def check_silu_mul(runner: Runner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    gate, up = 20 * normal(rng, tokens, columns), normal(rng, tokens, columns)
    gate[0, :4] = (-200, 200, -88, 0)
    y = runner.put(poison(tokens, columns))
    q8 = runner.put(np.full((tokens, kernels.q8_row_bytes(columns)), 0xAA, np.uint8))
    grid = (kernels.up(columns, 256), tokens, 1)
    runner.launch("silu_mul", grid, runner.put(gate), runner.put(up), y, q8, columns)
    want = ref.silu(gate.astype(np.float64)) * up
    np.testing.assert_allclose(y.get(), want, rtol=2e-6, atol=1e-35)
    np.testing.assert_array_equal(q8.get(), quantized(runner, y.get()).get())


def check_attention(
    runner: Runner,
    rng: np.random.Generator,
    cache: str,
    dim: int,
    heads: int,
    kv_heads: int,
    positions: list[int],
    rotary: int,
    gated: bool,
    window: int = 0,
    ring: int = 0,
) -> None:
    """Norm, rope, cache, attention and merge of consecutive tokens over a cache that holds what came before.

    With a window the heads have sinks, too; a `ring` holds the window's positions and no others.
    """
    sinks = normal(rng, heads) if window else None
    tokens, context, eps = len(positions), max(positions) + 1, 1e-6
    q_stride = 2 * dim if gated else dim
    q, k, v = (
        normal(rng, tokens, heads, q_stride),
        normal(rng, tokens, kv_heads, dim),
        normal(rng, tokens, kv_heads, dim),
    )
    q_norm, k_norm = normal(rng, dim), normal(rng, dim)
    element = np.float32 if cache == "f32" else np.float16
    keys, values = (normal(rng, context, kv_heads, dim).astype(element) for _ in range(2))
    every = np.arange(context)[:, None] * 1e4 ** (-2 * np.arange(rotary // 2) / rotary)
    turns = np.stack([np.cos(every), np.sin(every)], axis=2).astype(np.float32)
    angles = every[positions]
    place = runner.put(np.array(positions, np.int32))
    slots = np.arange(context) % ring if ring else np.arange(context)
    in_ring = [np.zeros((ring or context, kv_heads, dim), element) for _ in range(2)]
    for stored_rows, rows in zip(in_ring, (keys, values), strict=True):
        stored_rows[slots] = rows  # later positions over earlier ones
    device_q, device_keys, device_values = runner.put(q), *(runner.put(rows) for rows in in_ring)
    q_out = runner.put(poison(tokens, heads, dim))
    runner.launch(
        f"attention_prepare_{cache}", (heads + 2 * kv_heads, tokens, 1),
        device_q, runner.put(k), runner.put(v), runner.put(q_norm), runner.put(k_norm), runner.put(turns), place,
        None, q_out, device_keys, device_values, heads, kv_heads, dim, q_stride, rotary, eps, ring,
    )  # fmt: skip
    want_q = ref.rope(ref.rms_norm(q[..., :dim].astype(np.float64), q_norm, eps), angles)
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    keys[positions] = ref.rope(ref.rms_norm(k.astype(np.float64), k_norm, eps), angles)
    values[positions] = v
    close = CLOSE if cache == "f32" else 5e-4  # f16 keeps 11 bits
    assert ref.error(q_out.get(), want_q) < CLOSE
    last = slice(-ring, None)
    kept = [rows.get()[slots[last]] for rows in (device_keys, device_values)]
    assert ref.error(kept[0], keys[last]) < close
    assert ref.error(kept[1], values[last]) < close

    splits = kernels.attention_splits(context) + 1  # one more than this context fills
    parts = runner.put(poison(tokens, heads, splits, dim + 2))
    y = runner.put(poison(tokens, heads * dim))
    q8 = runner.put(np.full((tokens, kernels.q8_row_bytes(heads * dim)), 0xAA, np.uint8))
    runner.launch(
        f"attention_{cache}_{dim}", kernels.attention_grid(heads, kv_heads, splits, tokens),
        q_out, device_keys, device_values, place, None, parts, heads, kv_heads, splits, dim**-0.5, window, ring,
    )  # fmt: skip
    gate = runner.put(q[..., dim:]) if gated else None
    runner.launch("attention_merge", (heads, tokens, 1), parts, place, gate, y, q8, heads, dim, splits, dim,
                  None if sinks is None else runner.put(sinks), window)  # fmt: skip
    stored = [rows.get()[slots].astype(np.float64) for rows in (device_keys, device_values)]
    want = ref.attention(q_out.get().astype(np.float64), *stored, np.array(positions), dim**-0.5, sinks, window)
    if gated:
        want = want * ref.sigmoid(q[..., dim:].astype(np.float64))
    assert ref.error(y.get(), want.reshape(tokens, -1)) < 2 * CLOSE
    np.testing.assert_array_equal(q8.get(), quantized(runner, y.get()).get())


def states_of(runner: Runner, state: Handle, runs: Sequence[int]) -> Handle:
    """Where each token's session has its state, `runs` tokens of each in turn."""
    each = state.get().nbytes // len(runs)
    return runner.put(np.repeat([state.pointer + i * each for i in range(len(runs))], runs).astype(np.uint64))


def check_conv(runner: Runner, rng: np.random.Generator, channels: int, taps: int, runs: Sequence[int]) -> None:
    weight, state = normal(rng, channels, taps), normal(rng, len(runs), taps - 1, channels)
    x = normal(rng, sum(runs), channels)
    device_state, y = runner.put(state if taps > 1 else np.zeros(1)), runner.put(poison(len(x), channels))
    states, place = (states_of(runner, device_state, runs), None) if len(runs) > 1 else (None, device_state)
    inputs = (runner.put(weight), runner.put(x))
    runner.launch("conv_step", (kernels.up(channels, 32), 1, 1), *inputs, states, place, y, channels, taps, len(x))
    if runs == [1]:
        state_of_one, of_one = runner.put(state if taps > 1 else np.zeros(1)), runner.put(poison(1, channels))
        grid = (kernels.up(channels, 128), 1, 1)
        runner.launch("conv_token", grid, *inputs, None, state_of_one, of_one, channels, taps)
        np.testing.assert_array_equal(of_one.get(), y.get())
        np.testing.assert_array_equal(state_of_one.get(), device_state.get())
    kept = device_state.get() if taps > 1 else state
    for before, after, now, found in zip(
        state, kept, *(np.split(a, np.cumsum(runs)[:-1]) for a in (x, y.get())), strict=True
    ):
        row = np.concatenate([before, now]).astype(np.float64)
        want = ref.silu(np.stack([(row[t : t + taps].T * weight).sum(axis=1) for t in range(len(now))]))
        assert ref.error(found, want) < CLOSE
        np.testing.assert_array_equal(after, row[len(now) :].astype(np.float32))


def check_delta(
    runner: Runner,
    rng: np.random.Generator,
    k_dim: int,
    v_dim: int,
    key_heads: int,
    value_heads: int,
    is_grouped: bool,
    runs: Sequence[int],
) -> None:
    width, tokens = 2 * key_heads * k_dim + value_heads * v_dim, sum(runs)
    mixed, state = normal(rng, tokens, width), normal(rng, len(runs), value_heads, v_dim, k_dim)
    alpha, beta = 5 * normal(rng, tokens, value_heads), normal(rng, tokens, value_heads)
    dt, a = normal(rng, value_heads), -np.exp(normal(rng, value_heads))
    alpha[0, 0] = 30  # softplus is the identity there
    device_state, y = runner.put(state), runner.put(poison(tokens, value_heads, v_dim))
    states, place = (states_of(runner, device_state, runs), None) if len(runs) > 1 else (None, device_state)
    runner.launch(
        f"delta_step_{k_dim}", (v_dim // 16, value_heads, 1),
        runner.put(mixed), runner.put(alpha), runner.put(beta), runner.put(dt), runner.put(a), states, place, y,
        key_heads, value_heads, v_dim, int(is_grouped), tokens, 1e-6,
    )  # fmt: skip
    wide = mixed.astype(np.float64)
    q, k = (wide[:, i * key_heads * k_dim :][:, : key_heads * k_dim].reshape(tokens, key_heads, k_dim) for i in (0, 1))
    v = wide[:, 2 * key_heads * k_dim :].reshape(tokens, value_heads, v_dim)
    heads = np.arange(value_heads)
    key_head_of = heads // (value_heads // key_heads) if is_grouped else heads % key_heads
    want_state = state.astype(np.float64)
    rows = [np.split(x, np.cumsum(runs)[:-1]) for x in (q, k, v, alpha.astype(np.float64), beta.astype(np.float64))]
    want = np.concatenate([
        ref.delta_rule(*now, dt, a, of_session, key_head_of, 1e-6)
        for *now, of_session in zip(*rows, want_state, strict=True)
    ])  # fmt: skip
    assert ref.error(y.get(), want) < CLOSE
    assert ref.error(device_state.get(), want_state) < CLOSE

    o, z, weight = y.get(), normal(rng, tokens, value_heads, v_dim), normal(rng, v_dim)
    out = runner.put(poison(tokens, value_heads * v_dim))
    q8 = runner.put(np.full((tokens, kernels.q8_row_bytes(value_heads * v_dim)), 0xAA, np.uint8))
    runner.launch(
        "gated_norm", (kernels.up(value_heads, 4), tokens, 1), y, runner.put(z), runner.put(weight), out, q8,
        value_heads, v_dim, 1e-6,
    )  # fmt: skip
    want = ref.rms_norm(o.astype(np.float64), weight, 1e-6) * ref.silu(z.astype(np.float64))
    assert ref.error(out.get(), want.reshape(tokens, -1)) < CLOSE
    np.testing.assert_array_equal(q8.get(), quantized(runner, out.get()).get())


def check_ungroup(runner: Runner, rng: np.random.Generator, groups: int, length: int, tokens: int) -> None:
    x, y = normal(rng, tokens, groups, length + 5), poison(tokens, groups * length + 3)
    out = runner.put(y)
    grid = (kernels.up(groups * length, 256), tokens, 1)
    runner.launch("ungroup", grid, runner.put(x), out, groups, length + 5, 2, length, groups * length + 3, 1)
    y[:, 1:-2] = x[:, :, 2 : 2 + length].reshape(tokens, -1)
    np.testing.assert_array_equal(out.get(), y)


def check_read_memory(runner: Runner, rng: np.random.Generator, nbytes: int, blocks: int) -> None:
    data = rng.integers(0, 1 << 32, nbytes // 4, dtype=np.uint32)
    folded = runner.put(np.zeros(8 * blocks, np.uint32))
    runner.launch("read_memory", (blocks, 1, 1), runner.put(data), nbytes, folded, blocks)
    assert np.bitwise_xor.reduce(folded.get()) == np.bitwise_xor.reduce(data)


def check_expand_half(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    """Every weight is the half nearest to its float; nothing is written behind the last."""
    data, weights = ref.random_weights(rng, name, rows, columns)
    y = runner.put(np.full(rows * columns + 8, 7, np.float16))
    grid = kernels.expand_half_grid(name, rows * columns)
    runner.launch(f"expand_half_{name}", grid, runner.put(data), y, rows * columns)
    got = y.get()
    np.testing.assert_array_equal(got[:-8].reshape(rows, columns), weights.astype(np.float32).astype(np.float16))
    np.testing.assert_array_equal(got[-8:], 7)


def check_to_halves(runner: Runner, rng: np.random.Generator, elements: int) -> None:
    """What is beyond the range of halves becomes their largest; what is not finite stays so."""
    x = normal(rng, elements) * np.float32(10) ** rng.integers(-9, 9, elements).astype(np.float32)
    x[:8] = np.nan, np.inf, -np.inf, 65519, -65519, 65520, 1e30, -3e38
    y = runner.put(np.full(elements + 4, 7, np.float16))
    runner.launch("to_halves", kernels.to_halves_grid(elements), runner.put(x), y, elements)
    want = np.where(np.isfinite(x), np.clip(x, -65504, 65504), x).astype(np.float16)
    np.testing.assert_array_equal(y.get(), np.append(want, np.full(4, 7, np.float16)))
