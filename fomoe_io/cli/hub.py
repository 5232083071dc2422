"""Models from the Hugging Face hub: `-hf USER/MODEL:QUANT`, resumed where a download was cut short."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fomoe_io.cli.common import note
from fomoe_io.cli.remote import Remote, download
from fomoe_io.errors import UsageError
from fomoe_io.units import format_bytes

DEFAULT_QUANT = "Q4_K_M"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)


def chosen_files(names: Sequence[str], quant: str | None, file: str | None) -> list[str]:
    """The GGUF to fetch, as all of its shards; the file that was named, else that of the quant, else the first one.

    Raises
    ------
    UsageError
        There is none.
    """
    models = sorted(n for n in names if n.endswith(".gguf") and not _NO_MODEL.search(n.rpartition("/")[2]))
    firsts = [n for n in models if (m := _SHARD.fullmatch(n)) is None or int(m[2]) == 1]
    if file is not None:
        found = [n for n in firsts if n == file]
    else:
        wanted = quant or DEFAULT_QUANT
        word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [n for n in firsts if word.search(n)] or ([] if quant else firsts)
    if not found:
        there = ", ".join(firsts[:8]) or "no GGUF file"
        raise UsageError(f"the repository has no {file or quant or 'model'}; it has {there}", hint="-hff FILE")
    match = _SHARD.fullmatch(found[0])
    if match is None:
        return found[:1]
    shards = [f"{match[1]}-{i:05d}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]
    gone = [name for name in shards if name not in models]
    if gone:
        raise UsageError(f"the repository lacks {gone[0]}, one of {len(shards)} shards")
    return shards


@contextmanager
def _one_line(text: str) -> Iterator[Any]:
    """The hub's client; whatever it raises is one line, and names what was asked for."""
    try:
        import huggingface_hub as hub
    except ModuleNotFoundError:
        raise UsageError("package huggingface_hub is missing", hint="pip install huggingface_hub") from None
    try:
        yield hub
    except UsageError:
        raise
    except Exception as error:  # its own, of the network, of the file system
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "look at the name and the network, or -hft TOKEN"
        raise UsageError(f"{text} can't be had from the hub: {why}", hint=hint) from None


def _listed(hub: Any, text: str, file: str | None, token: str | None) -> tuple[str, list[str], dict[str, int]]:
    """(repository, files of the model, sizes of all files)"""
    repository, _, quant = text.partition(":")
    info = hub.HfApi(token=token).model_info(repository, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    return repository, chosen_files(list(sizes), quant or None, file), sizes


def fetched(text: str, file: str | None, token: str | None, *, offline: bool) -> Path:
    """The (first) file of a model in the hub's cache, downloaded if it is not there.

    Raises
    ------
    UsageError
        There is no such model, no way to it, or no room.
    """
    with _one_line(text) as hub:
        if offline:
            repository, _, quant = text.partition(":")
            folder = Path(hub.snapshot_download(repository, local_files_only=True))
            names = [str(p.relative_to(folder)) for p in folder.rglob("*.gguf")]
            return folder / chosen_files(names, quant or None, file)[0]
        repository, files, sizes = _listed(hub, text, file, token)
        _check_room(repository, files, sizes)
        for name in files:
            _have(hub, repository, name, sizes[name], token)
        paths = [Path(hub.hf_hub_download(repository, name, token=token)) for name in files]
        return paths[0]


def address(text: str, file: str | None, token: str | None) -> str:
    """Where the (first) file of a model can be read from, without downloading it.

    Raises
    ------
    UsageError
        There is no such model, or no way to it.
    """
    with _one_line(text) as hub:
        repository, files, _ = _listed(hub, text, file, token)
        return str(hub.hf_hub_url(repository, files[0]))


def _have(hub: Any, repository: str, name: str, size: int, token: str | None) -> None:
    """Put a file where the hub's client keeps it.  Left to itself, that starts from nothing after every interrupt."""
    if hub.try_to_load_from_cache(repository, name):
        return
    url = hub.hf_hub_url(repository, name)
    tag = hub.get_hf_file_metadata(url, token=token).etag or ""
    if not size or re.fullmatch(r"[A-Za-z0-9-]{8,}", tag) is None:
        return  # nothing to go by: the client's own way
    blob = _folder(repository) / "blobs" / tag
    if not blob.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        download(Remote(url, token or hub.get_token()), blob, size, name.rpartition("/")[2])


def _folder(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _check_room(repository: str, files: Sequence[str], sizes: dict[str, int]) -> None:
    from huggingface_hub import constants

    size = sum(sizes[name] for name in files)
    place = Path(constants.HF_HUB_CACHE)
    there = _bytes_there(_folder(repository), files)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    note(f"{files[0]}{more}: {format_bytes(size)} -> {place}" + (f", {format_bytes(there)} are there" if there else ""))
    if size - there > free:
        raise UsageError(
            f"{format_bytes(size - there)} do not fit into {format_bytes(free)} at {place}", hint="HF_HOME=/nvme0/hf"
        )


def _bytes_there(folder: Path, files: Sequence[str]) -> int:
    """Of an earlier download, whole or cut short: what need not be fetched again."""
    with suppress(OSError):
        whole = {path.resolve() for name in files for path in folder.glob(f"snapshots/*/{name}")}
        parts = [*whole, *folder.glob("blobs/*.incomplete")]
        return sum(path.stat().st_size for path in parts)
    return 0
