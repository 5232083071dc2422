"""A bounded GGUF reader: every count, offset and size is checked against the file before it is used.

Reads versions 2 and 3, little-endian, single files and shards (`NAME-00001-of-0000N.gguf`, from the first one).
The header is read once, front to back; large arrays (vocabularies) are left in the file until somebody asks.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import gguf

from fomoe_io.errors import FormatError
from fomoe_io.storage.gguf_cursor import DOWNLOAD_AGAIN, Cursor
from fomoe_io.storage.metadata import Metadata

MAGIC = b"GGUF"

KEY_LIMIT_BYTES = 65535
NAME_LIMIT_BYTES = 255
"""Keys: the GGUF specification.  Tensor names: it says 64; some converters write a little more."""

DEFAULT_ALIGNMENT = 32

MOST_SHARDS = 99999
"""As many as their names can count."""

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes
    ----------
    name : str
    type : gguf.GGMLQuantizationType
    shape : tuple of int
        In GGUF order: the fastest dimension first.
    file : int
        Index into the paths of the file or store.
    offset : int
        Absolute, in bytes.
    bytes : int
    """

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    file: int
    offset: int
    bytes: int


def tensor_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; rows are whole blocks.

    Raises
    ------
    ValueError
        When the rows are no multiple of the type's block.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[0] % block:
        raise ValueError(f"rows of {shape[0]} elements, but {kind.name} comes in blocks of {block}")
    total = shape[0] // block * block_bytes
    for extent in shape[1:]:
        total *= extent
    return total


@dataclass(frozen=True, slots=True)
class _Shard:
    """One parsed file."""

    path: Path
    size: int
    metadata: Metadata
    preamble: bytes
    keys_start: int
    keys_end: int
    tensors: list[TensorInfo]
    header_bytes: int


def _read_shard(path: Path, file: int) -> _Shard:
    cursor = Cursor(path)
    try:
        version, tensor_count, key_count = _preamble(cursor)
        first_key = cursor.at
        values = _metadata(cursor, key_count)
        keys_end = cursor.at
        tensors = _tensors(cursor, tensor_count, values, file)
        preamble = MAGIC + struct.pack("<IQQ", version, 0, key_count)
        return _Shard(path, cursor.size, values, preamble, first_key, keys_end, tensors, cursor.at)
    finally:
        cursor.close()


def _preamble(cursor: Cursor) -> tuple[int, int, int]:
    """(version, tensors, keys)"""
    if cursor.size < 24 or cursor.data[cursor.take(4) : cursor.at] != MAGIC:
        raise FormatError(
            f"{cursor.path} is not a GGUF file: it does not start with the letters GGUF",
            hint="give a .gguf model, or a store made by: fomoe-layout pack MODEL.gguf --to DIR",
        )
    version = cursor.u32()
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        raise FormatError(
            f"{cursor.path} has GGUF version {version}, expected 2 or 3" + (" (big-endian?)" if swapped else ""),
            hint="convert the model again with a current llama.cpp, for a little-endian machine",
        )
    # Least bytes of a tensor: name length and a letter, dimensions (one), type, offset.  Of a key: length, letter,
    # type, value.
    tensors = cursor.bounded(cursor.u64(), 8 + 1 + 4 + 8 + 4 + 8, "tensors")
    keys = cursor.bounded(cursor.u64(), 8 + 1 + 4 + 1, "metadata keys")
    return version, tensors, keys


def _metadata(cursor: Cursor, count: int) -> Metadata:
    values: dict[str, Any] = {}
    for index in range(count):
        cursor.what = f"metadata key {index + 1} of {count}"
        key = cursor.string(KEY_LIMIT_BYTES, "strict")
        cursor.what = f"metadata key {key!r}"
        if key in values:
            raise cursor.error("occurs twice (damaged?)")
        values[key] = cursor.value(key)
    return Metadata(values, str(cursor.path))


