"""A GGUF file taken to pieces that can be changed one by one and put together again, sensible or not."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32


@dataclass
class Key:
    """A metadata key.  Of an array, `kind` is that of its elements and `value` their list."""

    name: bytes
    kind: int
    value: Any
    is_array: bool = False


@dataclass
class Tensor:
    """What the header says of a tensor, and the bytes behind it."""

    name: bytes
    shape: list[int]
    kind: int
    offset: int
    data: bytearray


@dataclass
class Image:
    """A file: what is counted in `key_count` and `tensor_count` may differ from what is there."""

    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    key_count: int | None = None
    tensor_count: int | None = None

    @classmethod
    def read(cls, path: Path) -> Image:
        """A well-formed file."""
        reader = _Walk(path.read_bytes())
        assert reader.take(4) == b"GGUF"
        version, tensors, keys = reader.unpack("IQQ")
        image = cls(version=version, keys=[reader.key() for _ in range(keys)])
        image.tensors = [reader.tensor() for _ in range(tensors)]
        start = -(-reader.at // ALIGNMENT) * ALIGNMENT
        for t in image.tensors:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(t.kind)]
            count = 1
            for extent in t.shape:
                count *= extent
            t.data = bytearray(reader.raw[start + t.offset : start + t.offset + count // block * size])
        return image

    def lay_out(self) -> None:
        """Offsets one after another, and as many bytes as type and shape ask for, where they make sense."""
        at = 0
        for t in self.tensors:
            wanted = _bytes_of(t)
            if wanted is not None and len(t.data) != wanted:
                t.data = (t.data * (wanted // max(1, len(t.data)) + 1))[:wanted] if t.data else bytearray(wanted)
            t.offset = at
            at += -(-len(t.data) // ALIGNMENT) * ALIGNMENT

    def write(self) -> bytes:
        """The file."""
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        )
        head = b"GGUF" + struct.pack("<IQQ", self.version & 0xFFFFFFFF, *counts)
        head += b"".join(map(_key, self.keys)) + b"".join(map(_tensor, self.tensors))
        head += bytes(-len(head) % ALIGNMENT)
        at, pieces = 0, [head]
        for t in sorted(self.tensors, key=lambda t: t.offset):
            pieces += [bytes(max(0, min(t.offset - at, 1 << 16))), bytes(t.data)]
            at = max(at, t.offset) + len(t.data)
        return b"".join(pieces) + bytes(ALIGNMENT)


class _Walk:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.raw[self.at - count : self.at]

    def unpack(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def string(self) -> bytes:
        return self.take(self.unpack("Q")[0])

    def value(self, kind: int) -> Any:
        return self.string() if kind == STRING else self.unpack(SCALARS[kind])[0]

    def key(self) -> Key:
        name, (kind,) = self.string(), self.unpack("I")
        if kind != ARRAY:
            return Key(name, kind, self.value(kind))
        of, count = self.unpack("IQ")
        return Key(name, of, [self.value(of) for _ in range(count)], True)

    def tensor(self) -> Tensor:
        name, (dimensions,) = self.string(), self.unpack("I")
        shape = list(self.unpack(f"{dimensions}Q"))
        kind, offset = self.unpack("IQ")
        return Tensor(name, shape, kind, offset, bytearray())


def _bytes_of(t: Tensor) -> int | None:
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(t.kind)]
    except ValueError:
        return None
    total = size
    for extent in t.shape:
        total *= extent
    return total // block if t.shape and 0 < total // block < 1 << 24 else None


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _scalar(kind: int, value: Any) -> bytes:
    form = SCALARS[kind]
    if form in "fd":
        return struct.pack("<" + form, value if abs(value) < 3e38 or value != value or form == "d" else float("inf"))
    bits = 8 * struct.calcsize("<" + form)
    wrapped = int(value) % (1 << bits)
    return wrapped.to_bytes(bits // 8, "little")


def _value(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else _scalar(kind, value)


def _key(key: Key) -> bytes:
    if not key.is_array:
        return _string(key.name) + struct.pack("<I", key.kind) + _value(key.kind, key.value)
    head = struct.pack("<IIQ", ARRAY, key.kind, len(key.value))
    return _string(key.name) + head + b"".join(_value(key.kind, value) for value in key.value)


def _tensor(t: Tensor) -> bytes:
    shape = [extent % (1 << 64) for extent in t.shape]
    return _string(t.name) + struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *shape, t.kind % (1 << 32), t.offset % (1 << 64)
    )
