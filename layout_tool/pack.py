"""`fomoe-layout pack`: write a store from a GGUF, resumable, checked, all at once or not at all."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io.cli.common import note
from fomoe_io.cli.progress import Progress
from fomoe_io.errors import StoreError, UsageError
from fomoe_io.experts.profile import Profile
from fomoe_io.storage.gguf import GGUFFile, TensorInfo
from fomoe_io.storage.manifest import JOURNAL, MANIFEST, METADATA, data_header, page_up, seal, unseal
from fomoe_io.storage.store import Store
from fomoe_io.system.files import sync_directory, write_atomically
from fomoe_io.units import format_bytes, format_rate, format_seconds
from layout_tool import targets as target_tools
from layout_tool.check_runs import check_runs
from layout_tool.describe import describe_packed
from layout_tool.direct import DirectFile, buffered_notes, write_error
from layout_tool.journal import Journal, check_idle, journal_header
from layout_tool.placement import RESIDENT_FILE, Placement, Run, place, runs
from layout_tool.records import buffer_bytes, opened, read_records, read_tensor
from layout_tool.striping import Striping
from layout_tool.workers import Buffers, run_tasks

SYNC_SECONDS = 2.0
"""What a kill loses at most; syncing more often costs bandwidth."""


def open_model(path: Path) -> tuple[GGUFFile, Store]:
    """The GGUF to pack, and its tensors in place, once it is known that the store would run.

    Raises
    ------
    FormatError, UsageError
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory", hint="give the GGUF: fomoe-layout pack MODEL.gguf --to DIR")
    model = GGUFFile.open(path)
    store = Store.of_gguf(model)
    check_runs(store)
    return model, store


def model_frequencies(source: Store, profile: Profile | None) -> dict[int, np.ndarray]:
    """Picks per token of a model's layers; empty without a profile.

    Raises
    ------
    FormatError
        When the profile is of another shape.
    """
    if profile is None:
        return {}
    if profile.fingerprint not in (None, source.fingerprint):
        note(f"note: profile {profile.source} was counted on another file; used, since its layers and experts fit")
    return profile.frequencies({number: layer.n_experts for number, layer in source.experts.items()})


def pack(
    model_path: Path,
    directories: Sequence[Path],
    profile_path: Path | None,
    striping: Striping,
    *,
    overwrite: bool,
) -> int:
    """Write a store, or finish one that was interrupted.

    Parameters
    ----------
    model_path : Path
        A GGUF, or its first shard.
    directories : sequence of Path
        One a drive.
    profile_path : Path or None
    striping : Striping
        How the directories share the experts.
    overwrite : bool
        Replace the stores that the directories hold.

    Returns
    -------
    int
        Exit code.

    Raises
    ------
    FomoeError
    """
    model, source = open_model(model_path)
    profile = None if profile_path is None else Profile.load(profile_path)
    frequencies = model_frequencies(source, profile)
    targets = target_tools.resolve(directories)
    weights = known_weights(targets, overwrite)
    if weights:
        placement = place(source, frequencies, weights)
    else:
        placement = striping.placement(source, frequencies, targets, model.header_bytes[0])
    if not overwrite and (targets[0] / MANIFEST).exists():
        return _already_packed(targets, placement)
    if not overwrite and journal_header(targets[0]) is None:
        target_tools.check_unused(targets)
    if not striping.ignore_free_space:
        _check_space(targets, placement, model.header_bytes[0])
    if overwrite:
        check_idle(targets[0])
        target_tools.clear(targets)
    _tell_foreign(targets)
    target_tools.make(targets)
    _Pack(model, source, placement, targets, profile).run()
    return 0


def known_weights(targets: Sequence[Path], overwrite: bool) -> tuple[int, ...]:
    """Of the striping: an interrupted pack keeps its own, a finished one too; empty when there is none."""
    if not overwrite and (targets[0] / MANIFEST).exists():
        found = unseal(targets[0] / MANIFEST)
        known = found.integers("weights").tolist() if found.optional("weights") else []
    else:
        header = None if overwrite else journal_header(targets[0])
        known = header.get("weights") if header else []
    usable = isinstance(known, list) and len(known) == len(targets) and all(isinstance(w, int) and w > 0 for w in known)
    return tuple(known) if usable else ()


