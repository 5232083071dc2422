"""Models from the Hugging Face hub: `-hf USER/MODEL:QUANT`, resumed where a download was cut short."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fomoe_io.cli.common import note
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


def fetched(text: str, file: str | None, token: str | None, *, offline: bool) -> Path:
    """The (first) file of a model in the hub's cache, downloaded if it is not there.

    Raises
    ------
    UsageError
        There is no such model, no way to it, or no room.
    """
    try:
        import huggingface_hub as hub
    except ModuleNotFoundError:
        raise UsageError("package huggingface_hub is missing", hint="pip install huggingface_hub") from None
    repository, _, quant = text.partition(":")
    try:
        if offline:
            folder = Path(hub.snapshot_download(repository, local_files_only=True))
            names = [str(p.relative_to(folder)) for p in folder.rglob("*.gguf")]
            return folder / chosen_files(names, quant or None, file)[0]
        info = hub.HfApi(token=token).model_info(repository, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        files = chosen_files(list(sizes), quant or None, file)
        _check_room(files, sizes)
        paths = [Path(hub.hf_hub_download(repository, name, token=token)) for name in files]
    except UsageError:
        raise
    except Exception as error:  # its own, of the network, of the file system: each is one line here
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "look at the name and the network, or -hft TOKEN"
        raise UsageError(f"{text} can't be had from the hub: {why}", hint=hint) from None
    return paths[0]


def _check_room(files: Sequence[str], sizes: dict[str, int]) -> None:
    from huggingface_hub import constants

    size = sum(sizes[name] for name in files)
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    note(f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: {format_bytes(size)} -> {place}")
    if size > free + _partly_there(files, sizes):
        raise UsageError(
            f"{format_bytes(size)} do not fit into {format_bytes(free)} at {place}", hint="HF_HOME=/nvme0/hf"
        )


def _partly_there(files: Sequence[str], sizes: dict[str, int]) -> int:
    """A download may be there in part or as a whole: only the hub's client knows how much, so all of it counts."""
    return sum(sizes[name] for name in files) if any(_is_cached(name) for name in files) else 0


def _is_cached(name: str) -> bool:
    from huggingface_hub import constants

    return any(Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{name}"))
