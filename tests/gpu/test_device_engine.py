"""The engine on a double of libamdhip64 (streams are threads that sleep before each piece of work), whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.config import Tiers, Tuning
from fomoe_io.errors import BudgetError, DeviceError, FomoeError, FormatError, ReadError, UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.gpu import device, kernels
from fomoe_io.gpu.arena import LaunchSpec
from fomoe_io.gpu.backend import GpuBackend
from fomoe_io.gpu.batch_recorder import DenseProduct
from fomoe_io.system import direct_io
from fomoe_io.trace.simulator import replay
from fomoe_io.trace.trace import Trace
from layout_tool.main import main as layout
from tests.fake_hip.build import Fake
from tests.gguf_edit import Keys, Tensors, edited
from tests.tiny_model import Tiny, Type, write_tiny

pytestmark = pytest.mark.usefixtures("fake")

TOKENS = np.array([3, 141, 59, 26, 5, 35, 89, 79, 32, 38, 46])

BASE = Tiny(
    layers=4, columns=256, heads=4, kv_heads=2, head_columns=64, rotated=32, key_heads=2, value_heads=4,
    state_columns=64, experts=16, used=3, hidden=256, shared_hidden=256, weights=Type.F32,
)  # fmt: skip


def tiny(**changes: Any) -> Tiny:
    """The base shape with changes."""
    return Tiny(**({name: getattr(BASE, name) for name in BASE.__dataclass_fields__} | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "mixed.gguf", tiny(weights=Type.Q4_K, down=Type.Q6_K), seed=3)


def settings(**more: Any) -> EngineConfig:
    return EngineConfig(**({"context_tokens": 64, "device": "hip", "batch_tokens": 4} | more))


def evaluate(path: Path, config: EngineConfig) -> tuple[np.ndarray, dict[str, Any]]:
    with Engine.open(path, config) as engine:
        logits = engine.session().evaluate(TOKENS)
        return logits, engine.statistics()


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean() / (b**2).mean())


@pytest.mark.parametrize("dense", [Type.Q6_K, Type.Q5_1])
def test_a_fused_matrix_gives_the_bits_of_its_parts(tmp_path: Path, dense: Any) -> None:
    """Rows that begin inside a tensor that is quantized, or expanded because the device has no kernel for its type."""
    apart = write_tiny(tmp_path / "apart.gguf", tiny(weights=Type.Q4_K, dense=dense), seed=2)

    def fuse(keys: Keys, tensors: Tensors) -> None:
        parts = [tensors.pop(f"blk.3.attn_{part}.weight")[0] for part in "qkv"]
        tensors["blk.3.attn_qkv.weight"] = np.concatenate(parts), dense

    fused = edited(apart, tmp_path / "fused.gguf", fuse)
    np.testing.assert_array_equal(evaluate(fused, settings())[0], evaluate(apart, settings())[0])


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0])
def test_quantized_weights_stay_near_float_activations(tmp_path: Path, kind: Any) -> None:
    path = write_tiny(tmp_path / "model.gguf", tiny(weights=kind), seed=2)
    exact, _ = evaluate(path, settings(device="cpu", activations="float32"))
    found, _ = evaluate(path, settings())
    assert nmse(found, exact) < 2e-3  # 8-bit activations; another formula would give 1


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.Q8_0])
def test_planes_change_no_bit(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that the device keeps in planes, or as the file has them; tokens alone and in a batch."""
    shape = {"layers": 1, "columns": 2048, "heads": 8, "head_columns": 32, "rotated": 32, "hidden": 64}
    path = write_tiny(tmp_path / "model.gguf", tiny(architecture="qwen3moe", dense=kind, **shape), seed=2)
    found, kept = [], []
    for planes in (kernels.PLANES, {}):
        monkeypatch.setattr(kernels, "PLANES", planes)
        for batch_tokens in (1, 4):
            with Engine.open(path, settings(batch_tokens=batch_tokens)) as engine:
                assert isinstance(engine.backend, GpuBackend)
                planned = engine.backend.recorded.weights.planned
                kept.append({name for name, place in planned.items() if place.planes})
                found.append(engine.session().evaluate(TOKENS))
    assert {"output.weight", "blk.0.attn_q.weight"} <= kept[0] == kept[1] and not kept[2] and not kept[3]
    np.testing.assert_array_equal(found[:2], found[2:])


