"""`fomoe-layout verify`: read every byte of a store again and compare checksums, and the GGUF when given one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np

from fomoe_io.cli.common import note
from fomoe_io.cli.progress import Progress
from fomoe_io.errors import StoreError, UsageError
from fomoe_io.storage.gguf import GGUFFile, TensorInfo
from fomoe_io.storage.manifest import page_up, unseal
from fomoe_io.storage.store import Store, manifest_path
from fomoe_io.units import format_bytes, format_rate, format_seconds
from layout_tool.direct import DirectFile
from layout_tool.index import has_checksums, id_runs
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
        names = [source.text("name") for source in unseal(manifest_path(path)).objects("source")]
        raise StoreError(
            f"{path} is a store of {store.model_name}, not of {against}",
            hint=f"--against {names[0]}, which it was made from",
        )
    if original is None and not has_checksums(store):
        raise StoreError(
            f"{path} was indexed without checksums",
            hint=f"fomoe-layout index MODEL.gguf --to {path} --checksums --overwrite, or verify --against MODEL.gguf",
        )
    first, second = _Check(store, original).run(), []
    if any(store.mirrors):
        mirrored = [mirror or path for mirror, path in zip(store.mirrors, store.paths, strict=True)]
        second = _Check(replace(store, paths=mirrored), original).run()
    for line in [*store.lost_copies, *(found.text for found in first + second)][:SHOWN]:
        note(line)
    if first or second:
        raise StoreError(
            f"{path}: {len(first) + len(second):,} damaged records or tensors", hint=_remedy(store, first, second)
        )
    if store.lost_copies:
        raise StoreError(
            f"{path} is whole, and {len(store.lost_copies)} of its second copies are lost", hint=_remedy(store, [], [])
        )
    return 0


def _remedy(store: Store, first: Sequence[Damage], second: Sequence[Damage]) -> str:
    """From the copy that is whole, where one is; only what is damaged in both is packed again."""
    bad = dict(store.lost_paths)
    good = dict(enumerate(store.paths))
    for number in {found.file for found in first}:
        other = store.mirrors[number] if store.mirrors else None
        if other is None or any(found.file == number for found in second):
            return _made_again(store)
        bad[store.paths[number]], good[number] = number, other
    bad |= {copy: found.file for found in second if (copy := store.mirrors[found.file]) is not None}
    second_place = Path(unseal(manifest_path(store.path)).text("mirror"))
    if all(copy.parent == second_place and not copy.exists() for copy in bad):
        return f"fomoe-layout mirror {quote(str(store.path))} --to {quote(str(second_place))}"
    return "; ".join(f"cp {quote(str(good[number]))} {quote(str(copy))}" for copy, number in sorted(bad.items()))


def _made_again(store: Store) -> str:
    manifest = unseal(manifest_path(store.path))
    name = manifest.objects("source")[0].text("name")
    if store.kind != "packed":
        return f"the GGUF changed or is damaged: get {name} again, or fomoe-layout index it with --overwrite"
    targets = [str(store.path), *manifest.texts("targets")[1:]]
    return f"fomoe-layout pack {quote(name)} {' '.join(f'--to {quote(t)}' for t in targets)} --overwrite"


class Damage(NamedTuple):
    """A record or tensor that is not what its checksum says: number of its file, and where."""

    file: int
    text: str


class _Check:
    """Reads everything once, and the original beside it."""

    def __init__(self, store: Store, original: Store | None) -> None:
        self._store = store
        self._original = original
        self._files: Sequence[DirectFile] = []
        self._original_files: Sequence[DirectFile] = []

    def run(self) -> list[Damage]:
        """Everything that is damaged."""
        store, original = self._store, self._original
        tasks: list[TensorInfo | Run] = list(store.resident.values())
        if store.kind == "packed":
            tasks += [run for layer in store.experts.values() for run in runs(layer)]
        else:
            tasks += id_runs(store)
        damaged: list[Damage] = []
        total = sum(page_up(task.bytes) for task in tasks)
        with (
            opened(store.paths) as self._files,
            opened(original.paths if original else []) as self._original_files,
            Progress("verify", total) as progress,
        ):

            def done(task: TensorInfo | Run, lines: list[Damage]) -> None:
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

    def _check(self, task: TensorInfo | Run, buffers: Buffers) -> list[Damage]:
        if isinstance(task, Run):
            return self._check_run(task, buffers)
        expected = self._store.resident_checksums
        found = read_tensor(self._files, task, buffers)
        wrong = expected is not None and int(found, 16) != expected[task.name]
        if self._original is not None:
            wrong |= found != read_tensor(self._original_files, self._original.resident[task.name], buffers)
        text = f"tensor {task.name} in {self._store.paths[task.file]} at {task.offset:,}"
        return [Damage(task.file, text)] if wrong else []

    def _check_run(self, run: Run, buffers: Buffers) -> list[Damage]:
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
            text = f"expert {expert} of layer {run.layer} in {self._store.paths[file]} at {offset:,}"
            lines.append(Damage(int(file), text))
        return lines
