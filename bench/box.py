"""The emulated box: decode beside the three floors of the machine that this is for, on any CUDA machine, in one run.

    python bench/make_model.py --preset 397b-a17b --layers 8 --recall 0.85 -o /dev/shm/model.gguf
    python bench/box.py /dev/shm/model.gguf                        8 multiprocessors, a drive of 14.5 GB/s and 80 us
    python bench/box.py MODEL --percentage 100 --pace none         the whole card, the reader as fast as it is
    python bench/box.py MODEL --baseline ../before                 another checkout, built, in turns with this one
    python bench/box.py MODEL --piece 1M --in-place                reads cut finer, experts of DRAM read where they lie
    python bench/box.py MODEL --device cuda:0,1 --sm pingpong      two cards (--percentage is of each)

A model in tmpfs and a reader held back to a pace are the drive; CUDA's MPS leaves a part of the card
(`--percentage`, where nvidia-cuda-mps-control exists).  Prints one JSON object: for exact decoding and with cache-aware
routing milliseconds a token, the floors (drive: its NVMe bytes at the engine's reader's rate for the same records,
depth and pieces; link: its copies at the rate of record-sized copies from pinned memory; card: a token that misses
nothing), the ratio to the largest, stalls, and what a miss costs beyond the largest floor; `settings` is what was asked
for and that checkout knows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from any_commit import by_token, decode, drive_rate

from fomoe_io import Engine, EngineConfig
from fomoe_io.config import Tiers, Tuning
from fomoe_io.errors import FomoeError
from fomoe_io.experts.car import CarRule
from fomoe_io.experts.slots import slot_layout
from fomoe_io.storage.pace import Pace
from fomoe_io.storage.reader import aligned_memory
from fomoe_io.units import parse_bytes

COPIES = 64


def link_rates(device: str, record: int) -> tuple[float, float]:
    """Bytes a second of record-sized copies up from pinned memory: alone, and beside as many down."""
    from fomoe_io.gpu.device import Gpu

    gpu = Gpu(device.split(",")[0])
    memory = aligned_memory(16 * record)
    registration, target = gpu.register(np.frombuffer(memory.view, np.uint8)), gpu.allocate(16 * record)
    up, down, rates = gpu.new_stream(), gpu.new_stream(), []
    for both in (False, True):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            for i in range(COPIES):
                up.copy_in(target.pointer + i % 8 * record, memory.address + i % 8 * record, record)
                if both:
                    down.copy_out(memory.address + (8 + i % 8) * record, target.pointer + (8 + i % 8) * record, record)
            up.synchronize()
            seconds.append(time.perf_counter() - started)
            down.synchronize()
        rates.append(COPIES * record / min(seconds))
    registration.close()
    return rates[0], rates[1]


def report(result: dict[str, Any], output: Path | None) -> None:
    """Print one JSON object, and keep it."""
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")


def kernel_tuning(text: str) -> tuple[str, int]:
    """NAME=VALUE of the kernels' tuning.h."""
    name, _, value = text.partition("=")
    return name, int(value)


def asked_for(options: argparse.Namespace, of: type) -> dict[str, Any]:
    """Fields of a configuration that the command line sets, and that this checkout's has: a baseline's may not."""
    asked = {
        "piece_bytes": options.piece,
        "reads_in_place": options.in_place or None,
        "split_mode": options.sm,
        "threads": options.threads,
        "kernel_tuning": tuple(options.kernel) or None,
    }
    known = {field.name for field in dataclasses.fields(of)}
    return {name: value for name, value in asked.items() if value is not None and name in known}


def settings(options: argparse.Namespace, **more: Any) -> EngineConfig:
    """Of an engine in the box."""
    pace = None if options.pace == "none" else Pace.parse(options.pace)
    if tuned := asked_for(options, Tuning):
        more["tuning"] = Tuning(**tuned)
    return EngineConfig(
        device=options.device,
        context_tokens=2048,
        reader=options.reader,
        calibration=options.calibration,
        pace=pace,
        **asked_for(options, EngineConfig),
        **more,
    )


