"""The store's read side: where every resident tensor and every expert lies, checked before anything is read.

A store is a directory written by `fomoe-layout pack` (kind "packed") or `fomoe-layout index` ("in-place").
A GGUF file opens too, as an in-place store that exists only in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import gguf
import numpy as np

from fomoe_io.errors import FormatError, StoreError
from fomoe_io.storage.gguf import (
    GGUFFile,
    TensorInfo,
    fingerprint_of,
    read_metadata,
    tensor_bytes,
)
from fomoe_io.storage.gguf_cursor import HEADER_LIMIT_BYTES
from fomoe_io.storage.manifest import (
    JOURNAL,
    MANIFEST,
    METADATA,
    PACK_AGAIN,
    PAGE_BYTES,
    PART_NAMES,
    Fields,
    data_header,
    file_checksum,
    page_up,
    unseal,
)
from fomoe_io.storage.metadata import Metadata

MAX_EXPERTS = 1 << 16
FILE, OFFSET, BYTES = 0, 1, 2
"""Columns of :attr:`ExpertLayer.extents`."""

_EXPERTS = re.compile(r"blk\.(\d{1,5})\.ffn_(gate_up|gate|up|down)_exps\.weight")
_SEPARATE_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
INDEX_AGAIN = "fomoe-layout index MODEL.gguf --to DIR --overwrite"


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One of the three matrices of the experts of a layer.

    Attributes
    ----------
    name : {"gate", "up", "down"}
    type : int
        gguf.GGMLQuantizationType
    shape : tuple of int
        (ne0, ne1): columns, rows.
    bytes : int
        Of one expert.
    """

    name: str
    type: int
    shape: tuple[int, int]
    bytes: int


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The routed experts of one layer.

    Attributes
    ----------
    layer : int
    n_experts : int
    parts : tuple of ExpertPart
        gate, up, down.
    extents : numpy.ndarray
        int64 [n_experts, 3, 3]: (file, offset, bytes) of each part of each expert.
    checksums : numpy.ndarray or None
        uint64 [n_experts]: xxh3_64 over gate, up and down.
    frequency : numpy.ndarray or None
        float64 [n_experts]: picks per token in the profile.
    """

    layer: int
    n_experts: int
    parts: tuple[ExpertPart, ExpertPart, ExpertPart]
    extents: np.ndarray
    checksums: np.ndarray | None = None
    frequency: np.ndarray | None = None

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return sum(part.bytes for part in self.parts)

    @property
    def record_bytes(self) -> int:
        """Weights of one expert rounded up to whole pages: its record in a packed store."""
        return page_up(self.expert_bytes)


@dataclass(frozen=True, slots=True)
class Store:
    """A model ready to be read.  Use :meth:`open`.

    Attributes
    ----------
    kind : {"packed", "in-place"}
    path : Path
        What was opened.
    metadata : Metadata
        All GGUF keys of the model, tokenizer and chat template included.
    architecture, model_name : str
    paths : list of Path
        Data files; `TensorInfo.file` and the extents index it.
    file_bytes : list of int
    mirrors : list of Path or None
        For each data file the same bytes on another drive; None where there are none, or they can't be used.
    lost_copies : list of str
        What is wrong with copies of mirrored files that can't be used.
    resident : dict of str to TensorInfo
        Everything that is not a routed expert.
    resident_checksums : dict of str to int or None
        xxh3_64 of each resident tensor.
    experts : dict of int to ExpertLayer
    fingerprint : str
        Of the GGUF that the weights come from.
    profile_tokens : int
        Tokens behind the experts' frequencies; 0 without a profile.
    """

    kind: str
    path: Path
    metadata: Metadata
    architecture: str
    model_name: str
    paths: list[Path]
    file_bytes: list[int]
    resident: dict[str, TensorInfo]
    resident_checksums: dict[str, int] | None
    experts: dict[int, ExpertLayer]
    fingerprint: str
    profile_tokens: int = 0
    mirrors: list[Path | None] = field(default_factory=list)
    lost_copies: list[str] = field(default_factory=list)

    def copies(self) -> tuple[list[Path], dict[int, int]]:
        """Every file to open, data files first; and for each that is mirrored the number of its other copy."""
        paths, other = list(self.paths), {}
        for number, mirror in enumerate(self.mirrors):
            if mirror is not None:
                other[number], other[len(paths)] = len(paths), number
                paths.append(mirror)
        return paths, other

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store directory or a GGUF file.

        Raises
        ------
        StoreError
            When the store is absent, unfinished, damaged or not the one its manifest describes.
        FormatError
            When the GGUF is.
        """
        path = Path(path)
        if not path.is_dir():
            return cls.of_gguf(GGUFFile.open(path))
        return cls.of_manifest(path, unseal(manifest_path(path)))

    @classmethod
    def of_gguf(cls, model: GGUFFile) -> Self:
        """A GGUF's own tensors as an in-place store."""
        experts = experts_of(model)
        resident = {name: t for name, t in model.tensors.items() if not _EXPERTS.fullmatch(name)}
        return cls(
            kind="in-place",
            path=model.paths[0],
            metadata=model.metadata,
            architecture=_architecture(model.metadata, model.paths[0]),
            model_name=model_name(model.metadata, model.paths[0]),
            paths=model.paths,
            file_bytes=model.file_bytes,
            resident=resident,
            resident_checksums=None,
            experts=experts,
            fingerprint=model.fingerprint(),
        )

    @classmethod
    def of_manifest(cls, directory: Path, manifest: Fields) -> Self:
        """The store that a manifest describes, everything checked.

        Raises
        ------
        StoreError
        """
        kind = manifest.text("kind", "packed|in-place")
        fingerprint = manifest.text("fingerprint", "[0-9a-f]{32}")
        mirrors: list[Path | None] = []
        lost: list[str] = []
        if kind == "packed":
            paths, mirrors, sizes, lost = _packed_files(directory, manifest)
        else:
            paths, sizes = _source_files(manifest, fingerprint)
        metadata = _metadata(directory, manifest)
        resident, sums = _resident(manifest, sizes)
        layers = [_layer(fields, sizes, kind) for fields in manifest.objects("experts")]
        experts = {layer.layer: layer for layer in layers}
        if not layers or len(experts) != len(layers):
            raise manifest.error("experts: no layers, or a layer twice")
        if kind == "packed":
            _check_disjoint(manifest, resident.values(), layers)
        profile = manifest.object("profile").integer("tokens", 1) if manifest.optional("profile") else 0
        return cls(
            kind=kind,
            path=directory,
            metadata=metadata,
            architecture=_architecture(metadata, directory),
            model_name=manifest.text("model"),
            paths=paths,
            file_bytes=sizes,
            resident=resident,
            resident_checksums=sums,
            experts=experts,
            fingerprint=fingerprint,
            profile_tokens=profile,
            mirrors=mirrors,
            lost_copies=lost,
        )


