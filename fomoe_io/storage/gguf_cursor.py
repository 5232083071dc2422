"""Walking over a GGUF header: scalars, strings and arrays, never past the end of the file."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io.errors import FormatError

HEADER_LIMIT_BYTES = 256 << 20
"""No sane header is larger: the one of a 397B model with 248,320 tokens and their merges takes 11 MB."""

EAGER_ELEMENTS = 1024
"""Arrays of more elements are decoded when asked for, each time."""

DOWNLOAD_AGAIN = "download the file again and compare its size and checksum with the publisher's"

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class LazyArray:
    """An array left in its file, already checked to lie inside."""

    path: Path
    key: str
    kind: int
    count: int
    offset: int
    bytes: int

    def load(self) -> list[str] | np.ndarray:
        """Read and decode it.

        Raises
        ------
        FormatError
            When the file is no longer what it was.
        """
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            raw = stream.read(self.bytes)
        if len(raw) != self.bytes:
            raise FormatError(f"{self.path}: metadata key {self.key}: the file was cut while in use")
        try:
            return _decode_strings(raw, self.count) if self.kind == _STRING else _numbers(raw, self.kind)
        except (struct.error, OverflowError):
            raise FormatError(f"{self.path}: metadata key {self.key}: the file was changed while in use") from None


def _decode_strings(raw: bytes | bytearray, count: int) -> list[str]:
    """Strings that follow one another, each after its 64-bit length; bounds were checked by the scan."""
    strings, at, unpack = [], 0, _U64.unpack_from
    for _ in range(count):
        end = at + 8 + unpack(raw, at)[0]
        strings.append(raw[at + 8 : end].decode("utf-8", "replace"))
        at = end
    if at != len(raw):
        raise struct.error("the strings end elsewhere")
    return strings


def _numbers(raw: bytes | bytearray, kind: int) -> np.ndarray:
    values = np.frombuffer(bytes(raw), _SCALARS[kind])
    return values != 0 if kind == _BOOL else values


class Cursor:
    """Walks over a header, loading the file as needed, never past its end or `HEADER_LIMIT_BYTES`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray()
        self.at = 0
        self.what = "the GGUF header"
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file; `data` stays."""
        os.close(self._descriptor)

    def error(self, message: str, hint: str | None = None) -> FormatError:
        """An error that names the file and `what` is being read."""
        return FormatError(f"{self.path}: {self.what}: {message}", hint=hint)

    def load(self, end: int) -> None:
        """Have the first `end` bytes of the file in `data`."""
        if end > self.size:
            raise self.error(f"would end at byte {end:,}, but the file has {self.size:,} (truncated?)", DOWNLOAD_AGAIN)
        if end > HEADER_LIMIT_BYTES:
            raise self.error(f"would make the header larger than {HEADER_LIMIT_BYTES >> 20} MiB (damaged?)")
        wanted = min(max(end, 2 * len(self.data), 1 << 20), self.size, HEADER_LIMIT_BYTES)
        while len(self.data) < wanted:
            piece = os.pread(self._descriptor, wanted - len(self.data), len(self.data))
            if not piece:
                raise self.error("the file was cut while being read")
            self.data += piece

    def take(self, count: int) -> int:
        """Step over `count` bytes and return where they start."""
        start = self.at
        if start + count > len(self.data):
            self.load(start + count)
        self.at = start + count
        return start

    def u32(self) -> int:
        """The next unsigned 32-bit number."""
        return int(_U32.unpack_from(self.data, self.take(4))[0])

    def u64(self) -> int:
        """The next unsigned 64-bit number."""
        return int(_U64.unpack_from(self.data, self.take(8))[0])

    def bounded(self, count: int, least_bytes: int, of: str) -> int:
        """Check that `count` items of at least `least_bytes` each can lie in the rest of the file."""
        if count * least_bytes > self.size - self.at:
            raise self.error(
                f"announces {count:,} {of}, more than the {self.size:,} bytes of the file hold", DOWNLOAD_AGAIN
            )
        return count

    def string(self, limit: int | None = None, errors: str = "replace") -> str:
        """The next string; `limit` in bytes, `errors` as of bytes.decode."""
        length = self.bounded(self.u64(), 1, "bytes of text")
        if limit is not None and length > limit:
            raise self.error(f"a name of {length:,} bytes, at most {limit:,} make sense (damaged?)")
        start = self.take(length)
        try:
            text = self.data[start : self.at].decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self.error("a name that is not UTF-8 (damaged?)") from None
        if limit is not None and not text.isprintable():  # it will be shown on terminals
            raise self.error(f"a name with control characters, {text[:60]!r} (damaged?)")
        return text

    def skip_strings(self, count: int) -> None:
        """Step over an array of strings.  A tight loop: vocabularies have hundreds of thousands."""
        data, unpack, at, loaded = self.data, _U64.unpack_from, self.at, len(self.data)
        for _ in range(count):
            if at + 8 > loaded:
                self.load(at + 8)
                loaded = len(data)
            at += 8 + unpack(data, at)[0]
            if at > loaded:
                self.load(at)
                loaded = len(data)
        self.at = at

    def value(self, key: str) -> Any:
        """The next typed value: a scalar, a string, a list, or a LazyArray when it is long."""
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self.error(f"has value type {kind}, which GGUF does not define")
        start = self.take(np.dtype(_SCALARS[kind]).itemsize)
        return _numbers(self.data[start : self.at], kind)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self.u32(), self.u64()
        if kind not in _SCALARS and kind != _STRING:
            raise self.error(f"is an array of value type {kind}, which is not supported")
        size = 8 if kind == _STRING else np.dtype(_SCALARS[kind]).itemsize
        self.bounded(count, size, "array elements")
        start = self.at
        if kind == _STRING:
            self.skip_strings(count)
        else:
            self.take(count * size)
        if count > EAGER_ELEMENTS:
            return LazyArray(self.path, key, kind, count, start, self.at - start)
        raw = self.data[start : self.at]
        return _decode_strings(raw, count) if kind == _STRING else _numbers(raw, kind).tolist()