def test_types_without_kernels_are_expanded(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.gguf", tiny(weights=Type.Q4_K, dense=Type.Q5_1), seed=2)
    exact, _ = evaluate(path, settings(device="cpu", activations="float32"))
    found, _ = evaluate(path, settings())
    assert nmse(found, exact) < 2e-3


def test_bits_do_not_depend_on_memory(model: Path) -> None:
    """From everything in VRAM to barely a token's picks there and nothing in DRAM; any batch size; single tokens."""
    expected, all_hits = evaluate(model, settings())
    assert all_hits["tiers"]["vram"]["hits"] == all_hits["expert_requests"] == len(TOKENS) * 4 * 3
    assert all_hits["layers_served"]["with_misses"] == 0
    calls = all_hits["device_calls"]
    assert calls["graph_launches"] == 0 and calls["host_syncs"] == 3 * (4 + 1)  # 4 + 4 + 3 tokens: layers, logits
    for batch in (2, 11, 64):
        np.testing.assert_array_equal(evaluate(model, settings(batch_tokens=batch))[0], expected)
    steps, all_hits = evaluate(model, settings(batch_tokens=1))
    assert nmse(steps, expected) < 1e-3  # sums of another order, rounded to 8 bits on the way
    assert all_hits["device_calls"]["graph_launches"] == all_hits["device_calls"]["host_syncs"] == len(TOKENS)
    for vram, dram in ((0.5, 0.5), (0.5, 0.25), (0.19, 0.2), (0.19, 0.0), (0.3, 0.7)):
        tiers = Tiers(vram, dram)
        np.testing.assert_array_equal(evaluate(model, settings(tiers=tiers, batch_tokens=1))[0], steps)
        logits, s = evaluate(model, settings(tiers=tiers, lookahead="off"))
        np.testing.assert_array_equal(logits, expected)
        hits = {name: tier["hits"] for name, tier in s["tiers"].items()}
        assert sum(hits.values()) == s["expert_requests"]
        assert hits["nvme"] == s["tiers"]["nvme"]["reads"]
        assert (hits["nvme"] > 0) == (vram + dram < 1)  # where everything has a place it is read at the start
        assert s["layers_served"]["with_misses"] > 0
        assert (s["demotions"] > 0) == (dram > 0)
        assert (s["link"]["down_bytes"] > 0) == (dram > 0)
        assert (hits["dram"] > 0) == (dram > 0)


@pytest.mark.parametrize(("weights", "most"), [({"weights": Type.Q4_K, "down": Type.Q6_K}, 2e-3), ({}, 1e-9)])
def test_long_prompts_use_the_vendors_library(tmp_path: Path, weights: dict[str, Any], most: float) -> None:
    """Their bits depend neither on memory nor on the batch; another arithmetic, the same model."""
    tokens = np.random.default_rng(8).integers(0, 300, 40)
    model = write_tiny(tmp_path / "model.gguf", tiny(**weights), seed=3)

    def logits(**changes: Any) -> np.ndarray:
        with Engine.open(model, settings(**changes)) as engine:
            backend = engine.backend
            assert isinstance(backend, GpuBackend)
            assert backend.uses_products(40) == engine.config.tuning.library_products and not backend.uses_products(31)
            return engine.session().evaluate(tokens)

    expected = logits(batch_tokens=64)
    for changes in ({"batch_tokens": 7}, {"batch_tokens": 33, "tiers": Tiers(0.19, 0.2)}):
        np.testing.assert_array_equal(logits(**changes), expected)
    ours = logits(batch_tokens=64, tuning=Tuning(library_products=False))
    assert 0 < nmse(ours, expected) < most


@pytest.mark.parametrize("by_library", [True, False])
def test_which_kernels_multiply_a_prompts_floats(model: Path, by_library: bool) -> None:
    """The router's 16 rows go through the library, or tiles; a row alone, the shared expert's gate, fills no tile."""
    with Engine.open(model, settings(batch_tokens=64)) as engine:
        body = engine.backend.recorded.batch(40, by_library).finished_body()
    floats = {step.matrix.rows for step in body if isinstance(step, DenseProduct) and step.matrix.kernel == "f32"}
    assert floats == ({16} if by_library else set())
    launches = [step for step in body if isinstance(step, LaunchSpec)]
    assert sum(step.kernel == "mat_mul_f32" for step in launches) == (0 if by_library else 4)
    gates = [step for step in launches if step.kernel == "mat_vec_f32"]
    assert [(step.grid[1], step.arguments[3]) for step in gates] == 4 * [(40, 1)]


def test_policies_and_readers_give_the_same_bits(model: Path) -> None:
    expected, _ = evaluate(model, settings())
    for changes in ({"policy": "lru"}, {"policy": "lfru"}, {"reader": "pread"}, {"ring_depth": 1}):
        logits, _ = evaluate(model, settings(tiers=Tiers(0.25, 0.25), **changes))
        np.testing.assert_array_equal(logits, expected)


def test_an_expert_may_come_in_pieces(model: Path) -> None:
    """Each is sent up as it lands, whatever parts of the record it holds; the host's time is told apart."""
    expected, _ = evaluate(model, settings(batch_tokens=1))
    for nbytes in (4096, 12288):
        tuning = Tuning(piece_bytes=nbytes)
        how = settings(tiers=Tiers(0.19, 0.2), batch_tokens=1, tuning=tuning, lookahead="off")
        with Engine.open(model, how) as engine:
            before = engine.reader.counters["reads"]
            np.testing.assert_array_equal(engine.session().evaluate(TOKENS), expected)
            s, reads = engine.statistics(), engine.reader.counters["reads"] - before
        assert reads > 8 * s["tiers"]["nvme"]["reads"] > 0
        stalls = s["stall_seconds"]
        assert all(stalls[name] > 0 for name in ("nvme", "h2d", "before_reads", "after_reads", "device"))
        assert s["host_us_per_miss"] > 0


@pytest.mark.parametrize("is_packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_experts_of_dram_may_be_read_where_they_lie(model: Path, tmp_path: Path, is_packed: bool) -> None:
    """The same bits, the same counters, and layers whose experts are in memory never wait for the host."""
    path = tmp_path / "store"
    if is_packed:
        assert layout(["pack", str(model), "--to", str(path)]) == 0
    else:  # experts whose sizes are whole pages
        path = write_tiny(tmp_path / "model.gguf", tiny(weights=Type.Q4_K), seed=3)
    tokens, found = np.random.default_rng(3).integers(0, 300, 24), []
    for in_place in (False, True):
        for tiers in (Tiers(0.3, 0.7), Tiers(0.25, 0.4)):  # everything in memory; some on the drive
            tuning = Tuning(reads_in_place=in_place)
            with Engine.open(path, settings(tiers=tiers, batch_tokens=1, tuning=tuning)) as engine:
                assert isinstance(engine.backend, GpuBackend)
                assert all(record.is_alike for record in engine.backend.records.values())
                logits = engine.session().evaluate(tokens)
                s = engine.statistics()
            hits = [tier["hits"] for tier in s["tiers"].values()]
            assert hits[1] > 20
            found.append((logits.tobytes(), hits, s["promotions"], s["layers_served"]["with_misses"]))
    copied, in_place = found[:2], found[2:]
    assert len({logits for logits, *_ in found}) == 1
    assert [row[1:3] for row in in_place] == [row[1:3] for row in copied]
    # a victim's bytes may still be on their way down when it is wanted again: then it is copied
    assert in_place[0][3] < copied[0][3] / 2 and in_place[1][3] < copied[1][3]


def test_counters_are_those_of_the_processor(tmp_path: Path) -> None:
    """The same residency code serves both, token by token, and float weights give the same picks."""
    model = write_tiny(tmp_path / "float.gguf", BASE, seed=3)
    counts = []
    for kind in ("hip", "cpu"):
        config = settings(device=kind, tiers=Tiers(0.25, 0.25), batch_tokens=1, activations="quantized")
        with Engine.open(model, config) as engine:
            session = engine.session()
            for token in TOKENS[:6]:
                session.decode(int(token))
            s = engine.statistics()
        counts.append([s["expert_requests"], s["evictions"], *(tier["hits"] for tier in s["tiers"].values())])
    assert counts[0] == counts[1] and counts[0][1] > 0


@pytest.mark.parametrize("policy", ["decayed", "lru"])
@pytest.mark.parametrize(
    ("tiers", "sizes"),
    [
        (Tiers(0.25, 0.25), [1] * 12),
        (Tiers(0.5, 0.375), [2, 2, 2, 1, 1]),  # batches whose experts fit
        (Tiers(0.25, 0.19), [16, 1, 1, 9]),  # batches in waves
        (Tiers(0.19, 0.0), [16, 1, 8]),  # as few slots as a token needs
    ],
    ids=["decode", "fitting", "waves", "fewest"],
)
def test_the_simulator_counts_what_the_engine_counts(
    model: Path, tmp_path: Path, policy: str, tiers: Tiers, sizes: list[int]
) -> None:
    """As tests/unit/test_simulator.py: who is where is decided by one plan, whatever computes."""
    tokens, path = np.random.default_rng(4).integers(0, 300, sum(sizes)), tmp_path / "t"
    config = settings(policy=policy, tiers=tiers, batch_tokens=16, trace=path)
    with Engine.open(model, config) as engine:
        session = engine.session()
        seen = []
        for piece in np.split(tokens, np.cumsum(sizes)[:-1]):
            session.evaluate(piece, record=["experts"])
            seen.append(session.records["experts"])
        said = engine.statistics()
    trace = Trace.load(path)
    assert trace.batch_tokens.tolist() == sizes
    played = replay(trace, np.array(trace.header.slots), policy=policy, decay=trace.header.decay, as_chosen=True)
    c, picks = played.counters, np.concatenate(seen, 1)
    assert c["requests"] == said["expert_requests"] and c["nvme_hits"] > 20
    assert [c[name] for name in ("evictions", "promotions", "demotions")] == [
        said[name] for name in ("evictions", "promotions", "demotions")
    ]
    assert [c["vram_hits"], c["dram_hits"], c["nvme_hits"]] == [said["tiers"][t]["hits"] for t in said["tiers"]]
    for number, layer in trace.layers.items():
        np.testing.assert_array_equal(layer.picks, picks[number])
        np.testing.assert_array_equal(played.found[number], layer.found)
        np.testing.assert_allclose(layer.weights.sum(1), 1, rtol=1e-5)


def test_substitutions_are_replayed_from_a_trace(model: Path, tmp_path: Path) -> None:
    config = settings(tiers=Tiers(0.25, 0.25), car=CarRule.parse("ratio:0.5"), batch_tokens=1, trace=tmp_path / "t")
    with Engine.open(model, config) as engine:
        session = engine.session()
        for token in TOKENS:
            session.decode(int(token))
        said = engine.statistics()
    trace = Trace.load(tmp_path / "t")
    c = replay(trace, np.array(trace.header.slots), decay=trace.header.decay, as_chosen=True).counters
    assert c["substitutions"] == said["substitutions"] > 0 and c["requests"] == said["expert_requests"]
    assert [c["vram_hits"], c["dram_hits"], c["nvme_hits"]] == [said["tiers"][t]["hits"] for t in said["tiers"]]
    for layer in trace.layers.values():
        np.testing.assert_allclose(layer.weights.sum(1), 1, rtol=1e-5)  # the router's, not those of the stand-ins


@pytest.mark.parametrize("rule", ["ratio:0.5", "regret:0.1,warmup=3"])
def test_substitutions_are_those_of_the_processor(model: Path, rule: str) -> None:
    """Same rule, same residency, token by token; activations are rounded otherwise, so near-ties may differ."""
    found = []
    for kind in ("hip", "cpu"):
        config = settings(device=kind, tiers=Tiers(0.25, 0.25), car=CarRule.parse(rule), batch_tokens=1)
        with Engine.open(model, config) as engine:
            session = engine.session()
            logits = np.stack([session.decode(int(token)).copy() for token in TOKENS])
            s = engine.statistics()
        assert sum(tier["hits"] for tier in s["tiers"].values()) + s["substitutions"] == s["expert_requests"]
        assert not s["exact"] and s["substitutions"] > 0
        found.append((logits, s["substitutions"]))
    assert abs(found[0][1] - found[1][1]) <= 4
    with Engine.open(model, settings(tiers=Tiers(0.25, 0.25), car=CarRule.parse(rule))) as engine:
        session = engine.session()
        again = np.stack([session.decode(int(token)).copy() for token in TOKENS])
        np.testing.assert_array_equal(again, found[0][0])  # deterministic, whatever the copies' timing
        session.reset()
    exact, _ = evaluate(model, settings())
    warm, _ = evaluate(model, settings(tiers=Tiers(0.25, 0.25), car=CarRule.parse(rule)))
    np.testing.assert_array_equal(warm, exact)  # batches are exact


def test_in_place_and_packed_stores_agree(model: Path, tmp_path: Path) -> None:
    assert layout(["pack", str(model), "--to", str(tmp_path / "store")]) == 0
    expected, _ = evaluate(model, settings(tiers=Tiers(0.25, 0.25)))
    found, _ = evaluate(tmp_path / "store", settings(tiers=Tiers(0.25, 0.25)))
    np.testing.assert_array_equal(found, expected)


def test_sessions_follow_one_another(model: Path) -> None:
    with Engine.open(model, settings()) as engine:
        session = engine.session()
        first = session.prefill(TOKENS).copy()
        with pytest.raises(BudgetError, match="memory for 1 session"):
            engine.session()
        session.reset()
        steps = [session.decode(int(token)).copy() for token in TOKENS]
        assert nmse(steps[-1], first) < 1e-3
        session.close()
        again = engine.session()
        np.testing.assert_array_equal(again.prefill(TOKENS), first)
        with pytest.raises(UsageError, match="records experts alone"):
            again.evaluate(TOKENS, record=("weights",))


def test_everything_is_given_back(model: Path, fake: Fake) -> None:
    before = fake.live()
    evaluate(model, settings(tiers=Tiers(0.25, 0.25)))
    assert fake.live() == before


def test_device_budget(model: Path) -> None:
    with pytest.raises(BudgetError, match="is too small for") as caught:
        Engine.open(model, settings(vram_bytes=1 << 20))
    smallest = int((caught.value.hint or "").removeprefix("--vram ").removesuffix("M")) << 20
    expected, _ = evaluate(model, settings())
    with Engine.open(model, settings(vram_bytes=smallest)) as engine:
        held = sum(one.held_bytes for one in engine.backend.devices)  # type: ignore[attr-defined]
        assert held <= smallest
        np.testing.assert_array_equal(engine.session().evaluate(TOKENS), expected)
    with pytest.raises(BudgetError, match="more than the"):
        Engine.open(model, settings(vram_bytes=2 << 30))


def test_slots_are_chosen(model: Path) -> None:
    """In VRAM as many as it has room for, the rest in DRAM; what is free, more or less, changes nothing."""
    with Engine.open(model, settings(slots=9)) as engine:
        assert {sum(pair) for pair in engine.budgets.slots} == {9}
    with pytest.raises(UsageError, match="uses 3 of 16 experts a layer"):
        Engine.open(model, settings(slots=17))


def test_what_is_free_is_rounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for free in ((700 << 20) + 4096, (701 << 20) + 12288):
        monkeypatch.setattr(device.Gpu, "free_bytes", lambda _, free=free: free)
        with Engine.open(model, settings()) as engine:
            found.append(engine.budgets.vram_bytes)
    assert found[0] == found[1] and found[0] % (64 << 20) == 0


def test_larger_blocks_of_a_drive(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of weights and extents of experts grow, the logits stay."""
    tight = settings(tiers=Tiers(0.19, 0.2))
    expected, _ = evaluate(model, tight)
    monkeypatch.setattr(direct_io, "stated_block_bytes", lambda _: 16384)
    with Engine.open(model, tight) as engine:
        assert engine.reader.block_bytes == 16384 or not engine.reader.direct
        np.testing.assert_array_equal(engine.session().evaluate(TOKENS), expected)


@pytest.mark.parametrize(
    ("call", "code"), [("hipMemcpyHtoDAsync", 719), ("hipMemcpyDtoHAsync", 719), ("hipGraphLaunch", 719),
                       ("hipStreamSynchronize", 719), ("hipEventRecord", 719), ("hipStreamWaitEvent", 719)],
)  # fmt: skip
@pytest.mark.parametrize("after", [0, 7])
def test_a_failing_device_ends_in_one_line(model: Path, fake: Fake, call: str, code: int, after: int) -> None:
    before = fake.live()
    with Engine.open(model, settings(tiers=Tiers(0.19, 0.2))) as engine:
        session = engine.session()
        fake.fail(call, code, after)
        with pytest.raises(DeviceError, match=call) as caught:
            session.evaluate(TOKENS)
            for token in TOKENS:
                session.decode(int(token))
        assert "\n" not in caught.value.message
        with pytest.raises(UsageError, match="stopped in the middle"):
            session.decode(1)
        fake.fail("", 0)
    del engine, session, caught
    assert fake.live() == before


def test_out_of_memory_when_opening(model: Path, fake: Fake) -> None:
    before = fake.live()
    for after in range(4):
        fake.fail("hipMalloc", 2, after)
        with pytest.raises(DeviceError, match="out of memory"):
            Engine.open(model, settings())
    assert fake.live() == before


def test_a_failed_read_names_the_expert_and_the_device_goes_on(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    with Engine.open(copy, settings(tiers=Tiers(0.19, 0.0))) as engine:
        session = engine.session()
        expected = session.prefill(TOKENS[:2]).copy()
        with copy.open("r+b") as stream:
            stream.truncate(copy.stat().st_size // 8)
        for _ in range(8):  # more often than there are host buffers on the way: each failure gives its own back
            with pytest.raises(ReadError, match="expert"):
                session.prefill(np.arange(60) % 300)
            session.reset()
        with pytest.raises(ReadError, match="expert"):
            for token in range(60):
                session.decode(token)
        copy.write_bytes(model.read_bytes())
        session.reset()
        np.testing.assert_array_equal(session.prefill(TOKENS[:2]), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"head_columns": 48, "rotated": 16}, "head size 48"),
        ({"architecture": "deepseek2", "query_rank": 32, "latent": 40}, "latents of 40"),
        ({"architecture": "deepseek2", "query_rank": 32, "rotated": 2}, "turning columns 2"),
        (
            {"architecture": "deepseek2", "query_rank": 32, "head_columns": 48},
            "a query beside its turning columns of 48",
        ),
        ({"state_columns": 16}, "delta-rule head size 16"),
        ({"hidden": 48, "shared_hidden": 64}, "expert width 48"),
        ({"down": Type.Q5_1}, "which the GPU kernels do not know"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_at_load(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    path = write_tiny(tmp_path / "model.gguf", tiny(**changes), seed=1)
    with pytest.raises(FormatError, match=text) as caught:
        Engine.open(path, settings())
    assert caught.value.hint == "--device cpu"


def test_auto_without_a_device_computes_on_the_processor(
    model: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a CUDA device here")
    monkeypatch.setenv("FAKE_HIP_DEVICES", "0")
    with Engine.open(model, settings(device="auto")) as engine:
        assert engine.backend.device_name == "cpu"
    with pytest.raises(FomoeError, match="no GPU can be used"):
        Engine.open(model, settings(device="hip"))
    with pytest.raises(UsageError, match="there is no GPU in use"):
        Engine.open(model, settings(device="cpu", vram_bytes=1 << 30))


def test_it_tells_where_experts_are(model: Path) -> None:
    with Engine.open(model, settings(tiers=Tiers(0.25, 0.25))) as engine:
        engine.session().evaluate(TOKENS)
        for layer, tiers in engine.expert_tiers().items():
            vram, dram = engine.budgets.slots[layer]
            assert [np.count_nonzero(tiers == tier) for tier in (0, 1)] == [vram, dram] == [4, 4]
