"""manifest.json: sealing, unsealing and typed access.  docs/format.md describes what is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fomoe_io.errors import StoreError

FORMAT, VERSION = "fomoe-store", 1
MANIFEST, METADATA, JOURNAL = "manifest.json", "metadata.gguf", "pack.journal"
PAGE_BYTES = 4096
"""Alignment of records and resident tensors: the largest logical block size of common drives."""

MANIFEST_LIMIT_BYTES = 1 << 30
DATA_START = b'{"format": "fomoe-data"'
PART_NAMES = ("gate", "up", "down")
PACK_AGAIN = "fomoe-layout pack MODEL.gguf --to DIR --overwrite"

_SEAL = re.compile(rb',\n"xxh3_64":"([0-9a-f]{16})"}\n\Z')
_SEAL_BYTES = len(b',\n"xxh3_64":"0123456789abcdef"}\n')


def checksum(data: bytes | bytearray | memoryview) -> str:
    """xxh3_64 as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def file_checksum(path: Path) -> str:
    """:func:`checksum` of a whole file, a piece at a time."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def page_up(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def seal(body: dict[str, Any]) -> bytes:
    """The manifest's text: the last key is the checksum of all text before it."""
    text = json.dumps(body, separators=(",", ":")).removesuffix("}").encode()
    return text + f',\n"xxh3_64":"{checksum(text)}"}}\n'.encode()


def unseal(path: Path) -> Fields:
    """Read a manifest.

    Raises
    ------
    StoreError
        When it is absent, of another version, or its text is not what was sealed.
    """
    size = path.stat().st_size
    if size > MANIFEST_LIMIT_BYTES:
        raise StoreError(f"{path} has {size:,} bytes, which no manifest needs", hint=PACK_AGAIN)
    text = path.read_bytes()
    seal_found = _SEAL.search(text, max(0, len(text) - _SEAL_BYTES))
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of a store (damaged?)", hint=PACK_AGAIN)
    if body.get("version") != VERSION:
        raise StoreError(
            f"{path} has version {body.get('version')!r}, this program reads {VERSION}",
            hint=f"update fomoe_io, or {PACK_AGAIN}",
        )
    if seal_found is None or seal_found[1].decode() != checksum(text[: seal_found.start()]):
        raise StoreError(f"{path} does not match its checksum (damaged or edited)", hint=PACK_AGAIN)
    return Fields(body, str(path))


def data_header(store_id: str, file: int) -> bytes:
    """First page of a data file: tells whose file it is, so that a stray one is never computed with."""
    text = json.dumps({"format": "fomoe-data", "version": VERSION, "store": store_id, "file": file}) + "\n"
    return text.encode().ljust(PAGE_BYTES, b"\0")


class Fields:
    """A JSON object whose fields are checked as they are read.

    Parameters
    ----------
    values : dict
    where : str
        How errors call it.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def error(self, message: str) -> StoreError:
        """An error that names this object."""
        return StoreError(f"{self._where}: {message}", hint=PACK_AGAIN)

    def _get(self, key: str, kind: type) -> Any:
        value = self._values.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{key} is {str(value)[:40]!r}, expected {kind.__name__}")
        return value

    def integer(self, key: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
        """An integer in [least, most]."""
        value = self._get(key, int)
        if not least <= value <= most:
            raise self.error(f"{key} is {value}, expected {least} to {most}")
        return int(value)

    def text(self, key: str, pattern: str = ".*") -> str:
        """A string that matches `pattern`."""
        value = self._get(key, str)
        if re.fullmatch(pattern, value, re.DOTALL) is None:
            raise self.error(f"{key} is {value[:60]!r}")
        return str(value)

    def optional(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(key) is not None

    def integers(self, key: str, count: int | None = None) -> np.ndarray:
        """int64 [count]"""
        return self._array(key, count, "i").astype(np.int64)

    def numbers(self, key: str, count: int) -> np.ndarray:
        """float64 [count], finite and not negative."""
        values = self._array(key, count, "if").astype(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self.error(f"{key} holds a number that is negative or not finite")
        return values

    def _array(self, key: str, count: int | None, kinds: str) -> np.ndarray:
        listed = self._get(key, list)
        if count is not None and len(listed) != count:
            raise self.error(f"{key} has {len(listed)} entries, expected {count}")
        try:
            values = np.array(listed) if listed else np.zeros(0, np.int64)
        except ValueError:
            values = np.zeros(0, object)
        if values.dtype.kind not in kinds or values.ndim != 1:
            raise self.error(f"{key} is not a list of numbers")
        return values

    def checksums(self, key: str, count: int) -> np.ndarray:
        """uint64 [count] from strings of 16 hexadecimal digits."""
        listed = self._get(key, list)
        if len(listed) != count:
            raise self.error(f"{key} has {len(listed)} entries, expected {count}")
        try:
            return np.array([int(text, 16) for text in listed], np.uint64)
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"{key} is not a list of checksums") from None

    def object(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self._get(key, dict), f"{self._where}: {key}")

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        listed = self._get(key, list)
        if not all(isinstance(item, dict) for item in listed):
            raise self.error(f"{key} is not a list of objects")
        return [Fields(item, f"{self._where}: {key}[{i}]") for i, item in enumerate(listed)]

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        listed = self._get(key, list)
        if not all(isinstance(item, str) for item in listed):
            raise self.error(f"{key} is not a list of strings")
        return list(listed)