def model_name(metadata: Metadata, path: Path) -> str:
    """general.name, or the file's name."""
    return metadata.text("general.name", "").strip() or path.stem


def _architecture(metadata: Metadata, path: Path) -> str:
    name = metadata.text("general.architecture", "")
    if not name:
        raise FormatError(f"{path}: the model has no architecture (metadata key general.architecture)")
    return name


# ---- experts of a GGUF ----


def experts_of(model: GGUFFile) -> dict[int, ExpertLayer]:
    """Routed experts by layer: `ffn_{gate,up,down}_exps`, or fused `ffn_gate_up_exps` as its two halves.

    Raises
    ------
    FormatError
        When the model has none, or the shapes of a layer do not go together.
    """
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, tensor in model.tensors.items():
        match = _EXPERTS.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = tensor
        elif _SEPARATE_EXPERTS.fullmatch(name):
            raise FormatError(
                f"{model.paths[0]} stores each expert as a tensor of its own ({name}), as files before 2024 did",
                hint="convert the model again with a current llama.cpp",
            )
    if not found:
        raise FormatError(
            f"{model.paths[0]} has no routed experts (blk.N.ffn_down_exps.weight)",
            hint="fomoe_io runs Mixture-of-Experts models; run a dense one with llama.cpp",
        )
    return {layer: _layer_of(layer, found[layer]) for layer in sorted(found)}