def _tensors(cursor: Cursor, count: int, values: Metadata, file: int) -> list[TensorInfo]:
    """Tensor infos: sizes, alignment, bounds and overlaps checked."""
    expected = "a power of two from 8"
    alignment = values.integer("general.alignment", DEFAULT_ALIGNMENT, least=8, most=1 << 30, expected=expected)
    if alignment & (alignment - 1):
        raise FormatError(f"{cursor.path}: general.alignment is {alignment}, expected {expected}")
    found = []
    for index in range(count):
        cursor.what = f"tensor {index + 1} of {count}"
        found.append(_tensor(cursor, alignment))
    data_offset = -(-cursor.at // alignment) * alignment
    tensors = []
    end_of_previous, previous = 0, ""
    for name, kind, shape, offset, size in sorted(found, key=lambda item: item[3]):
        if offset < end_of_previous:
            raise FormatError(f"{cursor.path}: tensors {previous} and {name} overlap (damaged?)", hint=DOWNLOAD_AGAIN)
        end_of_previous, previous = offset + size, name
        if data_offset + end_of_previous > cursor.size:
            raise FormatError(
                f"{cursor.path}: tensor {name} ends at byte {data_offset + end_of_previous:,}, but the file has "
                f"{cursor.size:,} (truncated?)",
                hint=DOWNLOAD_AGAIN,
            )
        tensors.append(TensorInfo(name, kind, shape, file, data_offset + offset, size))
    return tensors


def _tensor(cursor: Cursor, alignment: int) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int, int]:
    """(name, type, shape, offset in the data, bytes)"""
    name = cursor.string(NAME_LIMIT_BYTES, "strict")
    cursor.what = f"tensor {name}"
    dimensions = cursor.u32()
    if not 1 <= dimensions <= 4:
        raise cursor.error(f"has {dimensions} dimensions, expected 1 to 4 (damaged?)")
    shape = tuple(cursor.u64() for _ in range(dimensions))
    if min(shape) < 1:
        raise cursor.error(f"has shape {list(shape)}: a dimension is empty")
    number = cursor.u32()
    try:
        kind = gguf.GGMLQuantizationType(number)
        size = tensor_bytes(kind, shape)
    except ValueError as error:
        reason = str(error) if "blocks of" in str(error) else f"type number {number} is unknown"
        raise cursor.error(reason, "update package gguf: pip install -U gguf") from None
    offset = cursor.u64()
    if offset % alignment:
        raise cursor.error(f"starts at {offset:,}, which is no multiple of the alignment {alignment} (damaged?)")
    if size > cursor.size or offset > cursor.size:
        raise cursor.error(
            f"of {size:,} bytes at {offset:,} does not fit in the {cursor.size:,} bytes of the file (truncated?)",
            DOWNLOAD_AGAIN,
        )
    return name, kind, shape, offset, size


