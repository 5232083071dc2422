"""The public face: names, a configuration that is checked when it is made, errors that travel."""

from __future__ import annotations

import copy
import pickle
import pydoc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fomoe_io
from fomoe_io import CarRule, EngineConfig, FomoeError, Tiers, UsageError
from fomoe_io.errors import BudgetError, DeviceError, FormatError, ReadError, StoreError
from fomoe_io.storage.pace import Pace


def test_every_name_is_there_and_seen() -> None:
    for name in fomoe_io.__all__:
        assert getattr(fomoe_io, name) is not None and name in dir(fomoe_io)
    assert {"Engine", "Session", "CarRule", "Store", "Sampler", "UsageError", "__version__"} <= set(fomoe_io.__all__)
    assert re.match(r"\d|unknown", fomoe_io.__version__)
    shown = pydoc.plain(pydoc.render_doc(fomoe_io))
    assert "class Engine(" in shown and "class Session(" in shown
    with pytest.raises(AttributeError, match="Engines"):
        fomoe_io.Engines  # noqa: B018


@pytest.mark.parametrize("kind", [FomoeError, FormatError, StoreError, ReadError, BudgetError, DeviceError, UsageError])
def test_errors_keep_their_hint_on_the_way(kind: type[FomoeError]) -> None:
    error = kind("what is wrong", hint="what mends it")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind and str(again) == str(error) and again.hint == "what mends it"


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("ram_bytes", "16G", 16 << 30),
        ("vram_bytes", "512M", 512 << 20),
        ("ram_bytes", np.int64(5), 5),
        ("car", "on", CarRule.parse("on")),
        ("car", "off", None),
        ("pace", "14.5G,80us", Pace.parse("14.5G,80us")),
        ("car", "regret:0.03", CarRule("regret", 0.03)),
        ("tiers", "vram=20%,dram=15%", Tiers(0.2, 0.15)),
        ("profile", "learned", "learned"),
        ("profile", "a/b.json", Path("a/b.json")),
        ("trace", "x.trace", Path("x.trace")),
        ("calibration", Path("c.json"), "c.json"),
        ("threads", np.int32(3), 3),
        ("lookahead", "3", 3),
        ("lookahead", "off", 0),
        ("lookahead", "auto", "auto"),
        ("threads", None, None),
    ],
)
def test_texts_mean_what_they_mean_to_the_commands(name: str, value: Any, want: object) -> None:
    found = getattr(EngineConfig(**{name: value}), name)
    assert found == want and type(found) is type(want)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ram_bytes", "much"), ("ram_bytes", 1.5), ("ram_bytes", 0), ("vram_bytes", -1), ("vram_bytes", True),
        ("threads", 0), ("threads", "2"), ("threads", 2.0), ("threads", True), ("context_tokens", 0),
        ("batch_tokens", 0), ("ring_depth", 0), ("lookahead", -1), ("lookahead", None),
        ("lookahead", "17"), ("lookahead", "maybe"), ("direct", 1), ("direct", "no"), ("kernels", None),
        ("kernels", "fast"), ("reader", 3), ("device", "tpu"),
        ("policy", []), ("car", "often"), ("car", True), ("tiers", "vram=90%,dram=90%"),
        ("tiers", (0.5, 0.5)), ("tiers", "half"), ("profile", 3), ("trace", 3), ("calibration", 3),
        ("pace", "fast"), ("pace", 3),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_at_once(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("shares", [(2, 3), (-0.1, 0.5), (0, 0), (0.6, 0.6), ("a", 0.5), (float("nan"), 0.1)])
def test_tiers_are_shares(shares: Any) -> None:
    with pytest.raises(UsageError, match="tiers"):
        Tiers(*shares)
