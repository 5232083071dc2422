"""`fomoe-layout verify`: read every byte of a store again and compare checksums, and the GGUF when given one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fomoe_io.cli.common import note
from fomoe_io.cli.progress import Progress
from fomoe_io.errors import StoreError, UsageError
from fomoe_io.storage.gguf import GGUFFile, TensorInfo
from fomoe_io.storage.manifest import PACK_AGAIN, page_up
from fomoe_io.storage.store import Store
from fomoe_io.units import format_bytes, format_rate, format_seconds
from layout_tool.direct import DirectFile
from layout_tool.index import id_runs
from layout_tool.placement import Run, runs
from layout_tool.records import buffer_bytes, opened, read_records, read_tensor
from layout_tool.workers import Buffers, run_tasks

SHOWN = 10
"""Damaged items that are named; the rest is counted."""


def verify(path: Path, against: Path | None) -> int:
    """Check a store, its mirror too.

    Parameters
    ----------
    path : Path
        A store directory.
    against : Path or None
        The GGUF (or its first shard) that it should hold, byte for byte.

    Raises
    ------
    StoreError
        When something is damaged, or the store is of another model.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a store directory", hint="fomoe-layout verify STORE [--against MODEL.gguf]")
    store = Store.open(path)
    original = None if against is None else Store.of_gguf(GGUFFile.open(against))
    if original is not None and original.fingerprint != store.fingerprint:
        raise StoreError(f"{path} is a store of {store.model_name}, not of {against}", hint=PACK_AGAIN)
    if original is None and not has_checksums(store):
        raise StoreError(
            f"{path} was indexed without checksums",
            hint=f"fomoe-layout index MODEL.gguf --to {path} --checksums --overwrite, or verify --against MODEL.gguf",
        )
    damaged = list(store.lost_copies) + _Check(store, original).run()
    if any(store.mirrors):
        second = [mirror or path for mirror, path in zip(store.mirrors, store.paths, strict=True)]
        damaged += _Check(replace(store, paths=second), original).run()
    if damaged:
        for line in damaged[:SHOWN]:
            note(line)
        raise StoreError(f"{path}: {len(damaged):,} damaged records or tensors", hint=PACK_AGAIN)
    return 0


def has_checksums(store: Store) -> bool:
    """Whether every tensor and every expert has one."""
    return store.resident_checksums is not None and all(layer.checksums is not None for layer in store.experts.values())


class _Check:
    """Reads everything once, and the original beside it."""

    def __init__(self, store: Store, original: Store | None) -> None:
        self._store = store
        self._original = original
        self._files: Sequence[DirectFile] = []
        self._original_files: Sequence[DirectFile] = []

    def run(self) -> list[str]:
        """One line for everything that is damaged."""
        store, original = self._store, self._original
        tasks: list[TensorInfo | Run] = list(store.resident.values())
        if store.kind == "packed":
            tasks += [run for layer in store.experts.values() for run in runs(layer)]
        else:
            tasks += id_runs(store)
        damaged: list[str] = []
        total = sum(page_up(task.bytes) for task in tasks)
        with (
            opened(store.paths) as self._files,
            opened(original.paths if original else []) as self._original_files,
            Progress("verify", total) as progress,
        ):

            def done(task: TensorInfo | Run, lines: list[str]) -> None:
                damaged.extend(lines)
                progress.add(page_up(task.bytes))

            run_tasks(tasks, self._check, done, buffer_bytes(list(store.experts.values())))
        n_experts = sum(layer.n_experts for layer in store.experts.values())
        print(
            f"verify  {n_experts:,} experts and {len(store.resident):,} tensors, {format_bytes(total)} in "
            f"{format_seconds(progress.seconds)}  {format_rate(progress.rate)}  {'DAMAGED' if damaged else 'all good'}",
            file=sys.stderr,
        )
        return damaged

    def _check(self, task: TensorInfo | Run, buffers: Buffers) -> list[str]:
        if isinstance(task, Run):
            return self._check_run(task, buffers)
        expected = self._store.resident_checksums
        found = read_tensor(self._files, task, buffers)
        wrong = expected is not None and int(found, 16) != expected[task.name]
        if self._original is not None:
            wrong |= found != read_tensor(self._original_files, self._original.resident[task.name], buffers)
        return [f"tensor {task.name} in {self._store.paths[task.file]} at {task.offset:,}"] if wrong else []

    def _check_run(self, run: Run, buffers: Buffers) -> list[str]:
        layer = self._store.experts[run.layer]
        _, texts = read_records(self._files, layer, run.experts, buffers)
        found = np.array([int(text, 16) for text in texts], np.uint64)
        wrong = np.zeros(len(found), bool)
        if layer.checksums is not None:
            wrong |= found != layer.checksums[run.experts]
        if self._original is not None:
            _, texts = read_records(self._original_files, self._original.experts[run.layer], run.experts, buffers)
            wrong |= found != np.array([int(text, 16) for text in texts], np.uint64)
        lines = []
        for expert in run.experts[wrong]:
            file, offset, _ = layer.extents[expert, 0]
            lines.append(f"expert {expert} of layer {run.layer} in {self._store.paths[file]} at {offset:,}")
        return lines
