"""How the experts of a model are shared out over several drives: by speed, by free space, or evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomoe_io.cli.common import note
from fomoe_io.errors import UsageError
from fomoe_io.storage.calibration import Calibration
from fomoe_io.storage.store import Store
from layout_tool import targets as target_tools
from layout_tool.placement import Placement, place

SHARES = ("speed", "space", "even")
STEPS_OF_SPEED, STEPS_OF_SPACE = 8, 100
"""Turns of the fastest or the emptiest drive: speed is measured roughly, space must not run out by rounding."""


@dataclass(frozen=True, slots=True)
class Striping:
    """What decides the shares.

    Attributes
    ----------
    by : {"speed", "space", "even"}
        By speed only while every drive has room for its share; else by space.
    calibrations : sequence of Path
        Of each target, for the speed.
    measures : bool
        Where there are none: measure by writing a file; else the drives count as equal.
    ignore_free_space : bool
        The file system does not know its own.
    """

    by: str = SHARES[0]
    calibrations: Sequence[Path] = ()
    measures: bool = True
    ignore_free_space: bool = False

    def placement(
        self, source: Store, frequencies: Mapping[int, np.ndarray], targets: Sequence[Path], metadata_bytes: int
    ) -> Placement:
        """Where everything goes.

        Raises
        ------
        FormatError, UsageError, StoreError
        """
        if self.by == "space":
            return place(source, frequencies, self._by_space(targets, source))
        wanted = place(source, frequencies, self._by_speed(targets, source) if self.by == "speed" else _even(targets))
        if self.ignore_free_space or len(targets) < 2 or self.by == "even":
            return wanted
        if not target_tools.shortages(targets, target_tools.still_needed(targets, wanted, metadata_bytes)):
            return wanted
        roomy = place(source, frequencies, self._by_space(targets, source))
        if target_tools.shortages(targets, target_tools.still_needed(targets, roomy, metadata_bytes)):
            return wanted  # it fits in no way: the complaint is about the shares that were asked for
        note("note: shared out by free space, as a drive has too little room for its share by speed (--by space)")
        return roomy

    def _by_speed(self, targets: Sequence[Path], source: Store) -> tuple[int, ...]:
        largest = max(layer.record_bytes for layer in source.experts.values())
        found = [Calibration.load(path) for path in self.calibrations]
        if not found and not self.measures:
            return _even(targets)
        return stripe_weights(targets, found, largest, ignore_free_space=self.ignore_free_space)

    def _by_space(self, targets: Sequence[Path], source: Store) -> tuple[int, ...]:
        """By what is free on each drive, less what the first must hold besides; targets of one drive share it."""
        devices = [target_tools.existing_parent(target).stat().st_dev for target in targets]
        free = [
            (target_tools.free_bytes(target) + target_tools.allocated_bytes(target)) / devices.count(device)
            for target, device in zip(targets, devices, strict=True)
        ]
        free[0] -= sum(tensor.bytes for tensor in source.resident.values())
        most = max(*free, 1.0)
        return tuple(max(1, int(STEPS_OF_SPACE * one / most)) for one in free)


def _even(targets: Sequence[Path]) -> tuple[int, ...]:
    return (1,) * max(len(targets), 1)


def stripe_weights(
    targets: Sequence[Path],
    calibrations: Sequence[Calibration] = (),
    record_bytes: int = target_tools.PROBE_BLOCK_BYTES,
    *,
    ignore_free_space: bool = False,
) -> tuple[int, ...]:
    """Records each target gets in turn: as its drive reads, in eighths of the fastest; equal on one drive.

    Parameters
    ----------
    targets : sequence of Path
    calibrations : sequence of Calibration
        Of each target; empty: the drives are probed.
    record_bytes : int
        What is read at once, where there are calibrations.
    ignore_free_space : bool
        Probe also where the file system reports none.

    Raises
    ------
    UsageError
        Neither no calibration nor one for each target.
    """
    if calibrations and len(calibrations) != len(targets):
        raise UsageError(
            f"{len(calibrations)} calibrations for {len(targets)} directories", hint="--calibration FILE for each --to"
        )
    if len({target_tools.existing_parent(target).stat().st_dev for target in targets}) <= 1:
        return _even(targets)
    if calibrations:
        rates = [calibration.best_bytes_per_second(record_bytes) for calibration in calibrations]
    else:
        rates = [target_tools.probe(target, ignore_free_space=ignore_free_space)[1] for target in targets]
    weights = [max(1, round(STEPS_OF_SPEED * rate / max(rates))) for rate in rates]
    return _even(targets) if len(set(weights)) == 1 else tuple(weights)
