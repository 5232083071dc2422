"""Every architecture on the double of a GPU: the processor's logits, llama.cpp's, and bits that no memory changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine
from fomoe_io.config import Tiers, Tuning
from fomoe_io.experts.car import CarRule
from fomoe_io.trace.simulator import replay
from fomoe_io.trace.trace import Trace
from tests.gpu.test_device_engine import TOKENS, evaluate, nmse, settings, tiny
from tests.tiny_model import Type, write_tiny

pytestmark = pytest.mark.usefixtures("fake")

PART = 40
"""Tokens of the fixtures: enough for every part of the equations, on a double that takes its time."""

DELAY_US = 0  # of the double

MXFP4 = {"weights": Type.MXFP4, "down": None}
LATENT = {"architecture": "deepseek2", "query_rank": 32, "dense_layers": 1, "rotated": 16, "latent": 96}
GROUPS = (("expert_group_count", 4), ("expert_group_used_count", 2))
YARN = (("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "qwen3moe", "shared_hidden": 0, "rotated": 64},
        {"tied": True, "fused": True, "used": 1},
        {"weights": Type.BF16, "kv_heads": 4},
        {"architecture": "qwen3moe", "shared_hidden": 0, "rotated": 64, "biased": True, "layers": 2, "keys": YARN},
        {"architecture": "qwen3moe", "shared_hidden": 0, "rotated": 64, "biased": True, "layers": 2, "fused_qkv": True},
        {"fused_qkv": True},
        {"architecture": "qwen3next"},
        {"architecture": "qwen3next", "legacy": True, "value_heads": 6},
        {"architecture": "minimax-m2", "rotated": 32, "layers": 3},
        {"architecture": "glm4moe", "dense_layers": 1, "biased": True, "layers": 3},
        {
            "architecture": "glm4moe",
            "dense_layers": 1,
            "normed": False,
            "layers": 2,
            "keys": (("expert_gating_func", 1),),
        },
        {"architecture": "gpt-oss", "rotated": 64, "biased": True, "keys": YARN},
        {
            "architecture": "gpt-oss",
            "rotated": 32,
            "layers": 3,
            "window": 1,
            "fused_qkv": True,
            "biased": True,
            "head_columns": 32,
            "keys": (("attention.sliding_window_pattern", 3), ("rope.freq_base_swa", 500.0)),
        },
        {**LATENT, "layers": 3, "keys": GROUPS},
        {**LATENT, "layers": 2, "heads": 6, "value_columns": 16, "keys": (*YARN, ("expert_gating_func", 1))},
        {**LATENT, "layers": 2, "weights": Type.F16, "keys": (*GROUPS, ("expert_gating_func", 1))},
    ],
    ids=[
        "delta",
        "attention only",
        "tied fused",
        "bf16",
        "biases, yarn",
        "fused qkv with a bias",
        "fused qkv",
        "qwen3next",
        "qwen3next, one matrix",
        "minimax-m2",
        "glm4moe",
        "glm4moe by softmax, no norms",
        "gpt-oss",
        "gpt-oss, turning at two speeds",
        "deepseek2",
        "deepseek2 by softmax, yarn",
        "deepseek2 by softmax in groups, f16",
    ],
)
def test_float_weights_give_the_processors_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_tiny(tmp_path / "model.gguf", tiny(**changes), seed=1)
    expected, _ = evaluate(path, settings(device="cpu", activations="float32"))
    found, statistics = evaluate(path, settings())
    assert nmse(found, expected) < 1e-9
    assert statistics["device"].startswith("hip:0")


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "qwen3next", "layers": 4},
        {"architecture": "minimax-m2", "layers": 2, "rotated": 32},
        {"architecture": "glm4moe", "layers": 3, "dense_layers": 1, "biased": True},
        {"architecture": "gpt-oss", "layers": 3, "rotated": 64, "biased": True, "dense": Type.Q8_0, **MXFP4},
        {**LATENT, "layers": 3, "dense": Type.Q8_0, "keys": GROUPS},
    ],
    ids=["qwen3next", "minimax-m2", "glm4moe", "gpt-oss", "deepseek2"],
)
def test_bits_of_other_architectures(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Neither few slots nor misses change them; the router's picks are known, -1 where a layer has no experts."""
    path = write_tiny(tmp_path / "model.gguf", tiny(**({"weights": Type.Q4_K, "down": Type.Q6_K} | changes)), seed=2)
    for batch in (1, 4):
        found = []
        for tiers in (None, Tiers(0.19, 0.2)):
            with Engine.open(path, settings(batch_tokens=batch, tiers=tiers)) as engine:
                session = engine.session()
                logits = session.evaluate(TOKENS, record=("experts",))
                picks, dense = session.records["experts"], engine.shape.dense_layers
                assert (engine.statistics()["tiers"]["nvme"]["hits"] > 0) == (tiers is not None)
            assert (picks[:dense] == -1).all() and (picks[dense:] >= 0).all()
            found.append((logits.tobytes(), picks.tobytes()))
        assert found[0] == found[1]


