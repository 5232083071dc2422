"""Results of `fomoe-bench io`: text for people, JSON with fio's names for programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fomoe_io.io_bench.job import IOResult, Share, Spans

PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
"""Those that fio prints."""
DEPTH_LEVELS = (1, 2, 4, 8, 16, 32, 64)
FORMAT = "fomoe-bench io 1"


def _duration(ns: float) -> str:
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= scale:
            return f"{ns / scale:.4g} {unit}"
    return f"{ns:.0f} ns"


def _spans(result: IOResult) -> list[tuple[str, Spans]]:
    """By fio's names."""
    return [("slat", result.submission), ("clat", result.completion), ("lat", result.total)]


def _row(spans: Spans) -> str:
    return "".join(f"{_duration(ns):>10}" for ns in (spans.least, spans.mean, spans.most, spans.deviation))


def depth_shares(in_flight: np.ndarray) -> dict[str, float]:
    """Percent of the reads that were started at each depth, in fio's levels ("32": more than 16, up to 32)."""
    total = max(1, int(in_flight.sum()))
    shares, lowest = {}, 1
    for level in DEPTH_LEVELS[:-1]:
        shares[str(level)] = 100 * float(in_flight[lowest : level + 1].sum()) / total
        lowest = level + 1
    shares[f">={DEPTH_LEVELS[-1]}"] = 100 * float(in_flight[lowest:].sum()) / total
    return shares


def format_result(result: IOResult) -> str:
    """A block of text for one job."""
    job, rate = result.job, result.bytes_per_second
    what = f"store {job.store}" if job.store else f"bs {job.block_bytes:,}"
    what += f" by trace {job.trace}" if job.trace else ""
    how = f"{result.engine} ({result.mode}), {'O_DIRECT' if result.direct else 'page cache'}"
    how += ", registered buffers" if result.buffers_registered else ""
    percentiles = "  ".join(f"p{p:g} {_duration(result.percentile_ns(p))}" for p in (50, 90, 99, 99.9))
    shares = depth_shares(result.in_flight).items()
    depths = "  ".join(f"{level} {share:.1f} %" for level, share in shares if share >= 0.05)
    cpu = f"user {result.user_seconds:.2f} s, system {result.system_seconds:.2f} s"
    lines = [
        f"{job.name}: {job.rw}, {what}, iodepth {job.depth}, numjobs {job.jobs}, {how}",
        f"  {'write' if job.writes else 'read'}: IOPS {result.iops:,.0f}, "
        f"{rate / 2**20:,.1f} MiB/s ({rate / 1e6:,.1f} MB/s), {result.reads:,} in {result.seconds:.2f} s",
        f"  {'latency':16}{'min':>10}{'mean':>10}{'max':>10}{'stdev':>10}",
        *(f"    {name:14}{_row(spans)}" for name, spans in _spans(result)),
        f"    clat percentiles: {percentiles}",
        f"  cpu: {result.cpu_us_per_read:.2f} us a read ({cpu})",
        f"  in flight: {depths}",
    ]
    return "\n".join(lines + [f"  note: {note}" for note in result.notes])


def _direction(result: IOResult) -> dict[str, Any]:
    """fio's `read` or `write` object."""
    samples = np.array(result.samples or [0.0]) / 1024
    iops = samples * 1024 * (result.reads / result.bytes if result.bytes else 0.0)
    latency: dict[str, dict[str, Any]] = {
        f"{name}_ns": {
            "min": round(spans.least),
            "max": round(spans.most),
            "mean": spans.mean,
            "stddev": spans.deviation,
            "N": result.reads,
        }
        for name, spans in _spans(result)
    }
    latency["clat_ns"]["percentile"] = {f"{p:.6f}": round(result.percentile_ns(p)) for p in PERCENTILES}
    return {
        "io_bytes": result.bytes,
        "io_kbytes": result.bytes // 1024,
        "bw_bytes": round(result.bytes_per_second),
        "bw": round(result.bytes_per_second / 1024),
        "iops": result.iops,
        "runtime": round(1000 * result.seconds),
        "total_ios": result.reads,
        **latency,
        "bw_min": round(float(samples.min())),
        "bw_max": round(float(samples.max())),
        "bw_mean": float(samples.mean()),
        "bw_dev": float(samples.std()),
        "bw_samples": len(result.samples),
        "iops_min": round(float(iops.min())),
        "iops_max": round(float(iops.max())),
        "iops_mean": float(iops.mean()),
        "iops_stddev": float(iops.std()),
        "iops_samples": len(result.samples),
    }


def _options(result: IOResult) -> dict[str, str]:
    """fio's `job options`: those that were chosen, as text."""
    job = result.job
    options = {"rw": job.rw, "iodepth": str(job.depth), "numjobs": str(job.jobs), "direct": str(int(result.direct))}
    options["ioengine"] = result.engine
    if job.store:
        options["store"] = str(job.store)
        options.update({"trace": str(job.trace)} if job.trace else {})
    else:
        options.update({"bs": str(job.block_bytes), "filename": ":".join(str(path) for path in job.filenames)})
    if job.runtime_seconds:
        options["runtime"] = f"{job.runtime_seconds:g}"
    options.update({name: str(s) for name, s in (("size", job.size), ("offset", job.offset)) if s != Share()})
    return options


def json_results(results: Sequence[IOResult], version: str, card: dict[str, Any]) -> dict[str, Any]:
    """fio's JSON where the fields mean the same (times in ns and ms, `bw` in KiB/s), and ours under `fomoe`."""
    now = time.time()
    jobs = []
    for result in results:
        direction, elapsed = _direction(result), max(result.seconds, 1e-9)
        jobs.append(
            {
                "jobname": result.job.name,
                "groupid": 0,
                "error": 0,
                "job options": _options(result),
                "write" if result.job.writes else "read": direction,
                "job_runtime": round(1000 * result.seconds * result.job.jobs),
                "usr_cpu": 100 * result.user_seconds / elapsed / result.job.jobs,
                "sys_cpu": 100 * result.system_seconds / elapsed / result.job.jobs,
                "iodepth_level": depth_shares(result.in_flight),
                "fomoe": {
                    "engine": result.engine,
                    "mode": result.mode,
                    "direct": result.direct,
                    "buffers_registered": result.buffers_registered,
                    "cpu_us_per_read": result.cpu_us_per_read,
                    "in_flight": result.in_flight.tolist(),
                    "notes": result.notes,
                },
            }
        )
    return {
        "format": FORMAT,
        "fomoe version": version,
        "timestamp": int(now),
        "timestamp_ms": int(1000 * now),
        "time": time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(now)),
        "jobs": jobs,
        "system": card,
    }
