"""Every kernel on the CPU double: fresh random inputs, odd shapes, against float64 numpy."""

from __future__ import annotations

import ctypes
import re
import threading

import numpy as np
import pytest

from fomoe_io.experts.car import CarRule
from fomoe_io.gpu import kernels
from tests.gpu_shim import cases, router_cases, tile_cases
from tests.gpu_shim.cpu_kernels import CpuRunner, build
from tests.unit.test_car import RULES


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> CpuRunner:
    return CpuRunner(build(tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(sum(request.node.name.encode()))


def test_signatures_are_what_the_compiler_sees(runner: CpuRunner) -> None:
    for name, kernel in runner.table.items():
        signature = getattr(runner.library, f"{name}__signature")
        signature.restype = ctypes.c_char_p
        assert signature().decode() == kernel.signature, name
        assert getattr(runner.library, f"{name}__block_threads")() == kernel.threads, name


@pytest.mark.parametrize(("columns", "tokens"), [(64, 1), (256, 3), (1056, 2)])
def test_quantize(runner: CpuRunner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    cases.check_quantize(runner, rng, columns, tokens)


@pytest.mark.parametrize("name", kernels.TYPES)
@pytest.mark.parametrize(("rows", "blocks", "tokens"), [(1, 1, 1), (13, 3, 1), (9, 9, 3), (3, 2, 9)])
def test_mat_vec(runner: CpuRunner, rng: np.random.Generator, name: str, rows: int, blocks: int, tokens: int) -> None:
    columns = blocks * (32 if name in ("q8_0", "mxfp4") else 8 if name in kernels.FLOAT_TYPES else 256)
    cases.check_mat_vec(runner, rng, name, rows, columns, tokens)


@pytest.mark.parametrize("name", kernels.TYPES)
def test_mat_vec_of_long_rows(runner: CpuRunner, rng: np.random.Generator, name: str) -> None:
    cases.check_mat_vec(runner, rng, name, 3, 2304, 1)


@pytest.mark.parametrize("name", kernels.TYPES)
@pytest.mark.parametrize(("rows", "blocks", "tokens"), [(1, 1, 1), (70, 2, 17), (130, 3, 5)])
def test_mat_mul(runner: CpuRunner, rng: np.random.Generator, name: str, rows: int, blocks: int, tokens: int) -> None:
    columns = blocks * (32 if name in ("q8_0", "mxfp4") else 8 if name in kernels.FLOAT_TYPES else 256)
    tile_cases.check_mat_mul(runner, rng, name, rows, columns, tokens)


@pytest.mark.parametrize(
    ("gate_type", "down_type", "ff", "columns", "tokens", "experts", "used"),
    [("q4_k", "q6_k", 256, 256, 19, 3, 2), ("q5_k", "q8_0", 96, 256, 5, 4, 1), ("q6_k", "q4_k", 256, 512, 3, 2, 2),
     ("q8_0", "q5_k", 256, 96, 4, 3, 2), ("f32", "bf16", 64, 96, 18, 2, 1), ("bf16", "f16", 32, 32, 3, 3, 3)],
)  # fmt: skip
def test_group(
    runner: CpuRunner, rng: np.random.Generator, gate_type: str, down_type: str, ff: int, columns: int, tokens: int,
    experts: int, used: int,
) -> None:  # fmt: skip
    tile_cases.check_group(runner, rng, gate_type, down_type, ff, columns, tokens, experts, used)


@pytest.mark.parametrize("name", kernels.TYPES)
@pytest.mark.parametrize("rows", [[5, 1, 13, 8], [16, 3], [1]])
def test_mat_vec_many(runner: CpuRunner, rng: np.random.Generator, name: str, rows: list[int]) -> None:
    cases.check_mat_vec_many(runner, rng, name, rows, 512)


@pytest.mark.parametrize("name", kernels.TYPES)
def test_expand(runner: CpuRunner, rng: np.random.Generator, name: str) -> None:
    cases.check_expand(runner, rng, name, 5, 1280)


@pytest.mark.parametrize(
    ("gate_type", "down_type"),
    [("q4_k", "q6_k"), ("q5_k", "q4_k"), ("q6_k", "q5_k"), ("q8_0", "q8_0"), ("mxfp4", "q8_0"), ("f16", "f16"),
     ("bf16", "f32"), ("f32", "q8_0")],
)  # fmt: skip
def test_experts(runner: CpuRunner, rng: np.random.Generator, gate_type: str, down_type: str) -> None:
    cases.check_experts(runner, rng, gate_type, down_type, 256, 512, 3, 2)


@pytest.mark.parametrize(("gate_type", "down_type"), [("mxfp4", "mxfp4"), ("q8_0", "f32"), ("f32", "q4_k")])
def test_experts_with_biases_and_clamps(
    runner: CpuRunner, rng: np.random.Generator, gate_type: str, down_type: str
) -> None:
    cases.check_experts(runner, rng, gate_type, down_type, 256, 96, 3, 1, is_biased=True)
    cases.check_experts(runner, rng, gate_type, down_type, 256, 32, 2, 2, is_biased=True)
    tile_cases.check_group(runner, rng, gate_type, down_type, 256, 96, 18, 3, 2, is_biased=True)


def test_experts_of_an_odd_number_of_blocks(runner: CpuRunner, rng: np.random.Generator) -> None:
    cases.check_experts(runner, rng, "q6_k", "q8_0", 96, 768, 5, 1)


def test_an_absent_expert_is_never_silence(runner: CpuRunner, rng: np.random.Generator) -> None:
    cases.check_absent_expert_is_nan(runner, rng)


@pytest.mark.parametrize(("columns", "tokens"), [(32, 1), (1568, 3)])
def test_rms_norm(runner: CpuRunner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    cases.check_rms_norm(runner, rng, columns, tokens)


def test_add_bias(runner: CpuRunner, rng: np.random.Generator) -> None:
    cases.check_add_bias(runner, rng, 320, 3)
    cases.check_ungroup(runner, rng, 3, 100, 2)


def test_silu_mul(runner: CpuRunner, rng: np.random.Generator) -> None:
    cases.check_silu_mul(runner, rng, 288, 2)


@pytest.mark.parametrize("cache", ["f32", "f16"])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "positions", "rotary", "gated"),
    [(64, 3, 3, [0], 64, False), (128, 4, 2, [62, 63, 64], 32, True), (256, 12, 1, [130], 64, True)],
)
def test_attention(
    runner: CpuRunner,
    rng: np.random.Generator,
    cache: str,
    dim: int,
    heads: int,
    kv_heads: int,
    positions: list[int],
    rotary: int,
    gated: bool,
) -> None:
    cases.check_attention(runner, rng, cache, dim, heads, kv_heads, positions, rotary, gated)


@pytest.mark.parametrize("cache", ["f32", "f16"])
@pytest.mark.parametrize(
    ("positions", "window"), [([0], 1), ([62, 63, 64], 1), ([30, 31, 32], 32), ([130, 131], 33), ([130], 500)]
)
def test_attention_with_sinks_and_a_window(
    runner: CpuRunner, rng: np.random.Generator, cache: str, positions: list[int], window: int
) -> None:
    cases.check_attention(runner, rng, cache, 64, 6, 2, positions, 64, False, window)
    cases.check_attention(runner, rng, cache, 32, 4, 2, positions, 32, False, window)
    cases.check_attention(runner, rng, cache, 32, 4, 2, positions, 32, False, window, window + len(positions) - 1)


@pytest.mark.parametrize(("channels", "taps", "tokens"), [(130, 4, 1), (64, 4, 7), (33, 2, 3)])
def test_conv(runner: CpuRunner, rng: np.random.Generator, channels: int, taps: int, tokens: int) -> None:
    cases.check_conv(runner, rng, channels, taps, tokens)


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "key_heads", "value_heads", "is_grouped", "tokens"),
    [(128, 128, 2, 4, False, 1), (64, 32, 3, 6, True, 4)],
)
def test_delta(
    runner: CpuRunner,
    rng: np.random.Generator,
    k_dim: int,
    v_dim: int,
    key_heads: int,
    value_heads: int,
    is_grouped: bool,
    tokens: int,
) -> None:
    cases.check_delta(runner, rng, k_dim, v_dim, key_heads, value_heads, is_grouped, tokens)


