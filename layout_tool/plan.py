"""`fomoe plan`: memory and speed to expect, what pack would write and how long it takes.  Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fomoe_io.errors import UsageError, printable
from fomoe_io.experts.profile import Profile
from fomoe_io.storage.gguf import GGUFFile
from fomoe_io.storage.manifest import MANIFEST, Fields, unseal
from fomoe_io.storage.store import Store
from fomoe_io.units import format_bytes, format_rate, format_seconds
from layout_tool import targets as target_tools
from layout_tool.check_runs import check_runs
from layout_tool.outlook import Machine, Wanted
from layout_tool.pack import known_weights, model_frequencies, open_model
from layout_tool.placement import place
from layout_tool.striping import Striping


def plan(
    wanted: Wanted,
    directories: Sequence[Path],
    profile_path: Path | None,
    striping: Striping,
    machine: Machine,
    *,
    as_json: bool,
) -> int:
    """Print the plan; exit code 1 when it does not fit.

    Raises
    ------
    FomoeError
    """
    with wanted.path() as path:
        if path.is_dir() and directories:
            raise UsageError(f"{path} is a store", hint="the GGUF that is to be packed, or no --to")
        source = Store.open(path)
        check_runs(source)
        report: dict[str, Any] = {**model_report(source), "model_bytes": sum(source.file_bytes)}
        report["shards"] = len(source.paths)
        short: list[str] = []
        if not path.is_dir():
            packing, short = _packing(path, directories or [], profile_path, striping, is_here=not wanted.is_elsewhere)
            report.update(packing)
        forecast = machine.forecast(path, source, is_elsewhere=wanted.is_elsewhere)
    report["forecast"] = forecast.report([machine.ram_bytes] if machine.ram_bytes is not None else [])
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _print(report, short)
        print("\n".join(printable(line) for line in machine.lines(forecast)))
    return 1 if short else 0


def _packing(
    path: Path, directories: Sequence[Path], profile_path: Path | None, striping: Striping, *, is_here: bool
) -> tuple[dict[str, Any], list[str]]:
    """(what pack would do, which drives are too full)"""
    model, source = open_model(path)
    profile = None if profile_path is None else Profile.load(profile_path)
    frequencies = model_frequencies(source, profile)
    targets = target_tools.resolve(directories)
    held = _held(targets)
    known = known_weights(targets, False) if targets else ()
    if not targets or known:
        placement = place(source, frequencies, known or (1,))
    else:
        placement = striping.placement(source, frequencies, targets, model.header_bytes[0])
    is_there = held is not None and held.optional("id") and held.text("id") == placement.store_id
    needs = target_tools.still_needed(targets, placement, model.header_bytes[0]) if targets else []
    short = [] if striping.ignore_free_space or is_there else target_tools.shortages(targets, needs)
    report: dict[str, Any] = {
        "store_bytes": sum(file.bytes for file in placement.files),
        "profile_tokens": profile.tokens if profile else 0,
        "targets": [
            {"path": str(target), "needs_bytes": need, "free_bytes": target_tools.free_bytes(target), "weight": weight}
            for target, need, weight in zip(targets, needs, placement.weights if targets else (), strict=True)
        ],
        "fits": not short,
        "is_there": bool(is_there),
        "holds_another": None if held is None or is_there else held.text("model"),
    }
    if targets and not short and not is_there and is_here:
        report.update(_time(model, targets, needs, striping))
    return report, short


def _held(targets: Sequence[Path]) -> Fields | None:
    """The manifest of the store that the directories hold already."""
    return unseal(targets[0] / MANIFEST) if targets and (targets[0] / MANIFEST).exists() else None


def _time(model: GGUFFile, targets: Sequence[Path], needs: Sequence[int], striping: Striping) -> dict[str, Any]:
    """How long a pack takes: by measuring the drives, or by reading alone, which writes nothing."""
    size = sum(needs)
    if striping.measures:
        seconds = target_tools.copy_seconds(
            model.paths[0], targets, needs, ignore_free_space=striping.ignore_free_space
        )
        how = "reading and writing measured, 1 s a drive"
    else:
        seconds, how = (
            size / target_tools.read_rate(model.paths[0]),
            "at least: reading is measured, --probe writes",
        )
    return {"seconds": round(seconds, 1), "seconds_by": how, "bytes_per_second": size / max(seconds, 1e-9)}


def model_report(store: Store) -> dict[str, Any]:
    """What a model consists of, with stable keys."""
    layers = list(store.experts.values())
    used = store.metadata.integer(f"{store.architecture}.expert_used_count", None)
    weights = sum(layer.n_experts * layer.expert_bytes for layer in layers)
    records = sum(layer.n_experts * layer.record_bytes for layer in layers)
    per_token = sum(layer.expert_bytes for layer in layers) * used if used else None
    return {
        "model": store.model_name,
        "architecture": store.architecture,
        "fingerprint": store.fingerprint,
        "layers": len(layers),
        "experts_per_layer": sorted({layer.n_experts for layer in layers}),
        "experts_used": used,
        "expert_bytes": weights,
        "record_bytes": sorted({layer.record_bytes for layer in layers}),
        "padding": records / weights - 1,
        "resident_tensors": len(store.resident),
        "resident_bytes": sum(tensor.bytes for tensor in store.resident.values()),
        "bytes_per_token": per_token,
    }


def model_lines(report: dict[str, Any]) -> list[str]:
    """The part of plan and inspect that describes the model."""
    experts = "/".join(str(n) for n in report["experts_per_layer"])
    records = " and ".join(format_bytes(size) for size in report["record_bytes"])
    lines = [
        f"{report['model']}  {report['architecture']}  {report['layers']} layers x {experts} experts"
        + (f", top-{report['experts_used']}" if report["experts_used"] else ""),
        f"  experts    {format_bytes(report['expert_bytes']):>9}  records of {records} "
        f"(gate+up+down, 4 KiB aligned, {100 * report['padding']:.1f} % padding)",
        f"  resident   {format_bytes(report['resident_bytes']):>9}  {report['resident_tensors']} tensors: "
        "attention, router, shared experts, embeddings",
    ]
    if report["bytes_per_token"] is not None:
        picks = report["layers"] * report["experts_used"]
        lines.append(
            f"  per token  {format_bytes(report['bytes_per_token']):>9}  {picks} experts, if nothing is cached"
        )
    return lines


def _print(report: dict[str, Any], short: Sequence[str]) -> None:
    lines = model_lines(report)
    shards = "1 file" if report["shards"] == 1 else f"{report['shards']} shards"
    lines[0] += f"   {shards}, {format_bytes(report['model_bytes'])}"
    if "store_bytes" not in report:
        print("\n".join(printable(line) for line in lines))
        return
    lines.append(f"  store      {format_bytes(report['store_bytes']):>9}")
    if report["profile_tokens"]:
        lines.append(f"  profile    hottest experts first, counted over {report['profile_tokens']:,} tokens")
    for target in report["targets"]:
        fits = "OK" if target["needs_bytes"] <= target["free_bytes"] else "IGNORED" if report["fits"] else "TOO LITTLE"
        lines.append(
            f"  needs      {format_bytes(target['needs_bytes']):>9}  on {target['path']}   "
            f"{format_bytes(target['free_bytes'])} free   {fits}"
        )
    if report["is_there"]:
        lines.append("  there      the directory holds this store already: nothing is to be written")
    if report["holds_another"] is not None:
        lines.append(f"  holds      another store, of {report['holds_another']}: pack asks for --overwrite")
    lines += [f"  short      {line}" for line in short]
    if short:
        lines.append(
            f"  fix        {target_tools.no_room(short, 'free space, or add a drive with another --to DIR').hint}"
        )
    if "seconds" in report:
        lines.append(
            f"  takes      ~{format_seconds(report['seconds'])} at {format_rate(report['bytes_per_second'])} "
            f"({report['seconds_by']})"
        )
    print("\n".join(printable(line) for line in lines))
