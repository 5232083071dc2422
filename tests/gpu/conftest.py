"""Fixtures of all tests of devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fomoe_io.gpu import device
from tests.fake_hip.build import Fake, begin_test, installed_fake


@pytest.fixture(scope="module")
def fake(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """The double of a module's tests, which is "hip" there; DELAY_US: microseconds that its streams sleep before each
    piece of work."""
    delay_us = getattr(request.module, "DELAY_US", 30)
    with (
        pytest.MonkeyPatch.context() as patch,
        installed_fake(tmp_path_factory.mktemp("rocm"), delay_us=delay_us) as found,
    ):
        patch.setitem(device.PROVIDERS, "hip", ("hip",))  # not by hip-python, where that is installed
        yield found


@pytest.fixture(autouse=True)
def _queues_of_its_own() -> None:
    """As in a process of its own.  Devices that failed are given up with their streams, and those that are left share
    hardware queues: two logical devices whose streams share one wait for each other for ever."""
    begin_test()