def limited(
    options: argparse.Namespace, tokens: np.ndarray, car: CarRule | None, lookahead: Any
) -> tuple[dict[str, Any], float]:
    """A run whose experts are mostly on the drive, and the drive's rate beside it."""
    config = settings(options, tiers=Tiers.parse(options.tiers), car=car, lookahead=lookahead)
    with Engine.open(options.model, config) as engine:
        times, s = decode(engine, tokens, options.warmup)
        drive = drive_rate(engine, config.pace)
    return by_token(times, s), drive


def add_floors(run: dict[str, Any], drive: float, link: tuple[float, float] | None, card_ms: float | None) -> None:
    """What no overlap could go below, and what is lost against the largest."""
    floors = {"drive": 1e3 * run["nvme_bytes_a_token"] / drive}
    if link is not None:
        floors["link"] = 1e3 * run["up_bytes_a_token"] / link[1 if run["down_bytes_a_token"] else 0]
    if card_ms is not None:
        floors["card"] = card_ms
    largest = max(floors.values())
    run |= {"drive_gb_s": drive / 1e9, "floors_ms": floors, "over_largest": run["token_ms"] / largest}
    if run["misses_a_token"]:
        run["us_a_miss_over_largest"] = 1e3 * (run["token_ms"] - largest) / run["misses_a_token"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Exact and with cache-aware routing, with the floors of this run."""
    with Engine.open(options.model, settings(options)) as engine:
        tokens = np.random.default_rng(1).integers(0, engine.shape.vocabulary, options.warmup + options.tokens)
        times, s = decode(engine, tokens, options.warmup)
        record = max(slot_layout(layer).slot_bytes for layer in engine.store.experts.values())
        result: dict[str, Any] = {"model": engine.model_name, "device": s["device"], "runs": {}}
        result["settings"] = {"device": options.device} | asked_for(options, EngineConfig) | asked_for(options, Tuning)
    # a token that misses nothing; where memory is too small for all experts there is no such token
    card_ms = options.card_ms if s["tiers"]["nvme"]["hits"] else 1e3 * statistics.median(times)
    link = link_rates(options.device, record) if "link" in s else None
    if link:
        result["link_gb_s"] = {"up": link[0] / 1e9, "up_beside_down": link[1] / 1e9}
    for name, lookahead in product(("exact", options.car), ("off", *options.lookahead)):
        # 0, not "off": checkouts from before the word know it, too
        ahead_of = 0 if lookahead == "off" else lookahead
        run, drive = limited(options, tokens, None if name == "exact" else CarRule.parse(name), ahead_of)
        add_floors(run, drive, link, card_ms)
        ahead = "" if lookahead == "off" else f", lookahead {lookahead}"
        result["runs"][("exact" if name == "exact" else f"car {name}") + ahead] = run
    return result


# ---- a part of the card, and another checkout ----


class SlowCard:
    """CUDA's MPS with a share of the multiprocessors, for the processes that are started with `environment`."""

    def __init__(self, percentage: int) -> None:
        self.environment: dict[str, str] = {}
        control = shutil.which("nvidia-cuda-mps-control")
        self.note = "the whole card" if percentage == 100 else "no nvidia-cuda-mps-control: the whole card"
        if percentage == 100 or control is None:
            return
        self._folder = tempfile.mkdtemp(prefix="fomoe-mps-")
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": self._folder, "CUDA_MPS_LOG_DIRECTORY": self._folder}
        subprocess.run([control, "-d"], env=os.environ | self.environment, check=True)
        self._control = control
        self.environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(percentage)
        self.note = f"{percentage} % of the multiprocessors (MPS)"

    def close(self) -> None:
        """End the daemon."""
        if self.environment:
            subprocess.run([self._control], input="quit\n", text=True, env=os.environ | self.environment, check=False)
            shutil.rmtree(self._folder, ignore_errors=True)


def in_checkout(folder: Path, environment: dict[str, str], command: list[str]) -> dict[str, Any]:
    """A script of this folder in a process of its own, with the package of that checkout."""
    scripts = Path(__file__).resolve().parent
    paths = os.environ | environment | {"PYTHONPATH": f"{folder}{os.pathsep}{scripts}", "PYTHONSAFEPATH": "1"}
    ended = subprocess.run(
        [sys.executable, str(scripts / command[0]), *command[1:]],
        env=paths, cwd=folder, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise SystemExit(f"{command[0]}: the run in {folder} failed")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def in_turns(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Every checkout `--rounds` times; of each the round with the fastest exact token counts, all are kept."""
    here = Path(__file__).resolve().parent.parent
    checkouts = {"this": here} | ({"baseline": options.baseline.resolve()} if options.baseline else {})
    card = SlowCard(options.percentage)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    try:
        for _ in range(options.rounds):
            for name, folder in checkouts.items():
                # a baseline may not know lookahead: what it does without is compared with all runs of this checkout
                more = ["--lookahead"] if name == "baseline" else []
                command = ["box.py", *arguments, *more, "--worker"]
                rounds[name].append(in_checkout(folder, card.environment, command))
    finally:
        card.close()
    result: dict[str, Any] = {"card": card.note, "pace": options.pace, "tiers": options.tiers}
    for name, found in rounds.items():
        result[name] = min(found, key=lambda one: one["runs"]["exact"]["token_ms"])
        result[name]["rounds_ms"] = {run: [one["runs"][run]["token_ms"] for one in found] for run in found[0]["runs"]}
    if options.baseline:
        before = {name: run["token_ms"] for name, run in result["baseline"]["runs"].items()}
        result["speedup"] = {
            name: before[name.split(",")[0]] / run["token_ms"] for name, run in result["this"]["runs"].items()
        }
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sm", choices=("layer", "pingpong", "tensor"), help="how several devices share a model")
    parser.add_argument("--tiers", default="vram=10%,dram=7%")
    parser.add_argument("--threads", type=int, help="of a CPU engine, where the drive takes processors, too")
    parser.add_argument("--piece", type=parse_bytes, help="bytes of a read of an expert, sent up as it lands")
    parser.add_argument("--in-place", action="store_true", help="kernels read experts of DRAM where they lie")
    parser.add_argument("--kernel", type=kernel_tuning, action="append", default=[], metavar="NAME=VALUE",
        help="of fomoe_io/gpu/kernels/tuning.h; may be repeated")  # fmt: skip
    parser.add_argument("--car", default="on", help="the rule of the second run (default: %(default)s)")
    parser.add_argument("--lookahead", nargs="*", choices=("on", "auto"), default=[],
        help="runs with it beside those without")  # fmt: skip
    parser.add_argument("--pace", default="14.5G,80us", help="of the drive, or none (default: %(default)s)")
    parser.add_argument("--reader", default="pread", help="pread overlaps on tmpfs, io_uring does not")
    parser.add_argument(
        "--calibration",
        type=lambda text: str(Path(text).resolve()),
        help="of `fomoe-bench io --calibrate`: the sizes of sub-reads, the depth",
    )
    parser.add_argument("--percentage", type=int, default=5, help="of the multiprocessors (default: %(default)s)")
    parser.add_argument(
        "--card-ms", type=float, help="a token that misses nothing, where memory can't hold all experts"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--baseline", type=Path, help="another checkout of the project, built")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=lambda text: Path(text).resolve())
    options = parser.parse_args()
    try:
        result = measure(options) if options.worker else in_turns(options, sys.argv[1:])
    except FomoeError as error:
        raise SystemExit(f"box: {error}") from None
    report(result, None if options.worker else options.output)


if __name__ == "__main__":
    main()
