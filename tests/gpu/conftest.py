"""Fixtures of all tests of devices."""

from __future__ import annotations

import pytest

from tests.fake_hip.build import begin_test


@pytest.fixture(autouse=True)
def _queues_of_its_own() -> None:
    """As in a process of its own.  Devices that failed are given up with their streams, and those that are left share
    hardware queues: two logical devices whose streams share one wait for each other for ever."""
    begin_test()
