"""Single tokens of an engine that must read its experts, and its drive's rate: by names that every commit has.

bench/box.py takes its measures from here.  As a program it runs the checkout that PYTHONPATH names (38c609c or later),
for bench/box_before.py; the JSON object in its argument says what, the one that it prints is what was found.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

import fomoe_io
from fomoe_io import Engine, EngineConfig
from fomoe_io.config import CarRule, Tiers

if TYPE_CHECKING:
    from fomoe_io.experts.slots import SlotLayout

DRIVE_SECONDS, READS_AT_ONCE = 2.0, 512
POOL_BYTES = 1 << 30
CHECKOUT = Path(fomoe_io.__file__).resolve().parent.parent


def module(*names: str) -> ModuleType:
    """The first that this commit has, for modules have moved.

    By its file: an editable install of another checkout would answer for what this one does not have.
    """
    for name in names:
        if (CHECKOUT / name.replace(".", "/")).with_suffix(".py").exists():
            return import_module(name)
    raise ModuleNotFoundError(" or ".join(names))


slots = module("fomoe_io.experts.slots", "fomoe_io.expert_slots")
readers = module("fomoe_io.storage.reader", "fomoe_io.reader")


def decode(engine: Engine, tokens: np.ndarray, warmup: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each token after the warm-up, and the statistics of those."""
    times = []
    session = engine.session()
    for place, token in enumerate(tokens.tolist()):
        if place == warmup:
            engine.reset_statistics()
        started = time.perf_counter()
        session.decode(token)
        times.append(time.perf_counter() - started)
    session.close()
    return times[warmup:], engine.statistics()


def by_token(times: list[float], s: dict[str, Any]) -> dict[str, Any]:
    """What :meth:`decode` found, of a token in the mean."""
    count = len(times)
    return {
        "token_ms": 1e3 * sum(times) / count, "median_ms": 1e3 * statistics.median(times),
        "misses_a_token": s["tiers"]["nvme"]["hits"] / count, "nvme_bytes_a_token": s["tiers"]["nvme"]["bytes"] / count,
        "up_bytes_a_token": s.get("link", {}).get("up_bytes", 0) / count,
        "down_bytes_a_token": s.get("link", {}).get("down_bytes", 0) / count,
        "shares": {name: tier["hits"] / s["expert_requests"] for name, tier in s["tiers"].items()},
        "substituted": s["substitutions"] / s["expert_requests"],
        "stall_ms_a_token": {name: 1e3 * seconds / count for name, seconds in s["stall_seconds"].items()},
        "prefetch": s["prefetch"],
        "host_us_a_miss": s.get("host_us_per_miss"), "device": s["device"], "reader": s["reader"],
    }  # fmt: skip


def drive_rate(engine: Engine, pace: Any) -> float:
    """Bytes a second of random experts, by a reader like the engine's: extents, depth, pieces, pace; no barriers."""
    reads, random = engine.statistics()["reader"], np.random.default_rng(5)
    how = {"engine": reads["engine"], "depth": reads["depth"], "sub_read_bytes": reads["sub_read_bytes"]}
    if pace is not None:
        how["pace"] = pace
    with readers.open_reader(engine.store.paths, direct=reads["direct"], **how) as reader:
        block = (reader.block_bytes,) if hasattr(reader, "block_bytes") else ()
        layouts = [slots.slot_layout(engine.store.experts[i], *block) for i in range(engine.shape.layers)]
        slot = max(layout.slot_bytes for layout in layouts)
        count = max(1, min(READS_AT_ONCE, POOL_BYTES // slot))
        memory = readers.aligned_memory(count * slot)
        reader.register_buffers(memory.address, count * slot)
        total, started = 0, time.perf_counter()
        while time.perf_counter() - started < DRIVE_SECONDS:
            requests = []
            for place in range(count):
                layout = layouts[int(random.integers(len(layouts)))]
                requests += expert_reads(
                    layout, int(random.integers(engine.shape.experts)), memory.address + place * slot
                )
            reader.read_into(requests)
            total += sum(size for *_, size in requests)
        seconds = time.perf_counter() - started
    memory.close()
    return total / seconds


def expert_reads(layout: SlotLayout, expert: int, address: int) -> list[tuple[int, int, int, int]]:
    """(file, offset, address, bytes) of an expert into a slot."""
    extents = layout.extents[expert][: layout.extent_count[expert]]
    return [(int(x["file"]), int(x["offset"]), address + int(x["slot_offset"]), int(x["bytes"])) for x in extents]


def measure(model: str, tokens: int, warmup: int, tiers: str, car: str, **more: Any) -> dict[str, Any]:
    """Tokens of a limited engine; `more`: of its configuration, as that checkout takes it."""
    config = EngineConfig(tiers=Tiers.parse(tiers), car=CarRule.parse(car), context_tokens=2048, **more)
    with Engine.open(model, config) as engine:
        random = np.random.default_rng(1).integers(0, engine.shape.vocabulary, warmup + tokens)
        times, s = decode(engine, random, warmup)
        rate = drive_rate(engine, getattr(config, "pace", None))
    found = by_token(times, s) | {"car": s["car"], "drive_gb_s": rate / 1e9}
    return found | {"drive_ms": 1e3 * found["nvme_bytes_a_token"] / rate}


def strangers() -> list[str]:
    """Modules of the package that are not of the folder this runs in."""
    ours = {name: found for name, found in sys.modules.items() if name.partition(".")[0] == "fomoe_io"}
    return [name for name, found in ours.items() if not Path(found.__file__ or "").is_relative_to(Path.cwd())]


def main() -> None:
    """Command line."""
    found = measure(**json.loads(sys.argv[1]))
    if others := strangers():
        raise SystemExit(f"any_commit: of another checkout: {', '.join(others)}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
