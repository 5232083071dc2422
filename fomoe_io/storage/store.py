"""The store's read side: where every resident tensor and every expert lies, checked before anything is read.

A store is a directory written by `fomoe-layout pack` (kind "packed") or `fomoe-layout index` ("in-place").
A GGUF file opens too, as an in-place store that exists only in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fomoe_io.errors import FormatError, StoreError, printable
from fomoe_io.storage.expert_layers import ExpertLayer, experts_of, resident_tensors
from fomoe_io.storage.gguf import GGUFFile, TensorInfo, fingerprint_of, read_metadata
from fomoe_io.storage.gguf_cursor import HEADER_LIMIT_BYTES
from fomoe_io.storage.manifest import (
    DATA_START,
    JOURNAL,
    MANIFEST,
    METADATA,
    PACK_AGAIN,
    PAGE_BYTES,
    Fields,
    data_header,
    file_checksum,
    unseal,
)
from fomoe_io.storage.manifest_layout import (
    check_disjoint,
    check_packed_places,
    check_source_places,
    layer_of,
    resident_of,
)
from fomoe_io.storage.metadata import Metadata

INDEX_AGAIN = "fomoe-layout index MODEL.gguf --to DIR --overwrite"


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
    lost_paths : dict of Path to int
        Where those copies should be -> number of the file.
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
    lost_paths: dict[Path, int] = field(default_factory=dict)

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
        return cls(
            kind="in-place",
            path=model.paths[0],
            metadata=model.metadata,
            architecture=_architecture(model.metadata, model.paths[0]),
            model_name=model_name(model.metadata, model.paths[0]),
            paths=model.paths,
            file_bytes=model.file_bytes,
            resident=resident_tensors(model),
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
        lost: dict[Path, StoreError] = {}
        if kind == "packed":
            paths, mirrors, sizes, lost = _packed_files(directory, manifest)
        else:
            paths, sizes = _source_files(manifest, fingerprint)
        metadata = _metadata(directory, manifest)
        resident, sums = resident_of(manifest, sizes)
        layers = [layer_of(fields, sizes, kind) for fields in manifest.objects("experts")]
        experts = {layer.layer: layer for layer in layers}
        if not layers or len(experts) != len(layers):
            raise manifest.error("experts: no layers, or a layer twice")
        if kind == "packed":
            check_disjoint(manifest, resident.values(), layers)
            check_packed_places(manifest, sizes, list(resident.values()), layers)
        else:
            check_source_places(manifest, paths, resident, experts)
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
            lost_copies=[problem.message for problem in lost.values()],
            lost_paths={copy: number for copy in lost for number, path in enumerate(paths) if path.name == copy.name},
        )


def model_name(metadata: Metadata, path: Path) -> str:
    """general.name, or the file's name; it is shown on terminals, so nothing in it may be a command to them."""
    return printable(metadata.text("general.name", "").strip() or path.stem)


def _architecture(metadata: Metadata, path: Path) -> str:
    name = metadata.text("general.architecture", "")
    if not name:
        raise FormatError(f"{path}: the model has no architecture (metadata key general.architecture)")
    return name


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
    if any(directory.glob("*.bin")) and (part := _part_of_store(directory)) is not None:
        raise StoreError(
            f"{directory} holds {part}, a part of a store whose manifest is elsewhere",
            hint="give the directory that was pack's first --to: it has the manifest.json",
        )
    models = sorted(directory.glob("*.gguf"))
    hint = f"give the model itself: {models[0]}" if models else f"fomoe-layout pack MODEL.gguf --to {directory}"
    raise StoreError(f"{directory} is not a store: it has no {MANIFEST}", hint=hint)


def _part_of_store(directory: Path) -> str | None:
    """Name of a data file: this is the second directory of a striped store, or a mirror."""
    for path in sorted(directory.glob("*.bin")):
        with path.open("rb") as stream:
            if stream.read(len(DATA_START)) == DATA_START:
                return path.name
    return None


def _packed_files(
    directory: Path, manifest: Fields
) -> tuple[list[Path], list[Path | None], list[int], dict[Path, StoreError]]:
    """Data files of a packed store and their mirrors, each present, of the right size and of this very store.

    Of a mirrored file one copy is enough: it becomes the file, and what is wrong with the other is told.
    """
    store_id = manifest.text("id", "[0-9a-f]{32}")
    if not manifest.objects("files"):
        raise manifest.error("files: there are none")
    targets = [directory, *(Path(text) for text in manifest.texts("targets")[1:])]
    second = Path(manifest.text("mirror")) if manifest.optional("mirror") else None
    paths: list[Path] = []
    mirrors: list[Path | None] = []
    sizes: list[int] = []
    lost: dict[Path, StoreError] = {}
    for index, fields in enumerate(manifest.objects("files")):
        target = targets[fields.integer("target", 0, len(targets) - 1)]
        name, size = fields.text("name", r"[A-Za-z0-9][A-Za-z0-9._-]*"), fields.integer("bytes", PAGE_BYTES)
        usable, problems = [], {}
        for copy in [target / name, *([second / name] if second else [])]:
            try:
                _check_data_file(copy, size, data_header(store_id, index))
                usable.append(copy)
            except StoreError as problem:
                problems[copy] = problem
        if not usable:
            raise next(iter(problems.values()))
        lost |= problems
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
    if not files:
        raise manifest.error("files: there are none")
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
