"""The quantized kernels against the device's measured read bandwidth.

Every time is the median over replays of a captured graph, divided by the launches in it, so the gaps between kernels
are in.  Each launch of a graph reads other weights than the one before it, from a pool several times the last cache.
Shapes are Qwen3.5-397B-A17B's: d_model 4096, experts of 1024, 10 a token.

    python bench/gpu_kernels.py [--quick] [--tuning DOWN_ROWS=1,DOWN_BATCH=4 ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fomoe_io._hip import Buffer, Launch
from fomoe_io.gpu import kernels
from fomoe_io.gpu.device import Gpu
from fomoe_io.units import parse_bytes

D_MODEL, FF, ROUTER, LOGITS = 4096, 1024, 512, 248320
HALVES = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q8_0": (0,)}  # where the f16 scales stand in a block
HALVES |= dict.fromkeys(kernels.PLANES.values(), ())  # elsewhere: products of anything


def matrix_bytes(name: str, rows: int, columns: int) -> int:
    """Bytes of a matrix of a weight type."""
    elements, size = kernels.BLOCKS[name]
    return rows * columns // elements * size


def random_matrix(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Valid weights: random bits with scales that keep products finite."""
    if name in ("f16", "f32"):
        return rng.standard_normal((rows, columns)).astype(np.float16 if name == "f16" else np.float32).view(np.uint8)
    elements, size = kernels.BLOCKS[name]
    blocks = rng.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for at in HALVES[name]:
        scale = rng.uniform(5e-4, 2e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks


class Bench:
    """One device, one pool of weights, one table of results."""

    def __init__(self, gpu: Gpu, tuning: dict[str, int], pool: Buffer) -> None:
        self.gpu, self.tuning, self.pool = gpu, tuning, pool
        self.rng = np.random.default_rng(7)

    def fill_pool(self, record: np.ndarray) -> int:
        """Copies of one record side by side; how many fit."""
        count = self.pool.nbytes // record.nbytes
        self.gpu.stream.copy_in(self.pool.pointer, record.ctypes.data, record.nbytes)
        have = 1
        while have < count:
            more = min(have, count - have)
            self.gpu.stream.copy(self.pool.pointer + have * record.nbytes, self.pool.pointer, more * record.nbytes)
            have += more
        self.gpu.stream.synchronize()
        return count

    def microseconds(self, launches: Sequence[Launch], per: int, replays: int = 15) -> float:
        """Median time of `per`-th part of the launches' graph."""
        graph = self.gpu.capture(launches)
        begin, end = self.gpu.event(is_timed=True), self.gpu.event(is_timed=True)
        times = []
        for _ in range(replays + 3):
            self.gpu.stream.record(begin)
            graph.launch(self.gpu.stream)
            self.gpu.stream.record(end)
            end.synchronize()
            times.append(end.milliseconds_since(begin) * 1e3 / per)
        return statistics.median(times[3:])

    def read_bandwidth(self) -> float:
        """Bytes a second of plain 16-byte loads over the whole pool; the best of a few grids."""
        best = 0.0
        for per_processor in (4, 8, 16):
            blocks = per_processor * self.gpu.info.multiprocessors
            out = self.gpu.allocate(32 * blocks)
            nbytes = self.pool.nbytes // 16 * 16
            launch = self.gpu.prepare("read_memory", (blocks, 1, 1), self.pool, nbytes, out, blocks)
            best = max(best, nbytes / self.microseconds([launch], 1) * 1e6)
        return best

    def plain_read(self, nbytes: int) -> float:
        """Microseconds of plain loads of so many bytes, launch after launch over the pool: the floor."""
        nbytes = -(-nbytes // 4096) * 4096
        blocks = 8 * self.gpu.info.multiprocessors
        out = self.gpu.allocate(32 * blocks)
        launches = [
            self.gpu.prepare("read_memory", (blocks, 1, 1), self.pool.pointer + i * nbytes, nbytes, out, blocks)
            for i in range(min(60, self.pool.nbytes // nbytes))
        ]
        return self.microseconds(launches, len(launches))

    def q8(self, rows: int, columns: int) -> Buffer:
        """Random vectors, quantized on the device."""
        x = self.gpu.upload(self.rng.standard_normal((rows, columns)).astype(np.float32))
        out = self.gpu.allocate(rows * kernels.q8_row_bytes(columns))
        self.gpu.prepare("quantize_q8", (kernels.up(columns, 256), rows, 1), x, out, columns).run(self.gpu.stream)
        self.gpu.stream.synchronize()
        return out

    def experts(self, gate_type: str, down_type: str, picks: int) -> dict[str, tuple[int, float]]:
        """(bytes, microseconds) of gate+up, of down, and of both with the quantization before them."""
        parts = [random_matrix(t, r, c, self.rng) for t, r, c in (
            (gate_type, FF, D_MODEL), (gate_type, FF, D_MODEL), (down_type, D_MODEL, FF))]  # fmt: skip
        record = np.concatenate([p.ravel() for p in parts])
        record = np.pad(record, (0, -record.nbytes % 4096))
        count = self.fill_pool(record)
        sets = count // picks
        if sets < 2:
            raise SystemExit(f"--pool holds {count} experts of {record.nbytes} bytes: too few for {picks} at a time")
        order = self.rng.permutation(count)
        gate_bytes, down_bytes = parts[0].nbytes, parts[2].nbytes
        x_floats = self.gpu.upload(self.rng.standard_normal((1, D_MODEL)).astype(np.float32))
        x, hidden = self.q8(1, D_MODEL), self.q8(picks, FF)
        share = self.gpu.upload(np.full(picks, 1 / picks, np.float32))
        y = self.gpu.allocate(4 * D_MODEL)
        gate_up, down, layer = [], [], []
        for i in range(min(40, 8 * sets)):
            chosen = order[(i % sets) * picks : (i % sets + 1) * picks]
            table = self.gpu.upload((self.pool.pointer + chosen * record.nbytes).astype(np.uint64))
            first = self.gpu.prepare(
                f"experts_gate_up_{gate_type}", kernels.gate_up_grid(FF, picks),
                table, None, None, None, None, 0, gate_bytes, x, hidden, None, FF, D_MODEL, picks, None, 0, 1,
            )  # fmt: skip
            second = self.gpu.prepare(
                f"experts_down_{down_type}", kernels.down_grid(D_MODEL, 1, self.tuning),
                table, None, 2 * gate_bytes, hidden, share, None, None, y, D_MODEL, FF, picks, None, 0, D_MODEL,
            )  # fmt: skip
            quantize = self.gpu.prepare("quantize_q8", (16, 1, 1), x_floats, x, D_MODEL)
            gate_up.append(first)
            down.append(second)
            layer += [quantize, first, second]
        n = len(gate_up)
        both = picks * (2 * gate_bytes + down_bytes)
        return {
            "gate+up": (picks * 2 * gate_bytes, self.microseconds(gate_up, n)),
            "down": (picks * down_bytes, self.microseconds(down, n)),
            "quantize, gate+up, down": (both, self.microseconds(layer, n)),
        }

    def mat_vec(self, name: str, rows: int, columns: int) -> tuple[int, float]:
        """(bytes, microseconds) of a dense product."""
        matrix = random_matrix(name, rows, columns, self.rng)
        nbytes = -(-matrix.nbytes // 4096) * 4096
        count = self.fill_pool(np.pad(matrix.ravel(), (0, nbytes - matrix.nbytes)))
        if name in kernels.QUANTIZED_TYPES:
            x = self.q8(1, columns)
        else:
            x = self.gpu.upload(self.rng.standard_normal((1, columns)).astype(np.float32))
        y = self.gpu.allocate(4 * rows)
        split = kernels.split_of(name, columns, rows, self.tuning)
        grid = kernels.mat_vec_grid(name, rows, split, 1, self.tuning)
        launches = [
            self.gpu.prepare(f"mat_vec_{name}", grid, self.pool.pointer + i * nbytes, x, y, rows, columns, split)
            for i in range(min(count, 60))
        ]
        return matrix.nbytes, self.microseconds(launches, len(launches))


def run(tuning: dict[str, int], pool_bytes: int, is_quick: bool, pool: Buffer | None) -> tuple[dict[str, Any], Buffer]:
    """All measurements for one tuning."""
    gpu = Gpu(tuning=tuning)
    pool = pool or gpu.allocate(min(pool_bytes, gpu.free_bytes() // 2))
    bench = Bench(gpu, tuning, pool)
    bench.fill_pool(np.random.default_rng(1).integers(0, 256, 1 << 22, dtype=np.uint8))
    peak = bench.read_bandwidth()
    rows: list[dict[str, Any]] = []

    def add(what: str, nbytes: int, microseconds: float) -> None:
        rate, plain = nbytes / microseconds * 1e6, bench.plain_read(nbytes)
        rows.append({"what": what, "bytes": nbytes, "microseconds": round(microseconds, 2),
                     "gigabytes_per_second": round(rate / 1e9, 1), "share_of_read": round(rate / peak, 3),
                     "plain_read_microseconds": round(plain, 2)})  # fmt: skip
        shares = f"{100 * rate / peak:6.1f} % {100 * plain / microseconds:6.1f} %"
        print(f"{what:50} {nbytes / 1e6:7.1f} MB {microseconds:7.2f} us {rate / 1e9:6.0f} GB/s {shares}", flush=True)

    print(f"read bandwidth {peak / 1e9:.0f} GB/s   tuning {tuning or 'of tuning.h'}")
    print("last columns: share of that bandwidth, share of the speed of a plain read of the same bytes")
    for picks in (10, 64):
        for gate_type, down_type in (("q4_k", "q4_k"), ("q5_k", "q5_k"), ("q6_k", "q6_k"), ("q4_k", "q6_k")):
            if is_quick and gate_type != down_type:
                continue
            for part, (nbytes, us) in bench.experts(gate_type, down_type, picks).items():
                add(f"{picks} experts {gate_type}/{down_type}: {part}", nbytes, us)
    products = [(name, 12288) for stored, planes in kernels.PLANES.items() for name in (stored, planes)]
    if not is_quick:
        products += [("q6_k", LOGITS), ("q6_k_planes", LOGITS)]
    for name, height in (*products, ("q4_k", 4096), ("f32", ROUTER)):
        add(f"mat_vec {name} {height} x {D_MODEL}", *bench.mat_vec(name, height, D_MODEL))
    return {"tuning": tuning, "read_gigabytes_per_second": round(peak / 1e9, 1), "results": rows}, pool


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="append", default=[], help="NAME=VALUE,... as in gpu/kernels/tuning.h")
    parser.add_argument("--pool", type=parse_bytes, default=6 << 30, help="bytes of weights to rotate through")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpu = Gpu()
    card = {"device": gpu.info.name, "architecture": gpu.info.architecture, "driver": gpu.driver(),
            "multiprocessors": gpu.info.multiprocessors, "l2_bytes": gpu.info.l2_bytes,
            "memory_bytes": gpu.info.memory_bytes}  # fmt: skip
    print("   ".join(f"{key} {value}" for key, value in card.items()))
    runs, pool = [], None
    for text in options.tuning or [""]:
        tuning = {name: int(value) for name, value in (part.split("=") for part in text.split(",") if part)}
        result, pool = run(tuning, options.pool, options.quick, pool)
        runs.append(result)
    if options.json:
        options.json.write_text(json.dumps(card | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
