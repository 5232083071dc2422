"""Several devices compute every layer together (logical ones, on a double): the bits are one device's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, Tiers
from fomoe_io.config import Tuning
from fomoe_io.errors import DeviceError, UsageError
from fomoe_io.experts.car import CarRule
from fomoe_io.gpu import device, exchange, split
from tests.fake_hip.build import Fake
from tests.gpu.test_device_chain import read
from tests.gpu.test_device_engine import TOKENS, settings
from tests.tiny_model import Tiny, Type, write_tiny

TWO: dict[str, Any] = {"device": "hip:0,0", "split_mode": "tensor"}
MIXED = Tiny(
    layers=4, columns=512, heads=4, kv_heads=2, head_columns=64, rotated=32, key_heads=2, value_heads=4,
    state_columns=64, experts=8, used=3, hidden=256, shared_hidden=256, weights=Type.Q4_K, down=Type.Q6_K,
)  # fmt: skip
PLAIN = Tiny(architecture="qwen3moe", layers=3, columns=256, heads=4, kv_heads=2, head_columns=64, experts=16, used=4,
    hidden=128, shared_hidden=0, rotated=64, weights=Type.F16)  # fmt: skip

DELAY_US = 10  # of the double


@pytest.fixture(autouse=True)
def provider(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a product costs it is divided: so small ones would not be."""
    monkeypatch.setattr(exchange, "LEAST_BYTES", 0)
    monkeypatch.setattr(exchange, "LEAST_ROWS", 0)
    misuses = fake.misuses()
    yield
    fake.fail("", 0)
    fake.release()
    assert fake.misuses() == misuses


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shapes = {"mixed": MIXED, "plain": PLAIN}
    return {name: write_tiny(folder / f"{name}.gguf", shape, seed=3) for name, shape in shapes.items()}


def decoded(path: Path, **how: Any) -> tuple[bytes, dict[str, Any]]:
    with Engine.open(path, settings(batch_tokens=1, **how)) as engine:
        session = engine.session()
        return np.stack([session.decode(int(token)).copy() for token in TOKENS]).tobytes(), engine.statistics()


@pytest.mark.parametrize("name", ["mixed", "plain"])
@pytest.mark.parametrize("how", [{}, {"tiers": Tiers(0.5, 0.25)}], ids=["whole", "tight"])
def test_tokens(models: dict[str, Path], name: str, how: dict[str, Any]) -> None:
    expected, counted = decoded(models[name], **how)
    found, said = decoded(models[name], **how, **TWO)
    assert found == expected
    assert said["split"] == {"mode": "tensor", "devices": 2}
    for key in ("expert_requests", "evictions", "promotions", "demotions"):
        assert said[key] == counted[key]


@pytest.mark.parametrize("by_stream", [False, True])
@pytest.mark.parametrize("devices", ["hip:0,0", "hip:0,1,2,3"])
def test_whatever_else_is_asked_for(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, devices: str, by_stream: bool
) -> None:
    monkeypatch.setenv("FAKE_HIP_DEVICES", "4")
    how = {"tiers": Tiers(0.25, 0.25), "car": CarRule.parse("ratio:0.5,backfill=1"), "lookahead": "on"}
    how |= {"kv_type": "f16", "tuning": Tuning(signals_by_stream=by_stream)}
    expected, counted = decoded(models["plain"], **how)
    found, said = decoded(models["plain"], **how, **TWO | {"device": devices})
    assert found == expected and said["substitutions"] == counted["substitutions"] > 0
    assert said["prefetch"]["issued"] > 0


def test_by_each_other_s_memory(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """For those who ask for it, where kernels reach it; else it is said which does not."""
    tight = {"tiers": Tiers(0.5, 0.25)}
    expected = [decoded(models["mixed"], **tight)[0], read(models["mixed"], **tight)[0]]
    monkeypatch.setenv("FAKE_HIP_DEVICES", "2")
    two = TWO | {"device": "hip:0,1", "peer_memory": True}
    assert [decoded(models["mixed"], **tight, **two)[0], read(models["mixed"], **tight, **two)[0]] == expected
    with pytest.raises(UsageError, match="by twos, not by 4"):
        Engine.open(models["plain"], settings(**two | {"device": "hip:0,1,0,1"}))
    monkeypatch.setenv("FAKE_HIP_PEER", "0")
    with pytest.raises(DeviceError, match="hip:0 does not reach the memory of hip:1"):
        Engine.open(models["mixed"], settings(**two))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mixed", {}),
        ("mixed", {"tiers": Tiers(0.25, 0.25), "batch_tokens": 3}),
        ("plain", {"tiers": Tiers(0.5, 0.25)}),
    ],
    ids=["whole", "batches of 3", "tight"],
)
def test_prompts_and_sessions(models: dict[str, Path], name: str, how: dict[str, Any]) -> None:
    expected, counted = read(models[name], **how)
    found, said = read(models[name], **how, **TWO)
    assert found == expected
    assert said["expert_requests"] == counted["expert_requests"] and said["evictions"] == counted["evictions"]


@pytest.mark.parametrize(
    ("rate", "how", "mode"),
    [
        (1e9, {}, "tensor"),  # slow memory is worth the exchanges
        (1e13, {}, "layer"),
        (None, {}, "tensor"),  # the double's
        (1e9, {"tensor_split": "3,1"}, "layer"),
        (1e9, {"device": "auto"}, "tensor"),
        (1e13, {"device": "auto"}, None),  # the first alone: it has room for all
        (1e9, {"device": "auto", "split_mode": "none"}, None),
        (1e9, {"device": "auto", "free": "little"}, "layer"),  # weights on both would leave experts no room
    ],
)
def test_auto_takes_what_pays(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, rate: float | None, how: dict[str, Any], mode: str | None
) -> None:
    monkeypatch.setenv("FAKE_HIP_DEVICES", "2")
    monkeypatch.setitem(device.PROVIDERS, "auto", ("hip",))
    if rate is not None:
        monkeypatch.setattr(split, "read_bandwidth", lambda _: rate)
    how = dict(how)
    free = how.pop("free", None)
    if free:
        monkeypatch.setattr(split, "_has_room", lambda *_: False)
        monkeypatch.setattr(split, "_resident_bytes", lambda _: 1 << 60)
    with Engine.open(models["mixed"], settings(**{"device": "hip:0,1", "batch_tokens": 1} | how)) as engine:
        assert engine.statistics().get("split", {}).get("mode") == mode