@pytest.mark.parametrize(("experts", "picks", "tokens"), [(32, 4, 3), (512, 10, 2), (1000, 32, 1), (5, 5, 1)])
def test_route(runner: CpuRunner, rng: np.random.Generator, experts: int, picks: int, tokens: int) -> None:
    router_cases.check_route(runner, rng, experts, picks, tokens)
    for score in ("softmax", "sigmoid", "logits"):
        for is_biased in (False, True):
            router_cases.check_route_by(runner, rng, experts, picks, tokens, score, is_biased)


def test_resolve(runner: CpuRunner, rng: np.random.Generator) -> None:
    router_cases.check_resolve(runner, rng, 128, 8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_biased", [False, True])
def test_substitution(runner: CpuRunner, rng: np.random.Generator, rule: str, is_biased: bool) -> None:
    shapes, parsed = ((128, 8), (512, 10), (40, 4)), CarRule.parse(rule)
    assert sum(router_cases.check_substitution(runner, rng, *shape, parsed, is_biased) for shape in shapes) > 0


def test_nan_logits_show(runner: CpuRunner, rng: np.random.Generator) -> None:
    router_cases.check_nan_logits_show(runner, rng)


def test_read_memory(runner: CpuRunner, rng: np.random.Generator) -> None:
    cases.check_read_memory(runner, rng, 40_016, 3)


def answer_words(records: list[int], number: int) -> np.ndarray:
    """struct answer of kernels/experts.h: records, then the run that has brought gate and up, then the whole."""
    pairs = len(records)
    words = np.zeros(2 * pairs, np.uint64)
    words[:pairs] = records
    words.view(np.uint32)[2 * pairs :] = number
    return words


@pytest.mark.parametrize("word", ["answer", "stop"])
def test_wait_for_misses(runner: CpuRunner, word: str) -> None:
    misses, run, stop = (runner.put(np.array([value], np.uint32)) for value in (2, 7, 0))
    here = runner.put(np.array([0, 600, 0], np.uint64))
    reply = runner.put(answer_words([500, 0, 700], 6))  # the words of the run before
    late = runner.put(np.array([500, 0, 0], np.uint64))
    arguments = (misses, here, reply, run, stop, late, 3)
    waiter = threading.Thread(target=runner.launch, args=("wait_for_misses", (1, 1, 1), *arguments))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    if word == "stop":  # what has come by then is computed all the same
        ctypes.c_uint32.from_address(stop.pointer).value = 1
    for pair in (0, 2) if word == "answer" else ():
        ctypes.c_uint32.from_address(reply.pointer + 3 * 8 + 4 * (3 + pair)).value = 7
    waiter.join(10)
    assert not waiter.is_alive()
    assert late.get().tolist() == ([500, 0, 700] if word == "answer" else [0, 0, 0])


def test_nobody_waits_when_nothing_is_missing(runner: CpuRunner) -> None:
    misses, run, stop = (runner.put(np.array([value], np.uint32)) for value in (0, 7, 0))
    here, reply, late = (runner.put(words) for words in (np.zeros(1, np.uint64), answer_words([500], 6), np.zeros(1)))
    runner.launch("wait_for_misses", (1, 1, 1), misses, here, reply, run, stop, late, 1)
    assert late.get()[0] == 0


@pytest.mark.parametrize("word", ["answer", "stop"])
def test_late_experts_are_computed_as_they_come(runner: CpuRunner, rng: np.random.Generator, word: str) -> None:
    """The first pair's kernel waits for its inputs, not for the rest of it, and passes on where it is."""
    records, offsets, _ = cases.make_records(runner, rng, 2, "q4_k", "q4_k", 256, 256)
    x = cases.quantized(runner, cases.normal(rng, 1, 256))
    run, stop = runner.put(np.array([7], np.uint32)), runner.put(np.zeros(1, np.uint32))
    reply, late = runner.put(answer_words([0, 0], 6)), runner.put(np.zeros(2, np.uint64))
    results = []
    for here in (np.array([records[0].pointer, records[1].pointer], np.uint64), np.array([0, records[1].pointer])):
        hidden, table = (
            runner.put(np.zeros((2, kernels.q8_row_bytes(256)), np.uint8)),
            runner.put(here.astype(np.uint64)),
        )
        shape = (0, offsets["up"], x, hidden, None, 256, 256, 2, None)
        runner.launch("experts_gate_up_q4_k", kernels.gate_up_grid(256, 2), table, *shape)
        arguments = (table, late, reply, run, stop, *shape)
        waiter = threading.Thread(
            target=runner.launch, args=("experts_gate_up_late_q4_k", kernels.gate_up_grid(256, 2), *arguments)
        )
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive() == (not here[0])
        if not here[0] and word == "answer":
            ctypes.c_uint64.from_address(reply.pointer).value = records[0].pointer
            ctypes.c_uint32.from_address(reply.pointer + 2 * 8).value = 7
        elif not here[0]:
            ctypes.c_uint32.from_address(stop.pointer).value = 1
        waiter.join(10)
        assert not waiter.is_alive()
        results.append(hidden.get())
    assert late.get().tolist() == ([records[0].pointer, 0] if word == "answer" else [0, 0])
    np.testing.assert_array_equal(results[1][1], results[0][1])
    assert (results[1][0] == results[0][0]).all() == (word == "answer")


@pytest.mark.parametrize("name", kernels.EXPANDED_TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (13, 768), (67, 512)])
def test_expand_half(runner: CpuRunner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    cases.check_expand_half(runner, rng, name, rows, columns)


@pytest.mark.parametrize("elements", [32, 1024, 5 * 1056])
def test_to_halves(runner: CpuRunner, rng: np.random.Generator, elements: int) -> None:
    cases.check_to_halves(runner, rng, elements)


def test_every_kernel_waits_for_the_one_before_it() -> None:
    """A chained launch starts early: whatever its kernel did before start_kernel() could meet unfinished work."""
    text = "".join(kernels.sources().values())
    group = r"\((?:[^()]|\([^()]*\))*\)"
    starts = re.findall(rf"\b(?:RESIDENT_)?KERNEL{group}[\s\\]*{group}[\s\\]*{{[\s\\]*(\w+)\(", text)
    assert len(starts) == text.count("EXPORT_KERNEL(") - text.count("#define EXPORT_KERNEL(")
    assert set(starts) == {"start_kernel"}
