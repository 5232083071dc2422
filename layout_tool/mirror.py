"""`fomoe-layout mirror`: a second copy of a store's data on another drive, read when the first is slower or fails."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fomoe_io.cli.common import note
from fomoe_io.cli.progress import Progress
from fomoe_io.errors import StoreError, UsageError
from fomoe_io.storage.manifest import MANIFEST, Fields, page_up, seal, unseal
from fomoe_io.storage.store import Store, manifest_path
from fomoe_io.system.files import sync_directory, write_atomically
from fomoe_io.units import format_bytes, format_rate, format_seconds
from layout_tool import targets as target_tools
from layout_tool.direct import DirectFile, buffered_notes, write_error
from layout_tool.placement import CHUNK_BYTES
from layout_tool.records import opened
from layout_tool.workers import Buffers, run_tasks


class _Chunk(NamedTuple):
    """A range of a data file."""

    file: int
    offset: int
    bytes: int


def mirror(directory: Path, target: Path, *, ignore_free_space: bool = False) -> int:
    """Copy the data files, then tell the manifest.  A copy that is there already is kept.

    Parameters
    ----------
    directory : Path
        A packed store.
    target : Path
        A directory on another drive.
    ignore_free_space : bool
        Write though the drive says that it is too full.

    Raises
    ------
    StoreError
        When there is no room, or the target holds another store; the manifest is left as it was.
    """
    path = manifest_path(directory)
    if unseal(path).text("kind") != "packed":
        raise UsageError(f"{directory} points into a GGUF", hint=f"fomoe-layout pack MODEL.gguf --to {directory}")
    body = json.loads(path.read_bytes())
    del body["xxh3_64"]
    # the copy that this one replaces does not count
    store = Store.of_manifest(directory, Fields({**body, "mirror": None}, str(path)))
    target = target_tools.resolve([target])[0]
    if any(target.resolve() == source.parent.resolve() for source in store.paths):
        raise UsageError(f"{target} holds the store itself", hint="a directory on another drive: --to DIR")
    copies = {number: target / source.name for number, source in enumerate(store.paths)}
    missing = [number for number, copy in copies.items() if not _is_copy(store, number, copy)]
    _check_target(store, target, missing, ignore_free_space=ignore_free_space)
    target_tools.make([target])
    _copy(store, copies, missing)
    body["mirror"] = str(target)
    Store.of_manifest(directory, Fields(body, str(path)))
    try:
        write_atomically(directory / MANIFEST, seal(body))
    except OSError as error:
        raise write_error(error, path) from error
    if any(source.stat().st_dev == target.stat().st_dev for source in store.paths):
        note(f"note: {target} lies on the drive of the store: a mirror there survives no drive")
    return 0


def unmirror(directory: Path) -> int:
    """Make a mirrored store one without: the manifest first, then the copies go.

    Raises
    ------
    StoreError
        It has no mirror, or the first copy is not whole by itself; nothing is changed.
    """
    path = manifest_path(directory)
    found = unseal(path)
    if not found.optional("mirror"):
        raise UsageError(f"{directory} has no mirror", hint=f"fomoe-layout inspect {directory}")
    second = Path(found.text("mirror"))
    body = json.loads(path.read_bytes())
    del body["xxh3_64"], body["mirror"]
    store = Store.of_manifest(directory, Fields(body, str(path)))  # whole without it
    copies = {number: second / source.name for number, source in enumerate(store.paths)}
    copies = {number: copy for number, copy in copies.items() if _is_copy(store, number, copy)}
    try:
        write_atomically(directory / MANIFEST, seal(body))
        for copy in copies.values():
            copy.unlink()
    except OSError as error:
        raise write_error(error, path) from error
    size = format_bytes(sum(store.file_bytes[number] for number in copies))
    note(f"mirror  {second} is none any more; {len(copies)} files, {size} removed")
    return 0


def _is_copy(store: Store, number: int, copy: Path) -> bool:
    """Whether a finished copy of the file is there: renamed only when whole, and its first page names the store."""
    if not copy.is_file() or copy.stat().st_size != store.file_bytes[number]:
        return False
    with copy.open("rb") as mine, store.paths[number].open("rb") as other:
        return mine.read(CHUNK_BYTES) == other.read(CHUNK_BYTES)


def _check_target(store: Store, target: Path, missing: list[int], *, ignore_free_space: bool) -> None:
    for number in missing:
        copy = target / store.paths[number].name
        if copy.exists():
            raise StoreError(f"{copy} belongs to another store", hint="choose an empty directory")
    short = target_tools.shortages([target], [sum(store.file_bytes[number] for number in missing)])
    if short and not ignore_free_space:
        raise target_tools.no_room(short, "free space, or choose another drive")


def _copy(store: Store, copies: dict[int, Path], missing: list[int]) -> None:
    total = sum(page_up(store.file_bytes[number]) for number in missing)
    partial = {number: copies[number].with_name(copies[number].name + target_tools.PARTIAL) for number in missing}
    chunks = [
        _Chunk(number, offset, min(CHUNK_BYTES, store.file_bytes[number] - offset))
        for number in missing
        for offset in range(0, store.file_bytes[number], CHUNK_BYTES)
    ]
    with ExitStack() as stack:
        sources = stack.enter_context(opened(store.paths))
        files: dict[int, DirectFile] = {}
        for number in missing:
            try:
                files[number] = stack.enter_context(DirectFile(partial[number], store.file_bytes[number]))
            except OSError as error:
                raise write_error(error, partial[number]) from error
        for text in buffered_notes(files.values()):
            note(text)
        progress = stack.enter_context(Progress("mirror", total))

        def copy(chunk: _Chunk, buffers: Buffers) -> None:
            view = sources[chunk.file].read(chunk.offset, chunk.bytes, buffers.out)
            files[chunk.file].write(chunk.offset, view)

        run_tasks(chunks, copy, lambda chunk, _: progress.add(chunk.bytes), CHUNK_BYTES)
        for file in files.values():
            file.sync()
    for number in missing:
        partial[number].rename(copies[number])
        sync_directory(copies[number].parent)
    note(
        f"mirror  {format_bytes(total)} in {format_seconds(progress.seconds)}  {format_rate(progress.rate)}; "
        f"to check both copies: fomoe-layout verify {store.path}"
    )
