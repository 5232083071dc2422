"""What the tests of commands share."""

from __future__ import annotations

import pytest

from fomoe_io.cli import forecast


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fomoe plan` measures nothing: a token takes a millisecond, and the drive reads 1 GB/s."""
    monkeypatch.setattr(forecast, "compute_seconds", lambda needs, threads=None: 0.001)
    monkeypatch.setattr(forecast, "measured_drive", lambda path, needs: forecast.Drive(1e9, "measured here, 0.5 s"))
