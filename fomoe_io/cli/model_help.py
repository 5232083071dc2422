"""What a file is that is no model, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from fomoe_io.errors import FomoeError, FormatError, StoreError, UsageError
from fomoe_io.storage.gguf import GGUFFile

_KINDS = {
    "adapter": ("a LoRA adapter, not a model", "the model that it belongs to, with the adapter merged"),
    "imatrix": ("an importance matrix, not a model", "fomoe-layout pack MODEL --profile IMATRIX"),
    "mmproj": ("a vision projector, not a model", "the model's own GGUF, which reads text"),
}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def missing(path: Path) -> UsageError:
    """Of a name that is no file."""
    name = str(path)
    if re.match(r"(https?|hf)://", name) or name.startswith(("http:/", "https:/", "hf:/")):
        return UsageError(f"{name} is an address, not a file", hint="download it first, or -hf USER/MODEL:QUANT")
    if re.fullmatch(r"[\w.-]+:[\w.-]+", name):
        return UsageError(f"{name} is a name of ollama's, and no file", hint="-hf USER/MODEL:QUANT, or a GGUF file")
    hint = None
    with suppress(OSError):
        names = [other.name for other in path.parent.iterdir() if other.suffix == ".gguf" or other.is_dir()]
        close = get_close_matches(path.name, names, 1, cutoff=0.6)
        hint = str(path.parent / close[0]) if close else None
    if hint is None and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        hint = f"-hf {name}, if it is on the Hugging Face hub"
    return UsageError(f"{name}: no such file or directory", hint=hint)


def _of_directory(path: Path) -> UsageError | None:
    """Of a directory that is no store."""
    found = sorted(path.glob("*.gguf"))
    firsts = [f for f in found if (m := _SHARD.fullmatch(f.name)) is None or int(m[2]) == 1]
    firsts = [f for f in firsts if "mmproj" not in f.name.lower()]
    if firsts:
        return UsageError(f"{path} is no store, but holds GGUF files", hint=str(firsts[0]))
    if any(path.glob("*.safetensors")):
        return UsageError(f"{path} holds safetensors, not a GGUF", hint="llama.cpp's convert_hf_to_gguf.py makes one")
    return None


def _of_file(path: Path) -> UsageError | None:
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        return UsageError(f"{path} is no GGUF", hint="llama.cpp's convert_hf_to_gguf.py makes one of its directory")
    with suppress(FomoeError, OSError):
        metadata = GGUFFile.open(path).metadata
        kind = metadata.text("general.type", "model")
        if metadata.text("general.architecture", "") == "clip":
            kind = "mmproj"
        if kind in _KINDS:
            what, hint = _KINDS[kind]
            return UsageError(f"{path} is {what}", hint=hint)
    return None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """While a model is opened: an error says what the file is instead, where that can be told."""
    if not path.exists():
        raise missing(path)
    try:
        yield
    except (FormatError, StoreError):
        better = _of_directory(path) if path.is_dir() else _of_file(path)
        if better is None:
            raise
        raise better from None
