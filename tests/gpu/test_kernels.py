"""Every kernel on its double and, with -m gpu, on a device: fresh random inputs, odd shapes, against float64 numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fomoe_io.errors import DeviceError
from fomoe_io.experts.car import CarRule
from fomoe_io.gpu import kernels
from fomoe_io.gpu.device import Gpu
from tests.gpu_shim import cases, latent_cases, prompt_cases, router_cases, share_cases, tile_cases
from tests.gpu_shim import reference as ref
from tests.gpu_shim.cases import Runner
from tests.gpu_shim.cpu_kernels import CpuRunner, build
from tests.gpu_shim.device_runner import DeviceRunner
from tests.unit.test_car import RULES


@pytest.fixture(scope="session")
def double(tmp_path_factory: pytest.TempPathFactory) -> CpuRunner:
    return CpuRunner(build(tmp_path_factory.mktemp("kernels")))


@pytest.fixture(scope="session")
def device() -> DeviceRunner:
    try:
        return DeviceRunner(Gpu())
    except DeviceError as problem:
        pytest.skip(problem.message)


@pytest.fixture
def runner(request: pytest.FixtureRequest) -> Runner:
    return request.getfixturevalue(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(sum(request.node.name.encode()))


def sized(names: str, small: Sequence[Any], larger: Sequence[Any] = ()) -> pytest.MarkDecorator:
    """On both with the small sizes; those that take the double long are a device's alone."""
    rows = [("double", size, ()) for size in small]
    rows += [("device", size, pytest.mark.gpu) for size in (*small, *larger)]
    values = [pytest.param(kind, *(s if isinstance(s, tuple) else (s,)), marks=marks) for kind, s, marks in rows]
    return pytest.mark.parametrize(f"runner,{names}", values, indirect=["runner"])


on_both = pytest.mark.parametrize("runner", ["double", pytest.param("device", marks=pytest.mark.gpu)], indirect=True)
any_type = pytest.mark.parametrize("name", kernels.TYPES)
stored_type = pytest.mark.parametrize("name", kernels.STORED_TYPES)
any_cache = pytest.mark.parametrize("cache", ["f32", "f16"])


def columns_of(name: str, blocks: int) -> int:
    """The fewest that a type's rows may have, so many times."""
    if name in kernels.PLANES.values():
        return ref.fitting(name, 1) * min(blocks, 2)
    return blocks * (32 if name in ("q8_0", "mxfp4") else 8 if name in kernels.FLOAT_TYPES else 256)


# ---- products ----


