"""`fomoe-layout index`: a store that points into the GGUF itself.  Only a manifest is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io.cli.common import note
from fomoe_io.cli.progress import Progress
from fomoe_io.errors import StoreError
from fomoe_io.storage.gguf import TensorInfo
from fomoe_io.storage.manifest import JOURNAL, MANIFEST, METADATA, page_up, seal, unseal
from fomoe_io.storage.store import Store
from fomoe_io.system.files import write_atomically
from layout_tool import targets as target_tools
from layout_tool.describe import describe_in_place
from layout_tool.direct import write_error
from layout_tool.journal import check_idle
from layout_tool.pack import open_model
from layout_tool.placement import CHUNK_BYTES, Run
from layout_tool.records import buffer_bytes, opened, read_records, read_tensor
from layout_tool.workers import Buffers, run_tasks


def index(model_path: Path, directory: Path, *, checksums: bool, overwrite: bool) -> int:
    """Write the manifest of an in-place store.

    Parameters
    ----------
    model_path : Path
        A GGUF, or its first shard.
    directory : Path
    checksums : bool
        Read the whole model once, so that `verify` can tell later whether it changed.
    overwrite : bool
        Replace the store that the directory holds.

    Raises
    ------
    FomoeError
    """
    model, store = open_model(model_path)
    targets = target_tools.resolve([directory])
    if not overwrite:
        if (targets[0] / JOURNAL).exists():
            raise StoreError(f"{directory} holds an unfinished pack", hint="choose another directory, or --overwrite")
        known = _index_of(store, targets[0])
        if known is None:
            target_tools.check_unused(targets)
        elif has_checksums(known) and known.paths == [path.absolute() for path in model.paths]:
            note(f"{directory} already is an index of this model, with checksums; to check it: fomoe-layout verify")
            return 0
    resident, records = _checksums(store) if checksums else (None, None)
    if overwrite:
        check_idle(targets[0])
        target_tools.clear(targets)
    target_tools.make(targets)
    body = describe_in_place(model, store, resident, records)
    try:
        write_atomically(targets[0] / METADATA, model.metadata_bytes())
        write_atomically(targets[0] / MANIFEST, seal(body))
    except OSError as error:
        raise write_error(error, targets[0] / MANIFEST) from error
    note(f"index  {len(store.experts)} layers of {model.paths[0]} -> {directory}")
    return 0


def _index_of(store: Store, directory: Path) -> Store | None:
    """The index of the same model that a directory holds: it may be written again, as nothing is lost.

    Raises
    ------
    StoreError
        It holds the experts themselves, packed.
    """
    if not (directory / MANIFEST).exists():
        return None
    found = unseal(directory / MANIFEST)
    if found.text("fingerprint") != store.fingerprint:
        return None
    if found.text("kind") == "packed":
        raise StoreError(
            f"{directory} holds this model packed, which needs no index", hint=f"fomoe-run {directory}, as it is"
        )
    try:
        return Store.open(directory)
    except StoreError:  # it points to where the model was
        return store


def has_checksums(store: Store) -> bool:
    """Whether every tensor and every expert has one."""
    return store.resident_checksums is not None and all(layer.checksums is not None for layer in store.experts.values())


def id_runs(store: Store) -> list[Run]:
    """Experts of every layer in order of their ids, as many at once as a buffer takes: good for any store."""
    result = []
    for number, layer in store.experts.items():
        most = max(1, CHUNK_BYTES // layer.record_bytes)
        for first in range(0, layer.n_experts, most):
            ids = np.arange(first, min(first + most, layer.n_experts))
            result.append(Run(number, ids, 0, 0, layer.record_bytes))
    return result


def _checksums(store: Store) -> tuple[dict[str, str], dict[int, list[str]]]:
    resident: dict[str, str] = {}
    records: dict[int, list[str]] = {number: [] for number in store.experts}
    sums: dict[tuple[int, int], str] = {}
    tasks: list[TensorInfo | Run] = [*store.resident.values(), *id_runs(store)]
    with opened(store.paths) as files, Progress("index", sum(page_up(task.bytes) for task in tasks)) as progress:

        def work(task: TensorInfo | Run, buffers: Buffers) -> Any:
            if isinstance(task, Run):
                return read_records(files, store.experts[task.layer], task.experts, buffers)[1]
            return read_tensor(files, task, buffers)

        def done(task: TensorInfo | Run, result: Any) -> None:
            if isinstance(task, Run):
                sums.update({(task.layer, int(expert)): s for expert, s in zip(task.experts, result, strict=True)})
            else:
                resident[task.name] = result
            progress.add(page_up(task.bytes))

        run_tasks(tasks, work, done, buffer_bytes(list(store.experts.values())))
    for (layer, _), checksum in sorted(sums.items()):
        records[layer].append(checksum)
    return resident, records
