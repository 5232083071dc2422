"""Decode on a GPU against its limits, measured in the same run: memory bandwidth, link, drive.

    python bench/device_decode.py MODEL                            everything in VRAM: time over the byte roofline
    python bench/device_decode.py MODEL --tiers vram=10%,dram=7%   limited: time over the slowest resource
    python bench/device_decode.py MODEL --profile                  which kernels the time goes to

Prints one JSON object.  The byte roofline is what a token reads (its experts, the dense weights, the recurrent state
twice) over the bandwidth of plain 16-byte loads.  The limited run is compared with the largest of three times, each
measured here: its NVMe bytes at the rate of a reader like the engine's for the same records (its depth, extents and
pieces, nothing waited for between them), its bytes over the link at the rate of such copies, and the time of a token
that misses nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from any_commit import drive_rate
from box import kernel_tuning, link_rates, report

from fomoe_io import Engine, EngineConfig
from fomoe_io.backend import Batch, Span
from fomoe_io.config import Tiers, Tuning
from fomoe_io.experts.car import CarRule
from fomoe_io.experts.slots import slot_layout
from fomoe_io.gpu.backend import GpuBackend
from fomoe_io.gpu.split import read_bandwidth
from fomoe_io.storage.pace import Pace
from fomoe_io.units import parse_bytes

REPLAYS = 15
POOL_BYTES = 4 << 30


def gpu_of(engine: Engine) -> GpuBackend:
    """What the engine computes with."""
    if not isinstance(engine.backend, GpuBackend):
        raise SystemExit("there is no GPU in use")
    return engine.backend


def token_bytes(engine: Engine) -> dict[str, int]:
    """What a token reads: dense weights without the output matrix, experts, state (read and written), output matrix."""
    recorded = gpu_of(engine).recorded
    planned = recorded.weights.planned
    output = "token_embd.weight" if recorded.weights.tied else "output.weight"
    dense = sum(p.tensor.bytes for name, p in planned.items() if name != output)
    experts = sum(engine.shape.used * sum(r.part_bytes) for r in gpu_of(engine).records.values())
    state = 2 * recorded.token.state.parts.recurrent_bytes
    return {"dense": dense, "experts": experts, "state": state, "output": planned[output].tensor.bytes}


def decode(engine: Engine, tokens: np.ndarray, outputs: int) -> tuple[list[float], list[int]]:
    """Seconds and misses of each token."""
    times, misses, state = [], [], engine.backend.new_state()
    logits = state.token_logits(engine.shape.vocabulary)[:outputs]  # a session's: the device copies to it
    for i in range(len(tokens)):
        before, started = engine.backend.counters().nvme_hits, time.perf_counter()
        span = Span(state, tokens[i : i + 1].astype(np.int32), i, outputs)
        engine.backend.run(Batch([span], may_substitute=True), logits)
        times.append(time.perf_counter() - started)
        misses.append(engine.backend.counters().nvme_hits - before)
    state.close()
    return times, misses


def replay_ms(engine: Engine, outputs: int) -> float:
    """Milliseconds of a token's graph on the device alone (nothing may be missing: nobody would answer)."""
    gpu, graph = gpu_of(engine).gpu, gpu_of(engine).tokens.graphs(outputs)[0]
    begin, end = gpu.event(is_timed=True), gpu.event(is_timed=True)
    samples = []
    for _ in range(REPLAYS):
        gpu.stream.record(begin)
        graph.launch(gpu.stream)
        gpu.stream.record(end)
        end.synchronize()
        samples.append(end.milliseconds_since(begin))
    return statistics.median(samples)