def _already_packed(targets: Sequence[Path], placement: Placement) -> int:
    """Exit code 0 when the directories hold this very store, whole.

    Raises
    ------
    StoreError
        When it holds another one.
    """
    directory = targets[0]
    found = unseal(directory / MANIFEST)
    same = found.optional("id") and found.text("id") == placement.store_id
    if not same or found.texts("targets")[1:] != [str(target) for target in targets[1:]]:
        raise StoreError(
            f"{directory} already holds another store ({found.text('model')})",
            hint="choose an empty directory, or replace the store with --overwrite",
        )
    Store.open(directory)
    (directory / JOURNAL).unlink(missing_ok=True)  # left by a death between the manifest and its removal
    note(f"{directory} already holds this store; to check its data: fomoe-layout verify {directory}")
    return 0


def _tell_foreign(targets: Sequence[Path]) -> None:
    for target in targets:
        names = target_tools.foreign_files(target)
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            note(f"note: {target} holds other files ({shown}), which stay as they are")


def _check_space(targets: Sequence[Path], placement: Placement, metadata_bytes: int) -> None:
    """Raise StoreError before the first byte when a drive is too full."""
    needs = target_tools.still_needed(targets, placement, metadata_bytes)
    short = target_tools.shortages(targets, needs)
    if short:
        raise target_tools.no_room(short, "free space, or add a drive with another --to DIR")


@dataclass(slots=True)
class _Sums:
    """Checksums of what is written: by tensor name, and by layer and expert."""

    resident: dict[str, str]
    records: dict[int, list[str | None]]