class GGUFFile:
    """A GGUF model, all shards together.  Use :meth:`open`.

    Attributes
    ----------
    metadata : Metadata
        Keys of the first shard.
    tensors : dict of str to TensorInfo
        `file` indexes `paths`.
    paths : list of Path
    file_bytes : list of int
    header_bytes : list of int
        Up to the end of the tensor infos.
    """

    def __init__(self, shards: list[_Shard]) -> None:
        self.metadata = shards[0].metadata
        self._first = shards[0]
        self.paths = [shard.path for shard in shards]
        self.file_bytes = [shard.size for shard in shards]
        self.header_bytes = [shard.header_bytes for shard in shards]
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for tensor in shard.tensors:
                if tensor.name in self.tensors:
                    raise FormatError(f"{shard.path}: tensor {tensor.name} occurs twice (damaged?)")
                self.tensors[tensor.name] = tensor

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the headers of a model.

        Parameters
        ----------
        path : str or Path
            A single file, or the first of several shards.

        Raises
        ------
        FormatError
            When a header is damaged or hostile, or a shard is missing or of another model.
        """
        first = _read_shard(_existing(Path(path)), 0)
        count = first.metadata.integer("split.count", 1, most=MOST_SHARDS)
        if count <= 1:
            return cls([first])
        shards = [first]
        for index, shard_path in enumerate(_shard_paths(Path(path), first.metadata, count)):
            if index:
                shards.append(_read_shard(_existing(shard_path), index))
                _check_shard(shards[-1], index, first.metadata)
        total = first.metadata.integer("split.tensors.count", None)
        found = sum(len(shard.tensors) for shard in shards)
        if total is not None and total != found:
            raise FormatError(
                f"{path}: the shards hold {found} tensors, split.tensors.count says {total}", hint=DOWNLOAD_AGAIN
            )
        return cls(shards)

    def metadata_bytes(self) -> bytes:
        """The first shard's keys as a GGUF file of their own, without tensors."""
        with self._first.path.open("rb") as stream:
            stream.seek(self._first.keys_start)
            return self._first.preamble + stream.read(self._first.keys_end - self._first.keys_start)

    def fingerprint(self) -> str:
        """Identity of the weights: 32 hexadecimal digits, see :func:`fingerprint_of`."""
        return fingerprint_of(list(zip(self.paths, self.file_bytes, self.header_bytes, strict=True)))


def fingerprint_of(files: list[tuple[Path, int, int]]) -> str:
    """Fingerprint of (path, bytes, header bytes) in shard order: sizes, headers, and a sample of the data.

    Names do not count, so a renamed model keeps its fingerprint.  The sample (16 blocks of 4 KiB of each file)
    tells fine-tunes apart whose headers are alike.
    """
    digest = hashlib.sha256()
    for path, size, header_bytes in files:
        digest.update(f"{size} {header_bytes}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(header_bytes))
            for i in range(16):
                stream.seek(header_bytes + max(0, size - header_bytes - 4096) * i // 15)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:32]


def read_metadata(path: Path) -> Metadata:
    """The keys of one GGUF file, whatever its tensors.

    Raises
    ------
    FormatError
    """
    return _read_shard(_existing(path), 0).metadata


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise FormatError(f"{path} is a directory, expected a .gguf file")
    if path.exists() and not path.is_file():
        raise FormatError(f"{path} is not a regular file")
    if not path.exists():
        shard = _SHARD_NAME.fullmatch(path.name)
        hint = f"all {int(shard['count'])} shards must lie in {path.parent}" if shard else "check the path"
        raise FormatError(f"{path} does not exist", hint=hint)
    return path


def _shard_paths(path: Path, metadata: Metadata, count: int) -> list[Path]:
    """Paths of all shards, from the name of the first."""
    number = metadata.integer("split.no", 0, most=count - 1)
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise FormatError(
            f"{path} is one of {count} shards, but its name does not end in -00001-of-{count:05d}.gguf",
            hint=f"rename the shards as they were published: NAME-00001-of-{count:05d}.gguf",
        )
    if number != 0 or int(name["number"]) != 1:
        first = path.with_name(f"{name['stem']}-00001-of-{count:05d}.gguf")
        raise FormatError(f"{path} is shard {number + 1} of {count}", hint=f"give the first one: {first}")
    return [path.with_name(f"{name['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def _check_shard(shard: _Shard, index: int, first: Metadata) -> None:
    found = [shard.metadata.integer(key, None) for key in ("split.no", "split.count", "split.tensors.count")]
    expected = [index, first.integer("split.count"), first.integer("split.tensors.count", None)]
    if found != expected:
        raise FormatError(
            f"{shard.path} is shard {found[0]} (from 0) of {found[1]} with {found[2]} tensors in all, expected {index} "
            f"of {expected[1]} with {expected[2]}: it is of another model",
            hint="the shards of one model must lie together under their published names",
        )