def profile(engine: Engine) -> dict[str, dict[str, float]]:
    """Microseconds of each kernel of a token, each launch timed alone (so without its overlap with neighbours)."""
    gpu = gpu_of(engine).gpu
    launches = [(s, gpu.prepare(s.kernel, s.grid, *s.arguments)) for s in gpu_of(engine).recorded.token.launches(1)]
    skipped = ("wait_for_misses", "gather_")  # nobody would answer
    begin, end = gpu.event(is_timed=True), gpu.event(is_timed=True)
    total: dict[str, list[float]] = defaultdict(list)
    for spec, launch in launches:
        if spec.kernel.startswith(skipped):
            continue
        graph = gpu.capture([launch] * 10)
        samples = []
        for _ in range(4):
            gpu.stream.record(begin)
            graph.launch(gpu.stream)
            gpu.stream.record(end)
            end.synchronize()
            samples.append(end.milliseconds_since(begin) * 100)
        total[spec.kernel].append(min(samples))
    return {
        name: {"launches": len(times), "us_total": round(sum(times), 1), "us_each": round(sum(times) / len(times), 2)}
        for name, times in sorted(total.items(), key=lambda item: -sum(item[1]))
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--tiers", type=Tiers.parse)
    parser.add_argument("--vram", type=parse_bytes)
    parser.add_argument("--ram", type=parse_bytes)
    parser.add_argument("--car", type=CarRule.parse, help="cache-aware routing, such as regret:0.03")
    parser.add_argument("--calibration", help="of `fomoe-bench io --calibrate`: the sizes of sub-reads, the depth")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--branches", type=int, choices=(1, 2), help="2: the shared expert beside the routed ones (CUDA's default)"
    )
    parser.add_argument("--unchained", action="store_true", help="each kernel starts when the one before has finished")
    parser.add_argument("--in-place", action="store_true", help="kernels read experts of DRAM where they lie")
    parser.add_argument("--signals", choices=("stream", "host"), help="who tells a waiting kernel that a copy has come")
    parser.add_argument("--piece", type=parse_bytes, help="bytes of a read of an expert, sent up as it lands (2M)")
    parser.add_argument("--kernel", type=kernel_tuning, action="append", default=[], metavar="NAME=VALUE",
        help="of fomoe_io/gpu/kernels/tuning.h, such as PREFETCH_BYTES=8192; may be repeated")  # fmt: skip
    parser.add_argument("--reader", default="auto", help="pread overlaps on tmpfs, io_uring does not")
    parser.add_argument("--pace", type=Pace.parse, help="of a drive that is not at hand, such as 14.5G,80us")
    parser.add_argument("--lookahead", choices=("off", "on", "auto"), default="off")
    parser.add_argument("--sm", choices=("layer", "pingpong", "tensor"), default="layer")
    parser.add_argument("--peer-memory", action="store_true", help="two devices exchange by each other's memory")
    parser.add_argument("--resident-ms", type=float, help="of a token that misses nothing, from an unlimited run")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    config = EngineConfig(
        device=options.device,
        tiers=options.tiers,
        vram_bytes=options.vram,
        ram_bytes=options.ram,
        car=options.car,
        calibration=options.calibration,
        context_tokens=2048,
        reader=options.reader,
        pace=options.pace,
        lookahead=options.lookahead,
        split_mode=options.sm,
        peer_memory=options.peer_memory,
        tuning=Tuning(
            branches=options.branches,
            chained_launches=not options.unchained,
            reads_in_place=options.in_place,
            signals_by_stream=None if options.signals is None else options.signals == "stream",
            piece_bytes=options.piece or None,
            kernel_tuning=tuple(options.kernel),
        ),
    )
    with Engine.open(options.model, config) as engine:
        result = measure(engine, options)
    report(result, options.output)


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one configuration."""
    s, backend = engine.shape, gpu_of(engine)
    gpu = backend.gpu
    tokens = np.random.default_rng(1).integers(0, s.vocabulary, options.warmup + options.tokens)
    decode(engine, tokens[: options.warmup], 1)
    decode(engine, tokens[:4], 0)
    engine.reset_statistics()
    times, misses = decode(engine, tokens[options.warmup :], 1)
    statistics_ = engine.statistics()
    bare, _ = decode(engine, tokens[options.warmup :], 0)
    slowest = sorted(range(len(times)), key=lambda i: -times[i])[:3]
    nbytes = token_bytes(engine)
    bandwidth = max(read_bandwidth(gpu, POOL_BYTES, blocks) for blocks in (4, 8, 16))
    layer_us = statistics.median(bare) / s.layers * 1e6
    layer_bytes = (nbytes["dense"] + nbytes["experts"] + nbytes["state"]) / s.layers
    result = {
        "device": str(gpu), "driver": gpu.driver(), "model": engine.model_name, "layers": s.layers,
        "kernel_tuning": dict(options.kernel), "lookahead": options.lookahead,
        "slots": {"vram": int(engine.budgets.slots[0][0]), "dram": int(engine.budgets.slots[0][1])},
        "read_bandwidth_gb_s": bandwidth / 1e9, "token_bytes": nbytes,
        "token_ms": {"median": statistics.median(times) * 1e3, "mean": statistics.mean(times) * 1e3,
                     "min": min(times) * 1e3, "max": max(times) * 1e3},
        "misses": {"median": statistics.median(misses), "mean": statistics.mean(misses)},
        "slowest": [{"token": i, "ms": times[i] * 1e3, "misses": misses[i]} for i in slowest],
        "tokens_per_second": len(times) / sum(times),
        "layer_us": layer_us, "layer_roofline_us": layer_bytes / bandwidth * 1e6,
        "layer_over_roofline": layer_us / (layer_bytes / bandwidth * 1e6),
        "token_over_roofline": statistics.median(times) / (sum(nbytes.values()) / bandwidth),
        "launches_per_layer": len(backend.recorded.token.body) / s.layers,
        "statistics": statistics_,
    }  # fmt: skip
    if options.tiers or options.vram:
        result["limits"] = limits(engine, options, statistics_, sum(times) / len(times))
    if not statistics_["layers_served"]["with_misses"] and "split" not in statistics_:
        result["graph_ms"] = {"all": replay_ms(engine, 1), "without logits": replay_ms(engine, 0)}
    if options.profile:
        result["profile"] = profile(engine)
    return result


def limits(engine: Engine, options: argparse.Namespace, s: dict[str, Any], token_s: float) -> dict[str, Any]:
    """The resources of a limited run, and the token's time over the slowest."""
    record = max(slot_layout(layer).slot_bytes for layer in engine.store.experts.values())
    up, up_beside_down = link_rates(engine.backend.device_name.split()[0], record)
    drive = drive_rate(engine, engine.config.pace)
    count = options.tokens
    parts = {
        "nvme": s["tiers"]["nvme"]["bytes"] / count / drive,
        "link": s["link"]["up_bytes"] / count / (up_beside_down if s["link"]["down_bytes"] else up),
    }
    if options.resident_ms:
        parts["resident"] = options.resident_ms / 1e3
    return {
        "drive_gb_s": drive / 1e9, "link_up_gb_s": up / 1e9, "link_up_beside_down_gb_s": up_beside_down / 1e9,
        "ms": {name: 1e3 * seconds for name, seconds in parts.items()},
        "token_over_slowest": token_s / max(parts.values()),
    }  # fmt: skip


if __name__ == "__main__":
    main()
