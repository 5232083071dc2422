"""What the host does about a single token, on a GPU's double: where its logits come to, how much Python it takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine
from fomoe_io.gpu.backend import GpuBackend
from fomoe_io.gpu.chain import ChainBackend
from tests.fake_hip.build import Fake
from tests.gpu.test_device_engine import settings, tiny
from tests.tiny_model import Type, write_tiny

pytestmark = pytest.mark.usefixtures("fake")

MOST_CALLS = 50
"""Of a token, in Python and from it: a call takes a part of a microsecond, and the device waits meanwhile."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "m.gguf", tiny(weights=Type.Q8_0, layers=2), seed=3)


@pytest.fixture
def engine(fake: Fake, model: Path) -> Iterator[Engine]:
    before = fake.live()
    with Engine.open(model, settings(sessions=2)) as engine:
        yield engine
    assert fake.live() == before


def runners_logits(engine: Engine) -> np.ndarray:
    """Where the device that makes logits leaves those that somebody copies on."""
    backend = engine.backend.stages[-1] if isinstance(engine.backend, ChainBackend) else engine.backend
    assert isinstance(backend, GpuBackend)
    return backend.tokens._logits


def test_a_tokens_logits_are_copied_once(engine: Engine) -> None:
    """By the device to where the caller reads them: rows of two sessions, which stay until each one's next token."""
    a, b = engine.session(), engine.session()
    runners_logits(engine)[:] = np.nan
    first = a.decode(3)
    kept = first.copy()
    second = b.decode(5)
    assert np.isfinite(first).all() and np.isfinite(second).all() and (first != second).any()
    np.testing.assert_array_equal(first, kept)
    assert np.isnan(runners_logits(engine)).all()
    engine.close()
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(("devices", "mode"), [("hip", "auto"), ("hip:0,0", "tensor"), ("hip:0,0", "layer")])
def test_memory_that_cannot_be_registered_gets_a_copy(fake: Fake, model: Path, devices: str, mode: str) -> None:
    before, found = fake.live(), []
    with Engine.open(model, settings(sessions=2, device=devices, split_mode=mode)) as engine:
        for code in (0, 2):
            fake.fail("hipHostRegister", code)
            session = engine.session()
            runners_logits(engine)[:] = np.nan
            found.append(session.decode(3).tobytes())
            assert np.isnan(runners_logits(engine)).all() == (code == 0)
    del session
    assert found[0] == found[1]
    assert fake.live() == before


def test_a_token_takes_few_calls(engine: Engine) -> None:
    session = engine.session()
    session.decode(3)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    session.decode(5)
    sys.setprofile(None)
    assert calls <= MOST_CALLS