def _layer_of(layer: int, tensors: dict[str, TensorInfo]) -> ExpertLayer:
    where = f"blk.{layer}.ffn_*_exps.weight"
    if set(tensors) not in ({"gate", "up", "down"}, {"gate_up", "down"}):
        found = ", ".join(sorted(tensors))
        raise FormatError(f"{where}: found {found}, expected gate, up and down, or gate_up and down")
    for tensor in tensors.values():
        if len(tensor.shape) != 3 or tensor.shape[2] > MAX_EXPERTS:
            raise FormatError(f"{tensor.name} has shape {list(tensor.shape)}, expected [columns, rows, experts]")
    n_experts = tensors["down"].shape[2]
    pieces = []
    for name in PART_NAMES:
        tensor = tensors[name] if name in tensors else tensors["gate_up"]
        rows = tensor.shape[1] if name in tensors else tensor.shape[1] // 2
        part = ExpertPart(
            name, int(tensor.type), (tensor.shape[0], rows), tensor_bytes(tensor.type, (tensor.shape[0], rows))
        )
        stride = tensor.bytes // tensor.shape[2]
        pieces.append((part, tensor, stride, part.bytes if name == "up" and name not in tensors else 0))
    gate, up, down = (piece[0] for piece in pieces)
    shapes_fit = gate.shape == up.shape and down.shape == (gate.shape[1], gate.shape[0])
    if not shapes_fit or {t.shape[2] for t in tensors.values()} != {n_experts} or _odd_rows(tensors):
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(tensors.items()))
        raise FormatError(f"{where}: shapes do not go together: {shapes}")
    extents = np.zeros((n_experts, 3, 3), np.int64)
    ids = np.arange(n_experts, dtype=np.int64)
    for i, (part, tensor, stride, shift) in enumerate(pieces):
        extents[:, i, FILE] = tensor.file
        extents[:, i, OFFSET] = tensor.offset + ids * stride + shift
        extents[:, i, BYTES] = part.bytes
    return ExpertLayer(layer, n_experts, (gate, up, down), extents)


def _odd_rows(tensors: dict[str, TensorInfo]) -> bool:
    return "gate_up" in tensors and tensors["gate_up"].shape[1] % 2 == 1


# ---- stores on disk ----


def manifest_path(directory: Path) -> Path:
    """Of a finished store.

    Raises
    ------
    StoreError
        When the directory is none.
    """
    path = directory / MANIFEST
    if path.exists():
        return path
    if (directory / JOURNAL).exists():
        raise StoreError(
            f"{directory} is an unfinished store: its pack was interrupted",
            hint=f"finish it with the same command: fomoe-layout pack MODEL.gguf --to {directory}",
        )
    models = sorted(directory.glob("*.gguf"))
    hint = f"give the model itself: {models[0]}" if models else f"fomoe-layout pack MODEL.gguf --to {directory}"
    raise StoreError(f"{directory} is not a store: it has no {MANIFEST}", hint=hint)


