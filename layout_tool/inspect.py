"""`fomoe-layout inspect`: one screen about a store or a GGUF.  Reads no weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fomoe_io.errors import FormatError, printable
from fomoe_io.storage.store import Store
from fomoe_io.units import format_bytes
from layout_tool.check_runs import check_runs
from layout_tool.index import has_checksums
from layout_tool.plan import model_lines, model_report


def inspect(path: Path, *, as_json: bool) -> int:
    """Print what a store or GGUF holds, of any architecture with routed experts, and whether it runs.

    The exit code is 0 either way: it was described.

    Raises
    ------
    FomoeError
    """
    store = Store.open(path)
    report = _report(store)
    print(json.dumps(report, indent=1) if as_json else "\n".join(printable(line) for line in _lines(report)))
    return 0


def _report(store: Store) -> dict[str, Any]:
    layers = list(store.experts.values())
    refusal = _refusal(store)
    types = Counter("/".join(gguf.GGMLQuantizationType(part.type).name for part in layer.parts) for layer in layers)
    vocabulary = "tokenizer.ggml.tokens"
    return {
        "path": str(store.path),
        "kind": store.kind,
        **model_report(store),
        "runs": refusal is None,
        "refusal": refusal,
        "files": [{"path": str(path), "bytes": size} for path, size in zip(store.paths, store.file_bytes, strict=True)],
        "mirrors": [str(path) for path in store.mirrors if path is not None],
        "lost_copies": store.lost_copies,
        "expert_types": dict(types),
        "checksums": has_checksums(store),
        "profile_tokens": store.profile_tokens,
        "hottest_tenth_share": _hottest_share(store),
        "vocabulary": store.metadata.length(vocabulary),
        "chat_template": "tokenizer.chat_template" in store.metadata,
        "context_tokens": store.metadata.integer(f"{store.architecture}.context_length", None),
    }


def _refusal(store: Store) -> str | None:
    """Why the model would not run; None when it would."""
    try:
        check_runs(store)
    except FormatError as error:
        return error.message
    return None


def _hottest_share(store: Store) -> float | None:
    """Share of all picks that the hottest tenth of a layer's experts take, by the profile; None without one."""
    shares = []
    for layer in store.experts.values():
        if layer.frequency is not None:
            ordered = np.sort(layer.frequency)[::-1]
            shares.append(float(ordered[: max(1, len(ordered) // 10)].sum() / ordered.sum()))
    return sum(shares) / len(shares) if shares else None


def _lines(report: dict[str, Any]) -> list[str]:
    types = ", ".join(f"{name} in {count} layers" for name, count in report["expert_types"].items())
    context = report["context_tokens"]
    lines = [
        *model_lines(report),
        f"  types      {types} (gate/up/down)",
        f"  tokens     vocabulary {report['vocabulary']:,}, context {context:,}, "
        + ("chat template" if report["chat_template"] else "no chat template")
        if isinstance(context, int)
        else f"  tokens     vocabulary {report['vocabulary']:,}",
        f"  store      {report['kind']}, {'with' if report['checksums'] else 'without'} checksums, "
        f"fingerprint {report['fingerprint']}",
    ]
    if report["profile_tokens"]:
        lines.append(
            f"  profile    {report['profile_tokens']:,} tokens; the hottest tenth of the experts takes "
            f"{100 * report['hottest_tenth_share']:.0f} % of the picks"
        )
    lines += [f"  file       {format_bytes(file['bytes']):>9}  {file['path']}" for file in report["files"]]
    if report["refusal"] is not None:
        lines.append(f"  does not run: {report['refusal']}")
    lines += [f"  mirror                {path}" for path in report["mirrors"]]
    lines += [f"  lost copy             {problem}" for problem in report["lost_copies"]]
    return lines