def test_latents_of_two_devices_and_with_lookahead(tmp_path: Path) -> None:
    """The bits of one device that guesses nothing, of a prompt and of tokens after it."""
    path, found = write_tiny(tmp_path / "model.gguf", tiny(**LATENT, layers=3, keys=GROUPS), seed=2), set()
    for changes in ({"device": "hip:0,0"}, {"lookahead": "on", "tiers": Tiers(0.25, 0.125)}, {"lookahead": "off"}):
        with Engine.open(path, settings(**changes)) as engine:
            session = engine.session()
            logits = [session.prefill(TOKENS[:6]), *(session.decode(int(token)).copy() for token in TOKENS[6:])]
            found.add(b"".join(row.tobytes() for row in logits))
    assert len(found) == 1


def test_a_window_keeps_no_more_than_its_ring(tmp_path: Path) -> None:
    """The bits of the whole cache."""
    shape = tiny(architecture="gpt-oss", layers=2, rotated=64, biased=True, window=5)
    path, found = write_tiny(tmp_path / "model.gguf", shape, seed=2), []
    tokens = np.random.default_rng(6).integers(0, 300, 44)
    for context in (64, 256):
        config = settings(context_tokens=context, tuning=Tuning(library_products=False))
        with Engine.open(path, config) as engine:
            session = engine.session()
            logits = session.evaluate(tokens)
            found.append((logits.tobytes(), session.recurrent_bytes))
    assert found[0][0] == found[1][0] and found[0][1] == 0
    assert found[1][1] == 2 * (5 + 4 - 1) * 2 * 64 * 4  # K and V, positions, heads, columns


@pytest.mark.parametrize(
    "changes",
    [{"architecture": "minimax-m2", "rotated": 32}, {"architecture": "gpt-oss", "rotated": 64},
     {**LATENT, "layers": 3, "keys": GROUPS}],
    ids=["minimax-m2", "gpt-oss", "deepseek2"],
)  # fmt: skip
def test_stand_ins_are_those_of_the_processor(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Where a bias chooses, where logits do, and of the best groups."""
    shape = tiny(**({"layers": 2} | changes))
    path, found = write_tiny(tmp_path / "model.gguf", shape, seed=2), []
    for kind in ("cpu", "hip"):
        rule = CarRule.parse("regret:0.2,handicap=0")
        config = settings(device=kind, tiers=Tiers(0.25, 0.0), batch_tokens=1, car=rule, trace=tmp_path / kind)
        with Engine.open(path, config) as engine:
            session = engine.session()
            logits = np.stack([session.decode(int(token)).copy() for token in TOKENS])
            found.append((logits, engine.statistics()["substitutions"]))
        trace = Trace.load(tmp_path / kind)
        played = replay(trace, np.array(trace.header.slots), decay=trace.header.decay, as_chosen=True)
        assert played.counters["substitutions"] == found[-1][1]
    assert found[0][1] == found[1][1] > 5
    assert nmse(found[1][0], found[0][0]) < 1e-9


@pytest.mark.parametrize("name", ["minimax-m2", "glm4moe", "glm4moe-air", "gpt-oss", "deepseek2"])
def test_logits_and_experts_are_those_of_llama_cpp(shared: Path, name: str) -> None:
    """Float weights; a token alone and in a batch; past a window and past 32 positions."""
    directory = shared / "reference/architectures"
    expected = np.load(directory / f"{name}-ref.npz")
    for batch in (1, 16):
        with Engine.open(directory / f"{name}.gguf", settings(context_tokens=128, batch_tokens=batch)) as engine:
            session = engine.session()
            logits = session.evaluate(expected["tokens"][:PART], record=("experts",))
            assert np.array_equal(session.records["experts"], expected["experts"][:, :PART])
        assert nmse(logits, expected["logits_batch"][:PART]) < 1e-9


def test_mxfp4_experts(shared: Path) -> None:
    """Eight bits of an activation are within what llama.cpp's own are."""
    directory = shared / "reference/architectures"
    expected = np.load(directory / "gpt-oss-mxfp4-ref.npz")
    for batch in (1, 16):
        with Engine.open(directory / "gpt-oss-mxfp4.gguf", settings(context_tokens=128, batch_tokens=batch)) as engine:
            logits = engine.session().evaluate(expected["tokens"][:PART])
        assert nmse(logits, expected["logits_batch"][:PART]) < 1e-3
        assert nmse(logits, expected["logits_decoded"][:PART]) < 1e-3