def _packed_files(directory: Path, manifest: Fields) -> tuple[list[Path], list[Path | None], list[int], list[str]]:
    """Data files of a packed store and their mirrors, each present, of the right size and of this very store.

    Of a mirrored file one copy is enough: it becomes the file, and what is wrong with the other is told.
    """
    store_id = manifest.text("id", "[0-9a-f]{32}")
    targets = [directory, *(Path(text) for text in manifest.texts("targets")[1:])]
    second = Path(manifest.text("mirror")) if manifest.optional("mirror") else None
    paths: list[Path] = []
    mirrors: list[Path | None] = []
    sizes, lost = [], []
    for index, fields in enumerate(manifest.objects("files")):
        target = targets[fields.integer("target", 0, len(targets) - 1)]
        name, size = fields.text("name", r"[A-Za-z0-9][A-Za-z0-9._-]*"), fields.integer("bytes", PAGE_BYTES)
        usable, problems = [], []
        for copy in [target / name, *([second / name] if second else [])]:
            try:
                _check_data_file(copy, size, data_header(store_id, index))
                usable.append(copy)
            except StoreError as problem:
                problems.append(problem)
        if not usable:
            raise problems[0]
        lost += [problem.message for problem in problems]
        paths.append(usable[0])
        mirrors.append(usable[1] if len(usable) > 1 else None)
        sizes.append(size)
    return paths, mirrors, sizes, lost


def _check_data_file(path: Path, size: int, header: bytes) -> None:
    if not path.is_file():
        raise StoreError(
            f"{path}, a part of the store, is missing (moved, or its drive is not mounted?)",
            hint="mount the drive, or tell where it is now: fomoe-layout relocate STORE --to DIR",
        )
    actual = path.stat().st_size
    if actual != size:
        raise StoreError(f"{path} has {actual:,} bytes, its manifest says {size:,}", hint=PACK_AGAIN)
    with path.open("rb") as stream:
        if stream.read(PAGE_BYTES) != header:
            raise StoreError(f"{path} belongs to another store, or is damaged", hint=PACK_AGAIN)


def _source_files(manifest: Fields, fingerprint: str) -> tuple[list[Path], list[int]]:
    """The GGUF files of an in-place store, each present and unchanged."""
    files = []
    for fields in manifest.objects("files"):
        path, size = Path(fields.text("path")), fields.integer("bytes", 1)
        if not path.is_file():
            raise StoreError(f"{path}, which the store points into, does not exist", hint=INDEX_AGAIN)
        if path.stat().st_size != size:
            raise StoreError(
                f"{path} has {path.stat().st_size:,} bytes, it had {size:,} when indexed", hint=INDEX_AGAIN
            )
        files.append((path, size, fields.integer("header_bytes", 1, min(size, HEADER_LIMIT_BYTES))))
    if fingerprint_of(files) != fingerprint:
        raise StoreError(f"{files[0][0]} is not the model that was indexed (it changed)", hint=INDEX_AGAIN)
    return [path for path, *_ in files], [size for _, size, *_ in files]


def _metadata(directory: Path, manifest: Fields) -> Metadata:
    fields = manifest.object("metadata")
    path = directory / METADATA
    if not path.is_file() or path.stat().st_size != fields.integer("bytes"):
        raise StoreError(f"{path} is missing or has another size than its manifest says", hint=PACK_AGAIN)
    if file_checksum(path) != fields.text("xxh3_64"):
        raise StoreError(f"{path} does not match its checksum (damaged)", hint=PACK_AGAIN)
    return read_metadata(path)


def _kind(fields: Fields) -> gguf.GGMLQuantizationType:
    name = fields.text("type")
    if name not in gguf.GGMLQuantizationType.__members__:
        raise fields.error(f"type {name!r} is unknown; update package gguf: pip install -U gguf")
    return gguf.GGMLQuantizationType[name]


def _shaped(fields: Fields, dimensions: range) -> tuple[gguf.GGMLQuantizationType, tuple[int, ...], int]:
    """(type, shape, bytes), consistent with one another."""
    kind, size = _kind(fields), fields.integer("bytes", 1)
    shape = tuple(int(extent) for extent in fields.integers("shape"))
    if len(shape) not in dimensions or min(shape) < 1:
        raise fields.error(f"shape is {list(shape)}")
    try:
        consistent = tensor_bytes(kind, shape) == size
    except ValueError:
        consistent = False
    if not consistent:
        raise fields.error(f"{size} bytes do not fit type {kind.name} and shape {list(shape)}")
    return kind, shape, size


