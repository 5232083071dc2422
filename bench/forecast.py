"""The forecast of `fomoe plan` beside runs on this machine: tokens a second at several memories and drives.

A text is read token by token, as decoding reads it, after as much of it again to warm up; the drive is held to a pace,
so that it is the same for both.  Lookahead, with which no forecast reckons, is what users get unless it is said
otherwise.  Prints a markdown table; `off` is measured / forecast.

    python bench/forecast.py MODEL --text FILE [--ram 110M,135M] [--pace 0.1G,20us --pace 0.5G,20us] [--tokens 300]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fomoe_io import Engine, EngineConfig
from fomoe_io.cli.forecast import Drive, Forecast, Misses, compute_seconds, measured_drive, misses_of, needs_of
from fomoe_io.experts.lookahead import Mode
from fomoe_io.storage.pace import Pace
from fomoe_io.storage.store import Store
from fomoe_io.units import parse_bytes

PIECE_TOKENS = 20


def measured(
    path: Path, text: str, ram: int, pace: Pace | None, tokens: int, threads: int | None, lookahead: Mode
) -> tuple[float, float, float]:
    """(seconds a token and those of its arithmetic alone, medians of pieces in turns; what the drive served)"""
    config = EngineConfig(ram_bytes=ram, context_tokens=4096, pace=pace, threads=threads, lookahead=lookahead)
    with Engine.open(path, config) as engine:
        ids = engine.tokenizer.encode(text)[: 2 * tokens]
        session = engine.session()
        for token in ids[:-tokens]:
            session.decode(token)
        engine.reset_statistics()
        needs, seconds, computing = needs_of(path, EngineConfig(context_tokens=4096)), [], []
        for first in range(len(ids) - tokens, len(ids), PIECE_TOKENS):
            started = time.monotonic()
            for token in ids[first : first + PIECE_TOKENS]:
                session.decode(token)
            seconds.append((time.monotonic() - started) / len(ids[first : first + PIECE_TOKENS]))
            computing.append(compute_seconds(needs, threads))
        s = engine.statistics()
        missed = s["tiers"]["nvme"]["hits"] / s["expert_requests"]
        return statistics.median(seconds), statistics.median(computing), missed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ram", help="sizes; default: those that the forecast shows")
    parser.add_argument(
        "--pace", action="append", type=Pace.parse, default=[], help="a drive; default: the one at hand"
    )
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, help="fewer, where the machine is not alone: half-idle teams wait")
    parser.add_argument("--lookahead", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--learned", action="store_true", help="forecast by what earlier runs have counted")
    options = parser.parse_args()
    store, text = Store.open(options.model), options.text.read_text()
    needs = needs_of(options.model, EngineConfig(context_tokens=4096), store)
    misses = misses_of(store) if options.learned else Misses("as measured on other models (docs/caching.md)")
    print(f"{store.model_name}; {misses.source}\n")
    print("| drive | --ram | experts | missed: forecast | measured | tok/s: forecast | measured | off |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for pace in options.pace or [None]:
        drive = measured_drive(options.model, needs) if pace is None else Drive(pace.bandwidth, str(pace))
        sizes = [parse_bytes(size) for size in options.ram.split(",")] if options.ram else None
        for ram in sizes or [row.ram_bytes for row in Forecast(needs, drive, misses, 1.0).rows()]:
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # whose peak is its own
                asked = (options.tokens, options.threads, options.lookahead)
                run = alone.submit(measured, options.model, text, ram, pace, *asked)
                seconds, computing, missed = run.result()
            row = Forecast(needs, drive, misses, computing).row(ram)
            print(
                f"| {drive.bytes_per_second / 1e9:.3g} GB/s | {ram / 2**20:.0f}M | {100 * row.share:.0f} % | "
                f"{100 * row.missed:.1f} % | {100 * missed:.1f} % | "
                f"{row.likely:.4g} ({row.low:.3g} to {row.high:.3g}) | "
                f"{1 / seconds:.4g} | {1 / seconds / row.likely:.2f} |",
                flush=True,
            )
    print(f"\n{platform.platform()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
