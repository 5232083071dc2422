"""What a manifest says, as the dictionary that is sealed into manifest.json (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from fomoe_io.experts.profile import Profile
from fomoe_io.storage.expert_layers import FILE, OFFSET, ExpertLayer
from fomoe_io.storage.gguf import GGUFFile, TensorInfo
from fomoe_io.storage.manifest import FORMAT, PAGE_BYTES, VERSION, checksum
from fomoe_io.storage.placement import written_frequency
from fomoe_io.storage.store import Store, model_name
from layout_tool.placement import Placement


def describe_packed(
    model: GGUFFile,
    placement: Placement,
    targets: Sequence[Path],
    profile: Profile | None,
    resident_sums: Mapping[str, str],
    record_sums: Mapping[int, Sequence[str]],
    fingerprint: str,
) -> dict[str, Any]:
    """Manifest of a packed store."""
    files = [{"target": file.target, "name": file.name, "bytes": file.bytes} for file in placement.files]
    experts = [_layer(layer, record_sums[number]) for number, layer in sorted(placement.experts.items())]
    return {
        **_head("packed", model, fingerprint),
        "id": placement.store_id,
        "alignment_bytes": PAGE_BYTES,
        "targets": [str(target) for target in targets],
        "weights": list(placement.weights),
        "profile": None if profile is None else {"tokens": profile.tokens, "source": profile.source},
        "files": files,
        "resident": _tensors(placement.resident, resident_sums),
        "experts": experts,
    }


def describe_in_place(
    model: GGUFFile,
    store: Store,
    resident_sums: Mapping[str, str] | None,
    record_sums: Mapping[int, Sequence[str]] | None,
) -> dict[str, Any]:
    """Manifest of an in-place store; without checksums when they were not computed."""
    files = [
        {"path": str(path.absolute()), "bytes": size, "header_bytes": header}
        for path, size, header in zip(model.paths, model.file_bytes, model.header_bytes, strict=True)
    ]
    return {
        **_head("in-place", model, store.fingerprint),
        "profile": None,
        "files": files,
        "resident": _tensors(store.resident.values(), resident_sums or {}),
        "experts": [_layer(layer, (record_sums or {}).get(n)) for n, layer in sorted(store.experts.items())],
    }


def _head(kind: str, model: GGUFFile, fingerprint: str) -> dict[str, Any]:
    metadata = model.metadata_bytes()
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "model": model_name(model.metadata, model.paths[0]),
        "fingerprint": fingerprint,
        "source": [
            {"name": path.name, "bytes": size} for path, size in zip(model.paths, model.file_bytes, strict=True)
        ],
        "metadata": {"bytes": len(metadata), "xxh3_64": checksum(metadata)},
    }


def _tensors(tensors: Iterable[TensorInfo], sums: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": t.name,
            "type": t.type.name,
            "shape": list(t.shape),
            "file": t.file,
            "offset": t.offset,
            "bytes": t.bytes,
            "xxh3_64": sums.get(t.name),
        }
        for t in tensors
    ]


def _layer(layer: ExpertLayer, sums: Sequence[str] | None) -> dict[str, Any]:
    parts = [
        {
            "name": part.name,
            "type": gguf.GGMLQuantizationType(part.type).name,
            "shape": list(part.shape),
            "bytes": part.bytes,
            "file": layer.extents[:, i, FILE].tolist(),
            "offset": layer.extents[:, i, OFFSET].tolist(),
        }
        for i, part in enumerate(layer.parts)
    ]
    return {
        "layer": layer.layer,
        "experts": layer.n_experts,
        "parts": parts,
        "xxh3_64": None if sums is None else list(sums),
        "picks_per_token": None if layer.frequency is None else written_frequency(layer.frequency).tolist(),
    }