def _resident(manifest: Fields, sizes: list[int]) -> tuple[dict[str, TensorInfo], dict[str, int] | None]:
    tensors: dict[str, TensorInfo] = {}
    sums: dict[str, int] = {}
    for fields in manifest.objects("resident"):
        name = fields.text("name")
        kind, shape, size = _shaped(fields, range(1, 5))
        file = fields.integer("file", 0, len(sizes) - 1)
        offset = fields.integer("offset", 0, sizes[file] - size)
        if name in tensors:
            raise fields.error(f"tensor {name} occurs twice")
        tensors[name] = TensorInfo(name, kind, shape, file, offset, size)
        if fields.optional("xxh3_64"):
            sums[name] = int(fields.text("xxh3_64", "[0-9a-f]{16}"), 16)
    return tensors, sums if len(sums) == len(tensors) else None


def _layer(fields: Fields, sizes: list[int], kind: str) -> ExpertLayer:
    n_experts = fields.integer("experts", 1, MAX_EXPERTS)
    found = fields.objects("parts")
    if [part.text("name") for part in found] != list(PART_NAMES):
        raise fields.error("parts are not gate, up, down")
    file_bytes = np.array(sizes, np.int64)
    extents = np.zeros((n_experts, 3, 3), np.int64)
    parts = []
    for i, part in enumerate(found):
        type_, shape, size = _shaped(part, range(2, 3))
        parts.append(ExpertPart(PART_NAMES[i], int(type_), (shape[0], shape[1]), size))
        file, offset = part.integers("file", n_experts), part.integers("offset", n_experts)
        if file.min() < 0 or file.max() >= len(sizes):
            raise part.error(f"names a file beyond the {len(sizes)} of the store")
        if offset.min() < 0 or (offset > file_bytes[file] - size).any():
            raise part.error("an expert lies outside its file")
        extents[:, i, FILE], extents[:, i, OFFSET], extents[:, i, BYTES] = file, offset, size
    layer = ExpertLayer(
        fields.integer("layer", 0, 1 << 16),
        n_experts,
        (parts[0], parts[1], parts[2]),
        extents,
        fields.checksums("xxh3_64", n_experts) if fields.optional("xxh3_64") else None,
        fields.numbers("picks_per_token", n_experts) if fields.optional("picks_per_token") else None,
    )
    if kind == "packed":
        _check_records(fields, layer)
    return layer


def _check_records(fields: Fields, layer: ExpertLayer) -> None:
    """Records of a packed store start on a page, their parts follow one another."""
    file, offset, size = (layer.extents[:, :, column] for column in (FILE, OFFSET, BYTES))
    contiguous = (offset[:, 1:] == offset[:, :-1] + size[:, :-1]).all() and (file == file[:, :1]).all()
    if not contiguous or (offset[:, 0] % PAGE_BYTES).any():
        raise fields.error("a record does not start on a page, or its parts do not follow one another")


def _check_disjoint(manifest: Fields, resident: Iterable[TensorInfo], layers: list[ExpertLayer]) -> None:
    """Nothing of a packed store lies on something else."""
    rows = [[t.file, t.offset, t.bytes] for t in resident]
    for layer in layers:
        records = layer.extents[:, 0].copy()
        records[:, BYTES] = layer.expert_bytes
        rows += records.tolist()
    table = np.array(rows, np.int64)
    table = table[np.lexsort((table[:, OFFSET], table[:, FILE]))]
    ends = table[:, OFFSET] + table[:, BYTES]
    same = table[1:, FILE] == table[:-1, FILE]
    if (same & (table[1:, OFFSET] < ends[:-1])).any() or (table[:, OFFSET] < PAGE_BYTES).any():
        raise manifest.error("records or tensors overlap")
