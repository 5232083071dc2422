"""Families, lookahead and several devices on real ones, against llama.cpp and against one device.  Run with -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.config import Tiers
from fomoe_io.errors import DeviceError
from fomoe_io.experts.car import CarRule
from fomoe_io.gpu import device
from tests.engine.test_oracle import nmse
from tests.tiny_model import Tiny, Type, write_tiny

pytestmark = pytest.mark.gpu
PART = 40
LIMITED: dict[str, Any] = {"tiers": Tiers(0.25, 0.125)}
FAMILIES = ["minimax-m2", "glm4moe", "glm4moe-air", "gpt-oss", "deepseek2"]


@pytest.fixture(scope="module", autouse=True)
def provider() -> str:
    try:
        return device.find_provider("auto")
    except DeviceError as problem:
        pytest.skip(problem.message)


def config(**more: Any) -> EngineConfig:
    return EngineConfig(**({"device": "auto", "context_tokens": 128, "batch_tokens": 16, "vram_bytes": 1 << 30} | more))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 16])
def test_logits_and_experts_are_those_of_llama_cpp(shared: Path, name: str, batch: int) -> None:
    directory = shared / "reference/architectures"
    if not (directory / f"{name}.gguf").exists():
        pytest.skip(f"{name}.gguf is not here")
    expected = np.load(directory / f"{name}-ref.npz")
    with Engine.open(directory / f"{name}.gguf", config(batch_tokens=batch)) as engine:
        session = engine.session()
        logits = session.evaluate(expected["tokens"][:PART], record=("experts",))
        assert np.array_equal(session.records["experts"], expected["experts"][:, :PART])
    assert nmse(logits, expected["logits_batch"][:PART]) < 1e-9


@pytest.mark.parametrize("batch", [1, 16])
def test_mxfp4_experts(shared: Path, batch: int) -> None:
    directory = shared / "reference/architectures"
    if not (directory / "gpt-oss-mxfp4.gguf").exists():
        pytest.skip("gpt-oss-mxfp4.gguf is not here")
    expected = np.load(directory / "gpt-oss-mxfp4-ref.npz")
    with Engine.open(directory / "gpt-oss-mxfp4.gguf", config(batch_tokens=batch)) as engine:
        logits = engine.session().evaluate(expected["tokens"][:PART])
    assert nmse(logits, expected["logits_decoded"][:PART]) < 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recurrent and full attention, experts of two formats, enough layers for three devices."""
    shape = Tiny(
        layers=6, columns=512, heads=4, kv_heads=2, head_columns=128, state_columns=64, experts=32, used=4,
        weights=Type.Q4_K, down=Type.Q6_K, hidden=512, shared_hidden=512,
    )  # fmt: skip
    return write_tiny(tmp_path_factory.mktemp("models") / "model.gguf", shape, seed=3)


def read(path: Path, **how: Any) -> tuple[list[bytes], dict[str, Any]]:
    """A prompt's logits and picks, then single tokens; with what was counted."""
    with Engine.open(path, config(**how)) as engine:
        tokens = np.random.default_rng(8).integers(0, engine.shape.vocabulary, 60)
        session = engine.session()
        found = [session.evaluate(tokens[:30], record=("experts",)), session.records["experts"]]
        found += [session.decode(int(token)).copy() for token in tokens[30:]]
        return [array.tobytes() for array in found], engine.statistics()


@pytest.mark.parametrize("car", [None, "regret:0.05"])
def test_lookahead_changes_no_bit(model: Path, car: str | None) -> None:
    how = LIMITED | {"car": CarRule.parse(car) if car else None}
    plain, _ = read(model, **how)
    for mode in ("on", "auto", 2):
        found, said = read(model, lookahead=mode, **how)
        assert found == plain
    assert said["prefetch"]["issued"] > 0


def skip_without(provider: str, devices: str) -> None:
    needed = 1 + max(int(number) for number in devices.split(","))
    if len(device.list_devices(provider)) < needed:
        pytest.skip(f"fewer than {needed} devices")


@pytest.mark.parametrize("devices", ["0,0", "0,1", "0,1,2,3"])
def test_devices_in_turn_guess_as_one_does(provider: str, model: Path, devices: str) -> None:
    """By what the one before hands over early: the same bits, and as often right."""
    skip_without(provider, devices)
    alone, one = read(model, lookahead="on", **LIMITED)
    found, several = read(model, device=f"{provider}:{devices}", split_mode="pingpong", lookahead="on", **LIMITED)
    assert found == alone and several["prefetch"]["recall"] == one["prefetch"]["recall"]
    assert several["prefetch"]["useful"] > 0


@pytest.mark.parametrize("how", [{}, LIMITED, LIMITED | {"car": "regret:0.05"}], ids=["all", "limited", "car"])
@pytest.mark.parametrize("mode", ["layer", "pingpong", "tensor", "peers"])
@pytest.mark.parametrize("devices", ["0,0", "0,0,0", "0,1", "0,1,2,3"])
def test_the_bits_are_one_devices(provider: str, model: Path, devices: str, mode: str, how: dict[str, Any]) -> None:
    skip_without(provider, devices)
    if (mode in ("tensor", "peers") and devices == "0,0,0") or (mode == "peers" and devices == "0,1,2,3"):
        pytest.skip("no equal shares, or more than two that write to one another")
    how = how | {"split_mode": "tensor", "peer_memory": True} if mode == "peers" else how | {"split_mode": mode}
    how = how | ({"car": CarRule.parse(how["car"])} if "car" in how else {})
    alone, said = read(model, **how)
    found, counted = read(model, device=f"{provider}:{devices}", **how)
    assert found == alone
    for name in ("expert_requests", "substitutions", "evictions"):
        assert counted[name] == said[name]
