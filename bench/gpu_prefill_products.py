"""Dense products of a prompt's tokens: by the vendor's library (hipBLASLt, cuBLASLt), and by our own kernels.

Times are microseconds of one product of all tokens with one matrix, medians over replays of a captured graph whose
launches rotate through a pool of weights several times the last cache.  "expand" is what it costs to make halves of the
weights, alone; "mat_mul" is gpu/kernels/tile.h.  --scratch tries other sizes of a tile.

    python bench/gpu_prefill_products.py [--tokens 128,512] [--scratch 16M,64M] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from gpu_kernels import Bench, random_matrix

from fomoe_io.gpu import kernels
from fomoe_io.gpu.arena import DeviceMatrix
from fomoe_io.gpu.device import Gpu
from fomoe_io.gpu.products import SCRATCH_BYTES, WORKSPACE_BYTES, DenseProducts, padded
from fomoe_io.units import parse_bytes

SHAPES = (
    ("q4_k", 12288, 4096), ("q6_k", 12288, 4096), ("q8_0", 12288, 4096), ("f16", 12288, 4096),
    ("q4_k", 4096, 4096), ("q4_k", 4096, 8192), ("q4_k", 1024, 4096), ("q4_k", 512, 4096),
    ("f32", 16, 2048), ("f32", 64, 2048), ("f32", 256, 2048), ("f32", 512, 4096),
)  # fmt: skip
MOST_MATRICES = 40


def weights(bench: Bench, name: str, rows: int, columns: int) -> tuple[int, list[DeviceMatrix]]:
    """Bytes of a matrix, and copies of it all over the pool."""
    data = random_matrix(name, rows, columns, bench.rng).ravel()
    record = np.pad(data, (0, -data.nbytes % 4096))
    count = min(bench.fill_pool(record), MOST_MATRICES)
    return data.nbytes, [
        DeviceMatrix(bench.pool.pointer + i * record.nbytes, name, rows, columns) for i in range(count)
    ]


def by_library(bench: Bench, matrices: list[DeviceMatrix], tokens: int, scratch_bytes: int) -> dict[str, float]:
    """Microseconds of the whole and of its parts."""
    gpu, rows, columns = bench.gpu, matrices[0].rows, matrices[0].columns
    memory = gpu.allocate(WORKSPACE_BYTES + scratch_bytes)
    products = DenseProducts(gpu, memory.pointer, memory.pointer + WORKSPACE_BYTES, scratch_bytes)
    kept = np.float32 if matrices[0].kernel == "f32" else np.float16
    x = gpu.upload(bench.rng.standard_normal((padded(tokens), columns)).astype(kept))
    y = gpu.allocate(4 * padded(tokens) * rows)
    steps = [step for m in matrices for step in products.launches(m, x.pointer, y.pointer, tokens)]
    is_product = [hasattr(step, "shape") for step in steps]
    parts = {
        "whole": steps,
        "expand": [step for step, is_it in zip(steps, is_product, strict=True) if not is_it],
        "products": [step for step, is_it in zip(steps, is_product, strict=True) if is_it],
    }
    return {name: bench.microseconds(part, len(matrices)) if part else 0.0 for name, part in parts.items()}


def by_own_kernels(bench: Bench, matrices: list[DeviceMatrix], tokens: int) -> float:
    """Microseconds of the same product by ``mat_mul_*``."""
    name, rows, columns = matrices[0].kernel, matrices[0].rows, matrices[0].columns
    x = bench.q8(tokens, columns) if name in kernels.QUANTIZED_TYPES else bench.gpu.allocate(4 * tokens * columns)
    y = bench.gpu.allocate(4 * tokens * rows)
    grid = kernels.mat_mul_grid(rows, tokens)
    launches = [bench.gpu.prepare(f"mat_mul_{name}", grid, m.address, x, y, rows, columns, tokens) for m in matrices]
    return bench.microseconds(launches, len(matrices))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="128,512", help="numbers of tokens, separated by commas")
    parser.add_argument("--scratch", default=str(SCRATCH_BYTES), help="bytes of a tile's halves, separated by commas")
    parser.add_argument("--pool", type=parse_bytes, default=2 << 30, help="bytes of weights to rotate through")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpu = Gpu()
    bench = Bench(gpu, {}, gpu.allocate(min(options.pool, gpu.free_bytes() // 2)))
    print(f"{gpu.info.name}   {gpu.driver()}")
    heads = f"{'whole':>9} {'expand':>9} {'products':>9} {'TFLOPS':>7} {'mat_mul':>13}"
    print(f"{'':24} {'tokens':>6} {'scratch':>9} {heads}")
    results: list[dict[str, Any]] = []
    for name, rows, columns in SHAPES:
        nbytes, matrices = weights(bench, name, rows, columns)
        for tokens in map(int, options.tokens.split(",")):
            own = by_own_kernels(bench, matrices, tokens)
            for scratch_bytes in map(parse_bytes, options.scratch.split(",")):
                us = by_library(bench, matrices, tokens, scratch_bytes)
                rate = 2e-6 * rows * columns * tokens / us["whole"]
                results.append({"type": name, "rows": rows, "columns": columns, "bytes": nbytes, "tokens": tokens,
                                "scratch_bytes": scratch_bytes, "mat_mul_us": round(own, 2)}
                               | {f"{part}_us": round(value, 2) for part, value in us.items()})  # fmt: skip
                print(f"{name:5} {rows:6} x {columns:6}    {tokens:6} {scratch_bytes >> 20:5} MiB {us['whole']:9.2f} "
                      f"{us['expand']:9.2f} {us['products']:9.2f} {rate:7.1f} {own:13.2f}", flush=True)  # fmt: skip
    if options.json:
        card = {"device": gpu.info.name, "architecture": gpu.info.architecture, "driver": gpu.driver()}
        options.json.write_text(json.dumps(card | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