class _Pack:
    """One pack under way."""

    def __init__(
        self,
        model: GGUFFile,
        source: Store,
        placement: Placement,
        targets: Sequence[Path],
        profile: Profile | None,
    ) -> None:
        self._model = model
        self._source = source
        self._placement = placement
        self._targets = targets
        self._profile = profile
        self._sums = _Sums({}, {n: [None] * layer.n_experts for n, layer in placement.experts.items()})
        self._unsynced: list[dict[str, Any]] = []
        self._last_sync = time.monotonic()
        self._sources: list[DirectFile] = []
        self._files: list[DirectFile] = []

    def run(self) -> None:
        """Write what is missing, then the manifest."""
        journal = Journal(self._targets[0], self._placement.store_id, self._placement.weights)
        try:
            self._restore(journal)
            self._copy(journal)
            self._publish()
            journal.remove()
        except KeyboardInterrupt:
            print("\ninterrupted; the same command continues", file=sys.stderr)
            raise
        finally:
            journal.close()

    def _final_paths(self) -> list[Path]:
        return [self._targets[file.target] / file.name for file in self._placement.files]

    def _restore(self, journal: Journal) -> None:
        """Take over what an earlier run completed, if all its files are still there."""
        for index, (path, planned) in enumerate(zip(self._final_paths(), self._placement.files, strict=True)):
            partial = path.with_name(path.name + target_tools.PARTIAL)
            if path.exists():
                path.rename(partial)  # killed after the renames, before the manifest
            if not _is_ours(partial, planned.bytes, data_header(self._placement.store_id, index)):
                journal.restart()
        for entry in journal.entries:
            if self._is_entry(entry):
                self._record(entry)

    def _is_entry(self, entry: dict[str, Any]) -> bool:
        """Whether a line of the journal speaks of this pack's tensors and experts."""
        if "resident" in entry:
            name = entry["resident"]
            return isinstance(name, str) and name in self._source.resident and _is_checksum(entry.get("xxh3_64"))
        experts, sums = entry.get("experts"), entry.get("xxh3_64")
        known = self._sums.records.get(entry["layer"]) if isinstance(entry.get("layer"), int) else None
        if known is None or not isinstance(experts, list) or not isinstance(sums, list) or len(experts) != len(sums):
            return False
        return all(type(e) is int and 0 <= e < len(known) for e in experts) and all(map(_is_checksum, sums))

    def _remaining(self) -> list[TensorInfo | Run]:
        tasks: list[TensorInfo | Run] = [t for t in self._placement.resident if t.name not in self._sums.resident]
        for number, layer in self._placement.experts.items():
            sums = self._sums.records[number]
            tasks += [run for run in runs(layer) if any(sums[expert] is None for expert in run.experts)]
        return tasks

    def _copy(self, journal: Journal) -> None:
        tasks = self._remaining()
        total = sum(file.bytes for file in self._placement.files)
        left = sum(_task_bytes(task) for task in tasks)
        if left < total // 2 or self._sums.resident:
            print(f"continuing: {format_bytes(total - left)} of {format_bytes(total)} are there", file=sys.stderr)
        with ExitStack() as stack:
            self._sources = stack.enter_context(opened(self._source.paths))
            self._files = [stack.enter_context(self._create(index)) for index in range(len(self._placement.files))]
            self._tell_buffered()
            progress = stack.enter_context(Progress("pack", total, total - left))

            def done(task: TensorInfo | Run, entry: dict[str, Any]) -> None:
                self._record(entry)
                self._unsynced.append(entry)
                progress.add(_task_bytes(task))
                if time.monotonic() - self._last_sync > SYNC_SECONDS:
                    self._sync(journal)

            try:
                run_tasks(tasks, self._write, done, buffer_bytes(list(self._placement.experts.values())))
            finally:
                self._sync(journal)
        note(
            f"pack  {format_bytes(left)} in {format_seconds(progress.seconds)}  {format_rate(progress.rate)}  "
            f"with checksums  -> {', '.join(str(target) for target in self._targets)}"
        )

    def _create(self, index: int) -> DirectFile:
        planned, path = self._placement.files[index], self._final_paths()[index]
        path = path.with_name(path.name + target_tools.PARTIAL)
        try:
            file = DirectFile(path, planned.bytes)
        except OSError as error:
            raise write_error(error, path) from error
        header = np.frombuffer(data_header(self._placement.store_id, index), np.uint8)
        page = Buffers(len(header)).out
        page[:] = header
        file.write(0, page)
        return file

    def _tell_buffered(self) -> None:
        for text in buffered_notes(self._files):
            note(text)

    def _write(self, task: TensorInfo | Run, buffers: Buffers) -> dict[str, Any]:
        """In a worker thread: copy a resident tensor or a run of records; returns its journal entry."""
        if isinstance(task, Run):
            view, sums = read_records(self._sources, self._source.experts[task.layer], task.experts, buffers)
            self._files[task.file].write(task.offset, view)
            return {"layer": task.layer, "experts": task.experts.tolist(), "xxh3_64": sums}

        def put(at: int, data: np.ndarray) -> None:
            whole = buffers.out[: page_up(len(data))]
            whole[len(data) :] = 0
            self._files[RESIDENT_FILE].write(task.offset + at, whole)

        checksum = read_tensor(self._sources, self._source.resident[task.name], buffers, put)
        return {"resident": task.name, "xxh3_64": checksum}

    def _record(self, entry: dict[str, Any]) -> None:
        if "resident" in entry:
            self._sums.resident[entry["resident"]] = entry["xxh3_64"]
            return
        for expert, checksum in zip(entry["experts"], entry["xxh3_64"], strict=True):
            self._sums.records[entry["layer"]][expert] = checksum

    def _sync(self, journal: Journal) -> None:
        for file in self._files:
            file.sync()
        journal.append(self._unsynced)
        self._unsynced = []
        self._last_sync = time.monotonic()

    def _publish(self) -> None:
        """Give the files their names, then write the manifest: from here on it is a store."""
        final = self._final_paths()
        for path in final:
            path.with_name(path.name + target_tools.PARTIAL).rename(path)
        for target in self._targets:
            sync_directory(target)
        records = {n: [str(checksum) for checksum in sums] for n, sums in self._sums.records.items()}
        body = describe_packed(
            self._model,
            self._placement,
            self._targets,
            self._profile,
            self._sums.resident,
            records,
            self._source.fingerprint,
        )
        try:
            write_atomically(self._targets[0] / METADATA, self._model.metadata_bytes())
            write_atomically(self._targets[0] / MANIFEST, seal(body))
        except OSError as error:
            raise write_error(error, self._targets[0] / MANIFEST) from error


def _is_ours(partial: Path, size: int, header: bytes) -> bool:
    """Whether an earlier run of this pack made the file."""
    if not partial.is_file() or partial.stat().st_size != size:
        return False
    with partial.open("rb") as stream:
        return stream.read(len(header)) == header


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def _task_bytes(task: TensorInfo | Run) -> int:
    return page_up(task.bytes)
