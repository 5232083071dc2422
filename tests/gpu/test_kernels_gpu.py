"""Every kernel on a real device, by the same checks as on the CPU double.  Run with -m gpu."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from fomoe_io.errors import DeviceError
from fomoe_io.experts.car import CarRule
from fomoe_io.gpu import device, kernels
from fomoe_io.gpu.device import Gpu
from tests.gpu_shim import cases, router_cases, tile_cases
from tests.gpu_shim.device_runner import DeviceRunner
from tests.unit.test_car import RULES

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    try:
        return Gpu()
    except DeviceError as problem:
        pytest.skip(problem.message)


@pytest.fixture(scope="session")
def runner(gpu: Gpu) -> DeviceRunner:
    return DeviceRunner(gpu)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(sum(request.node.name.encode()))


def test_nothing_spills(gpu: Gpu) -> None:
    assert {name: gpu.resources(name)[1] for name in gpu.table} == dict.fromkeys(gpu.table, 0)


@pytest.mark.parametrize(("columns", "tokens"), [(64, 1), (1056, 2), (4096, 7)])
def test_quantize(runner: DeviceRunner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    cases.check_quantize(runner, rng, columns, tokens)


@pytest.mark.parametrize("name", kernels.TYPES)
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(1, 256, 1), (13, 768, 3), (517, 4096, 9), (4096, 1024, 1)])
def test_mat_vec(
    runner: DeviceRunner, rng: np.random.Generator, name: str, rows: int, columns: int, tokens: int
) -> None:
    cases.check_mat_vec(runner, rng, name, rows, columns, tokens)


@pytest.mark.parametrize("name", kernels.TYPES)
@pytest.mark.parametrize(("rows", "blocks", "tokens"), [(1, 1, 1), (70, 2, 17), (130, 3, 5), (4096, 16, 128)])
def test_mat_mul(
    runner: DeviceRunner, rng: np.random.Generator, name: str, rows: int, blocks: int, tokens: int
) -> None:
    columns = blocks * (32 if name in ("q8_0", "mxfp4") else 8 if name in kernels.FLOAT_TYPES else 256)
    tile_cases.check_mat_mul(runner, rng, name, rows, columns, tokens)


@pytest.mark.parametrize(
    ("gate_type", "down_type", "ff", "columns", "tokens", "experts", "used"),
    [("q4_k", "q6_k", 256, 256, 19, 3, 2), ("q4_k", "q4_k", 1024, 2048, 128, 16, 4),
     ("q5_k", "q5_k", 1024, 2048, 64, 8, 4),
     ("q6_k", "q6_k", 1024, 2048, 64, 8, 4), ("q5_k", "q8_0", 96, 256, 5, 4, 1), ("q6_k", "q4_k", 256, 512, 3, 2, 2),
     ("q8_0", "q5_k", 256, 96, 4, 3, 2), ("f32", "bf16", 64, 96, 18, 2, 1), ("bf16", "f16", 32, 32, 3, 3, 3)],
)  # fmt: skip
def test_group(
    runner: DeviceRunner, rng: np.random.Generator, gate_type: str, down_type: str, ff: int, columns: int, tokens: int,
    experts: int, used: int,
) -> None:  # fmt: skip
    tile_cases.check_group(runner, rng, gate_type, down_type, ff, columns, tokens, experts, used)


@pytest.mark.parametrize("name", kernels.TYPES)
@pytest.mark.parametrize("rows", [[5, 1, 13, 8], [16, 3], [1]])
def test_mat_vec_many(runner: DeviceRunner, rng: np.random.Generator, name: str, rows: list[int]) -> None:
    cases.check_mat_vec_many(runner, rng, name, rows, 512)


@pytest.mark.parametrize("name", kernels.TYPES)
def test_expand(runner: DeviceRunner, rng: np.random.Generator, name: str) -> None:
    cases.check_expand(runner, rng, name, 64, 4096)


@pytest.mark.parametrize(
    ("gate_type", "down_type"),
    [("q4_k", "q6_k"), ("q5_k", "q4_k"), ("q6_k", "q5_k"), ("q8_0", "q8_0"), ("mxfp4", "q8_0"), ("f16", "f16"),
     ("bf16", "f32"), ("f32", "q8_0")],
)  # fmt: skip
@pytest.mark.parametrize(("ff", "columns", "picks", "tokens"), [(256, 512, 3, 2), (512, 2048, 8, 1)])
def test_experts(
    runner: DeviceRunner,
    rng: np.random.Generator,
    gate_type: str,
    down_type: str,
    ff: int,
    columns: int,
    picks: int,
    tokens: int,
) -> None:
    cases.check_experts(runner, rng, gate_type, down_type, ff, columns, picks, tokens)


@pytest.mark.parametrize(("gate_type", "down_type"), [("mxfp4", "mxfp4"), ("q8_0", "f32"), ("f32", "q4_k")])
def test_experts_with_biases_and_clamps(
    runner: DeviceRunner, rng: np.random.Generator, gate_type: str, down_type: str
) -> None:
    cases.check_experts(runner, rng, gate_type, down_type, 256, 96, 3, 1, is_biased=True)
    cases.check_experts(runner, rng, gate_type, down_type, 256, 32, 2, 2, is_biased=True)
    tile_cases.check_group(runner, rng, gate_type, down_type, 256, 96, 18, 3, 2, is_biased=True)


def test_experts_of_an_odd_number_of_blocks(runner: DeviceRunner, rng: np.random.Generator) -> None:
    cases.check_experts(runner, rng, "q6_k", "q8_0", 96, 768, 5, 1)


def test_an_absent_expert_is_never_silence(runner: DeviceRunner, rng: np.random.Generator) -> None:
    cases.check_absent_expert_is_nan(runner, rng)


@pytest.mark.parametrize(("columns", "tokens"), [(32, 1), (1568, 3), (4096, 1)])
def test_rms_norm(runner: DeviceRunner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    cases.check_rms_norm(runner, rng, columns, tokens)


def test_add_bias(runner: DeviceRunner, rng: np.random.Generator) -> None:
    cases.check_add_bias(runner, rng, 1056, 3)
    cases.check_ungroup(runner, rng, 16, 130, 3)


def test_silu_mul(runner: DeviceRunner, rng: np.random.Generator) -> None:
    cases.check_silu_mul(runner, rng, 1024, 3)


@pytest.mark.parametrize("cache", ["f32", "f16"])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "positions", "rotary", "gated"),
    [(64, 3, 3, [0], 64, False), (128, 4, 2, [62, 63, 64], 32, True), (256, 32, 2, [1500], 64, True)],
)
def test_attention(
    runner: DeviceRunner,
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
    runner: DeviceRunner, rng: np.random.Generator, cache: str, positions: list[int], window: int
) -> None:
    cases.check_attention(runner, rng, cache, 64, 6, 2, positions, 64, False, window)
    cases.check_attention(runner, rng, cache, 32, 4, 2, positions, 32, False, window)
    cases.check_attention(runner, rng, cache, 32, 4, 2, positions, 32, False, window, window + len(positions) - 1)


@pytest.mark.parametrize(("channels", "taps", "tokens"), [(130, 4, 1), (12288, 4, 7), (33, 2, 3)])
def test_conv(runner: DeviceRunner, rng: np.random.Generator, channels: int, taps: int, tokens: int) -> None:
    cases.check_conv(runner, rng, channels, taps, tokens)


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "key_heads", "value_heads", "is_grouped", "tokens"),
    [(128, 128, 16, 64, False, 1), (128, 128, 2, 4, True, 9), (64, 32, 3, 6, True, 4)],
)
def test_delta(
    runner: DeviceRunner,
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
def test_route(runner: DeviceRunner, rng: np.random.Generator, experts: int, picks: int, tokens: int) -> None:
    router_cases.check_route(runner, rng, experts, picks, tokens)
    for score in ("softmax", "sigmoid", "logits"):
        for is_biased in (False, True):
            router_cases.check_route_by(runner, rng, experts, picks, tokens, score, is_biased)


def test_resolve(runner: DeviceRunner, rng: np.random.Generator) -> None:
    router_cases.check_resolve(runner, rng, 128, 8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_biased", [False, True])
def test_substitution(runner: DeviceRunner, rng: np.random.Generator, rule: str, is_biased: bool) -> None:
    shapes, parsed = ((128, 8), (512, 10), (40, 4)), CarRule.parse(rule)
    assert sum(router_cases.check_substitution(runner, rng, *shape, parsed, is_biased) for shape in shapes) > 0


def test_nan_logits_show(runner: DeviceRunner, rng: np.random.Generator) -> None:
    router_cases.check_nan_logits_show(runner, rng)


def test_read_memory(runner: DeviceRunner, rng: np.random.Generator) -> None:
    cases.check_read_memory(runner, rng, 10_000_016, 132)


def test_same_input_same_bits(runner: DeviceRunner, rng: np.random.Generator) -> None:
    """No sum depends on which block or stream came first."""
    data, _ = cases.ref.random_weights(rng, "q4_k", 4096, 4096)
    w, x = runner.put(data), cases.quantized(runner, cases.normal(rng, 1, 4096))
    results = set()
    for _ in range(20):
        y = runner.put(cases.poison(4096))
        runner.launch("mat_vec_q4_k", kernels.mat_vec_grid("q4_k", 4096, 2), w, x, y, 4096, 4096, 1, 2)
        results.add(y.get().tobytes())
    assert len(results) == 1


def test_a_miss_is_served_without_a_synchronisation(gpu: Gpu, rng: np.random.Generator) -> None:
    """The device posts its picks to host memory and waits; the host sees them, answers, and the stream goes on."""
    words = np.frombuffer(mmap.mmap(-1, 4096), np.uint32)
    registration = gpu.register(words)
    post, reply, stop = (registration.pointer + offset for offset in (0, 1024, 2048))
    experts, picks = 16, 4
    table, run = gpu.upload(np.zeros(experts, np.uint64)), gpu.upload(np.array([9, 0], np.uint32))
    misses, records = gpu.upload(np.zeros(1, np.uint32)), gpu.upload(np.zeros(picks, np.uint64))
    ids, weights, late = gpu.allocate(4 * picks), gpu.allocate(4 * picks), gpu.allocate(8 * picks)
    logits = gpu.upload(cases.normal(rng, experts))
    steps = [
        gpu.prepare("route_and_resolve", (1, 1, 1), logits, ids, weights, table, records, late, post, run, misses,
                    experts, picks, 1, 1.0),
        gpu.prepare("wait_for_misses", (1, 1, 1), misses, records, reply, run, stop, late, picks),
    ]  # fmt: skip
    graph, done = gpu.capture(steps), gpu.event()
    syncs = device.counts()["host_syncs"]
    graph.launch(gpu.stream)
    gpu.stream.record(done)
    posted = words[: 2 * (1 + 2 * picks)].view(np.uint64)
    while any(posted >> 32 != 9):
        pass
    assert not done.is_done()
    assert posted[0] & 0xFFFFFFFF == picks
    seen = (posted[1 : 1 + picks] & 0xFFFF).tolist()
    words[256 : 256 + 2 * picks : 2] = np.arange(100, 100 + picks)
    words[256 + 3 * picks : 256 + 4 * picks] = 9  # all of each is there
    while not done.is_done():
        pass
    assert device.counts()["host_syncs"] == syncs
    assert gpu.download(ids, (picks,), np.int32).tolist() == seen
    assert gpu.download(late, (picks,), np.uint64).tolist() == list(range(100, 100 + picks))
    registration.close()


def test_out_of_memory_is_one_line(gpu: Gpu) -> None:
    with pytest.raises(DeviceError, match=r"out of memory|OUT_OF_MEMORY") as caught:
        gpu.allocate(gpu.info.memory_bytes * 2)
    assert "--vram" in (caught.value.hint or "")


@pytest.mark.parametrize("name", kernels.EXPANDED_TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (13, 768), (67, 512)])
def test_expand_half(runner: DeviceRunner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    cases.check_expand_half(runner, rng, name, rows, columns)


@pytest.mark.parametrize("elements", [32, 1024, 5 * 1056])
def test_to_halves(runner: DeviceRunner, rng: np.random.Generator, elements: int) -> None:
    cases.check_to_halves(runner, rng, elements)