@sized("columns,tokens", [(64, 1), (256, 3), (1056, 2)], [(4096, 7)])
def test_quantize(runner: Runner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    cases.check_quantize(runner, rng, columns, tokens)


@any_type
@sized("rows,blocks,tokens", [(1, 1, 1), (13, 3, 1), (9, 9, 3), (3, 2, 9)], [(517, 16, 9), (4096, 4, 1)])
def test_mat_vec(runner: Runner, rng: np.random.Generator, name: str, rows: int, blocks: int, tokens: int) -> None:
    cases.check_mat_vec(runner, rng, name, rows, columns_of(name, blocks), tokens)


@any_type
@sized("rows,columns", [(3, 2304)], [(517, 4096), (4096, 1024)])
def test_mat_vec_of_long_rows(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    cases.check_mat_vec(runner, rng, name, rows, ref.fitting(name, columns), 1)


@any_type
@sized("rows,blocks,tokens", [(1, 1, 1), (70, 2, 43), (130, 3, 5)], [(4096, 16, 128)])
def test_mat_mul(runner: Runner, rng: np.random.Generator, name: str, rows: int, blocks: int, tokens: int) -> None:
    tile_cases.check_mat_mul(runner, rng, name, rows, columns_of(name, blocks), tokens)


@sized(
    "gate_type,down_type,ff,columns,tokens,experts,used",
    [("q4_k", "q6_k", 256, 256, 53, 3, 2), ("q5_k", "q8_0", 96, 256, 5, 4, 1), ("q6_k", "q4_k", 256, 512, 3, 2, 2),
     ("q8_0", "q5_k", 256, 96, 4, 3, 2), ("f32", "bf16", 64, 96, 70, 2, 1), ("bf16", "f16", 32, 32, 3, 3, 3)],
    [("q4_k", "q4_k", 1024, 2048, 128, 16, 4), ("q5_k", "q5_k", 1024, 2048, 64, 8, 4),
     ("q6_k", "q6_k", 1024, 2048, 64, 8, 4)],
)  # fmt: skip
def test_group(
    runner: Runner, rng: np.random.Generator, gate_type: str, down_type: str, ff: int, columns: int, tokens: int,
    experts: int, used: int,
) -> None:  # fmt: skip
    tile_cases.check_group(runner, rng, gate_type, down_type, ff, columns, tokens, experts, used)


@any_type
@on_both
@pytest.mark.parametrize("rows", [[5, 1, 13, 8], [16, 3], [1]])
def test_mat_vec_many(runner: Runner, rng: np.random.Generator, name: str, rows: list[int]) -> None:
    cases.check_mat_vec_many(runner, rng, name, rows, ref.fitting(name, 512))


@on_both
@pytest.mark.parametrize("name", kernels.PLANES)
def test_planes(runner: Runner, rng: np.random.Generator, name: str) -> None:
    """Put in order where they lie, a product has the very bits that it has of the file's own."""
    cases.check_planes(runner, rng, name, 5, 2 * ref.fitting(kernels.PLANES[name], 1))


@stored_type
@sized("rows,columns", [(5, 1280)], [(64, 4096)])
def test_expand(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    cases.check_expand(runner, rng, name, rows, columns)


@pytest.mark.parametrize("name", kernels.EXPANDED_TYPES)
@sized("rows,columns", [(1, 256), (13, 768), (67, 512)])
def test_expand_half(runner: Runner, rng: np.random.Generator, name: str, rows: int, columns: int) -> None:
    cases.check_expand_half(runner, rng, name, rows, ref.fitting(name, columns))


@sized("elements", [32, 1024, 5 * 1056])
def test_to_halves(runner: Runner, rng: np.random.Generator, elements: int) -> None:
    cases.check_to_halves(runner, rng, elements)


# ---- experts ----


@pytest.mark.parametrize(
    ("gate_type", "down_type"),
    [("q4_k", "q6_k"), ("q5_k", "q4_k"), ("q6_k", "q5_k"), ("q8_0", "q8_0"), ("mxfp4", "q8_0"), ("f16", "f16"),
     ("bf16", "f32"), ("f32", "q8_0")],
)  # fmt: skip
@sized("ff,columns,picks,tokens", [(256, 512, 3, 2)], [(512, 2048, 8, 1)])
def test_experts(
    runner: Runner, rng: np.random.Generator, gate_type: str, down_type: str, ff: int, columns: int, picks: int,
    tokens: int,
) -> None:  # fmt: skip
    cases.check_experts(runner, rng, gate_type, down_type, ff, columns, picks, tokens)


@sized("gate_type,down_type", [("mxfp4", "mxfp4"), ("q8_0", "f32"), ("f32", "q4_k")])
def test_experts_with_biases_and_clamps(
    runner: Runner, rng: np.random.Generator, gate_type: str, down_type: str
) -> None:
    cases.check_experts(runner, rng, gate_type, down_type, 256, 96, 3, 1, is_biased=True)
    cases.check_experts(runner, rng, gate_type, down_type, 256, 32, 2, 2, is_biased=True)
    tile_cases.check_group(runner, rng, gate_type, down_type, 256, 96, 18, 3, 2, is_biased=True)


@on_both
def test_experts_of_an_odd_number_of_blocks(runner: Runner, rng: np.random.Generator) -> None:
    cases.check_experts(runner, rng, "q6_k", "q8_0", 96, 768, 5, 1)


@on_both
def test_an_absent_expert_is_never_silence(runner: Runner, rng: np.random.Generator) -> None:
    cases.check_absent_expert_is_nan(runner, rng)


# ---- shares of devices that compute together ----


@sized(
    "gate_type,down_type,ff,columns,ranks",
    [("q4_k", "q6_k", 256, 256, 2), ("q5_k", "q4_k", 256, 512, 4), ("q6_k", "q8_0", 96, 256, 3),
     ("mxfp4", "q5_k", 256, 160, 2), ("q8_0", "bf16", 64, 96, 2), ("f16", "f32", 64, 32, 2)],
    [("q4_k", "q6_k", 1024, 4096, 2)],
)  # fmt: skip
def test_shares_of_experts(
    runner: Runner, rng: np.random.Generator, gate_type: str, down_type: str, ff: int, columns: int, ranks: int
) -> None:
    for is_biased in (False, True):
        types, sizes = (gate_type, down_type), (ff, columns)
        share_cases.check_experts_of_shares(runner, rng, types, sizes, ranks, is_biased=is_biased)
        share_cases.check_groups_of_shares(runner, rng, types, sizes, ranks, is_biased=is_biased)


@sized("words,ranks", [([5], 2), ([64, 1, 1030, 16], 3), ([520, 8, 9], 2)], [([9000, 300], 2)])
def test_gather_floats(runner: Runner, rng: np.random.Generator, words: list[int], ranks: int) -> None:
    share_cases.check_gather_floats(runner, rng, words, ranks)


@sized("columns,pairs,ranks", [(64, 1, 2), (192, 5, 3), (512, 10, 2)], [(1024, 64, 2)])
def test_gather_hidden(runner: Runner, rng: np.random.Generator, columns: int, pairs: int, ranks: int) -> None:
    for has_floats in (False, True):
        share_cases.check_gather_hidden(runner, rng, columns, pairs, ranks, has_floats=has_floats)


@sized("columns,ranks", [(192, 3), (512, 2)])
def test_exchange_of_a_batch(runner: Runner, rng: np.random.Generator, columns: int, ranks: int) -> None:
    share_cases.check_exchange_of_a_batch(runner, rng, columns, ranks)


@on_both
def test_a_gather_ends_when_the_host_says_so(runner: Runner, rng: np.random.Generator) -> None:
    share_cases.check_gather_ends(runner, rng)


# ---- rows ----


@sized("columns,tokens", [(32, 1), (1568, 3)], [(4096, 1)])
def test_rms_norm(runner: Runner, rng: np.random.Generator, columns: int, tokens: int) -> None:
    cases.check_rms_norm(runner, rng, columns, tokens)


@sized("columns,groups,stride", [(320, 3, 100)], [(1056, 16, 130)])
def test_add_bias(runner: Runner, rng: np.random.Generator, columns: int, groups: int, stride: int) -> None:
    cases.check_add_bias(runner, rng, columns, 3)
    cases.check_ungroup(runner, rng, groups, stride, 2)


@sized("columns", [288], [1024])
def test_silu_mul(runner: Runner, rng: np.random.Generator, columns: int) -> None:
    cases.check_silu_mul(runner, rng, columns, 3)


@sized("size,blocks", [(40_016, 3)], [(10_000_016, 132)])
def test_read_memory(runner: Runner, rng: np.random.Generator, size: int, blocks: int) -> None:
    cases.check_read_memory(runner, rng, size, blocks)


# ---- attention, and the delta rule ----


@any_cache
@sized(
    "dim,heads,kv_heads,positions,rotary,gated",
    [(64, 3, 3, [0], 64, False), (128, 4, 2, [62, 63, 64], 32, True), (256, 12, 1, [130], 64, True)],
    [(256, 32, 2, [1500], 64, True)],
)
def test_attention(
    runner: Runner, rng: np.random.Generator, cache: str, dim: int, heads: int, kv_heads: int, positions: list[int],
    rotary: int, gated: bool,
) -> None:  # fmt: skip
    cases.check_attention(runner, rng, cache, dim, heads, kv_heads, positions, rotary, gated)


@any_cache
@sized(
    "positions,window", [([0], 1), ([62, 63, 64], 1), ([30, 31, 32], 32), ([130, 131], 33), ([130], 500)]
)  # fmt: skip
def test_attention_with_sinks_and_a_window(
    runner: Runner, rng: np.random.Generator, cache: str, positions: list[int], window: int
) -> None:
    cases.check_attention(runner, rng, cache, 64, 6, 2, positions, 64, False, window)
    cases.check_attention(runner, rng, cache, 32, 4, 2, positions, 32, False, window)
    cases.check_attention(runner, rng, cache, 32, 4, 2, positions, 32, False, window, window + len(positions) - 1)


PROMPTS = [
    prompt_cases.Prompt(1, 1, 32, ((0, 0, 1),)),
    prompt_cases.Prompt(8, 8, 64, ((0, 20, 45),), is_gated=True),  # 32 tokens a block, over borders of tiles
    prompt_cases.Prompt(16, 2, 256, ((0, 61, 6),), is_gated=True),
    prompt_cases.Prompt(7, 1, 128, ((0, 94, 11),), has_sinks=True),
    prompt_cases.Prompt(12, 2, 32, ((1, 0, 3), (0, 40, 2), (2, 31, 4), (1, 64, 1)), is_gated=True),
    prompt_cases.Prompt(6, 1, 64, ((0, 0, 9), (1, 63, 3)), window=5, has_sinks=True),
    prompt_cases.Prompt(4, 2, 32, ((0, 70, 20),), window=33, ring=52, has_sinks=True),
    prompt_cases.Prompt(40, 1, 32, ((0, 30, 5),), window=1, ring=5),  # more heads a key head than a block has rows
]


@any_cache
@sized(
    "prompt",
    PROMPTS,
    [prompt_cases.Prompt(32, 2, 256, ((0, 1400, 300),)), prompt_cases.Prompt(64, 8, 64, ((0, 0, 700),), 128)],
)
def test_prompt_attention(runner: Runner, rng: np.random.Generator, cache: str, prompt: prompt_cases.Prompt) -> None:
    prompt_cases.check_prompt_attention(runner, rng, cache, prompt)


@any_cache
@sized("prompt", [PROMPTS[1], *PROMPTS[4:7]], [PROMPTS[2], PROMPTS[3]])
def test_prompt_attention_beside_others(
    runner: Runner, rng: np.random.Generator, cache: str, prompt: prompt_cases.Prompt
) -> None:
    prompt_cases.check_prompt_neighbours(runner, rng, cache, prompt)


@any_cache
@sized(
    "heads,sizes,positions",
    [(3, (32, 16, 96), [0]), (17, (64, 4, 128), [126, 127, 128, 129]), (2, (32, 64, 512), [300])],
    [(128, (128, 64, 512), [1500, 1501])],
)
def test_latent_attention(
    runner: Runner, rng: np.random.Generator, cache: str, heads: int, sizes: tuple[int, int, int], positions: list[int]
) -> None:
    latent_cases.check_latent_attention(runner, rng, cache, heads, sizes, positions)


@any_type
@sized("heads,rows,blocks,tokens", [(3, 70, 1, 17), (5, 3, 3, 1)], [(128, 512, 1, 20)])
def test_heads_products(
    runner: Runner, rng: np.random.Generator, name: str, heads: int, rows: int, blocks: int, tokens: int
) -> None:
    columns = max(32, columns_of(name, blocks))
    latent_cases.check_heads_products(runner, rng, name, heads, rows, columns, tokens)


@sized(
    "channels,taps,runs",
    [
        (130, 4, [1]),
        (33, 8, [1]),
        (70, 1, [1]),
        (64, 4, [7]),
        (33, 2, [3]),
        (40, 8, [19]),
        (70, 1, [9]),
        (65, 4, [11, 1, 17]),
    ],
    [(12288, 4, [7])],
)
def test_conv(runner: Runner, rng: np.random.Generator, channels: int, taps: int, runs: list[int]) -> None:
    cases.check_conv(runner, rng, channels, taps, runs)


@sized(
    "k_dim,v_dim,key_heads,value_heads,is_grouped,runs",
    [
        (128, 128, 2, 4, False, [1]),
        (64, 32, 3, 6, True, [4]),
        (64, 32, 1, 2, False, [37]),
        (64, 32, 1, 1, False, [3, 18]),
    ],
    [(128, 128, 16, 64, False, [1]), (128, 128, 2, 4, True, [9]), (128, 128, 16, 32, False, [200])],
)
def test_delta(
    runner: Runner, rng: np.random.Generator, k_dim: int, v_dim: int, key_heads: int, value_heads: int,
    is_grouped: bool, runs: list[int],
) -> None:  # fmt: skip
    cases.check_delta(runner, rng, k_dim, v_dim, key_heads, value_heads, is_grouped, runs)


# ---- routing ----


@sized("experts,picks,tokens", [(32, 4, 3), (512, 10, 2), (1000, 32, 1), (5, 5, 1)])
def test_route(runner: Runner, rng: np.random.Generator, experts: int, picks: int, tokens: int) -> None:
    router_cases.check_route(runner, rng, experts, picks, tokens)
    for score in ("softmax", "sigmoid", "logits"):
        for is_biased in (False, True):
            router_cases.check_route_by(runner, rng, experts, picks, tokens, score, is_biased)


@sized("experts,picks,groups", [(12, 3, (4, 2)), (256, 8, (8, 4)), (64, 6, (64, 6)), (5, 2, (1, 1))])
def test_route_in_groups(
    runner: Runner, rng: np.random.Generator, experts: int, picks: int, groups: tuple[int, int]
) -> None:
    for score in ("softmax", "sigmoid"):
        for is_biased in (False, True):
            router_cases.check_route_by(runner, rng, experts, picks, 3, score, is_biased, groups)


@on_both
def test_resolve(runner: Runner, rng: np.random.Generator) -> None:
    router_cases.check_resolve(runner, rng, 128, 8)


@on_both
def test_guesses_are_posted(runner: Runner) -> None:
    router_cases.check_guesses(runner)


@on_both
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_biased", [False, True])
def test_substitution(runner: Runner, rng: np.random.Generator, rule: str, is_biased: bool) -> None:
    shapes, parsed = ((128, 8), (512, 10), (40, 4)), CarRule.parse(rule)
    assert min(router_cases.check_substitution(runner, rng, *shape, parsed, is_biased) for shape in shapes) > 0


@on_both
def test_nan_logits_show(runner: Runner, rng: np.random.Generator) -> None:
    router_cases.check_nan_logits_show(runner, rng)
