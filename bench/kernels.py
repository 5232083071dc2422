"""Dot products of one thread, in turns: ggml's kernels beside the portable ones of this package.

Rows of 2048 weights from a buffer larger than the last-level cache, each multiplied with one activation row: what a
decode does.  Prints GB of weights per second and the ratio, the median of the rounds.

    python bench/kernels.py [--rounds 7] [--megabytes 256]
"""

from __future__ import annotations

import argparse
import statistics
import time

import gguf
import numpy as np

from fomoe_io._cpu import Matrix, Program, Rows, Team
from fomoe_io.cpu import dot_library

COLUMNS = 2048
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32")


def speed(name: str, kind: int, weights: np.ndarray) -> float:
    """GB/s of one pass over the weights with the kernels of that name."""
    kernels = dot_library.open_kernels(name)
    row_bytes = kernels.row_bytes(kind, COLUMNS)
    matrix = Matrix(kernels, weights.ctypes.data, kind, weights.nbytes // row_bytes, COLUMNS, False, weights)
    program = Program(Team(1), kernels, COLUMNS)
    x, converted = Rows(kernels, COLUMNS, 1), Rows(kernels, COLUMNS, 1, matrix.activation_type)
    y = Rows(kernels, matrix.rows, 1)
    program.norm(x, np.ones(COLUMNS, np.float32), 1e-6, [converted], False)
    program.mat_mul([(matrix, converted, y, False)])
    ids, logits, place = np.zeros(1, np.int32), np.zeros((0, 1), np.float32), np.zeros(1, np.int64)
    started = time.monotonic()
    program.run(ids, place, place.astype(np.uint64), ids[:0], logits)
    return weights.nbytes / (time.monotonic() - started) / 1e9


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=256)
    options = parser.parse_args()
    random = np.random.default_rng(1)
    print("| type | ggml GB/s | portable GB/s | portable / ggml |\n|---|---|---|---|")
    for name in TYPES:
        kind = int(gguf.GGMLQuantizationType[name])
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        row = COLUMNS // block * size
        # bytes below 64: no float pattern among them is infinite or not a number
        weights = random.integers(0, 64, options.megabytes * (1 << 20) // row * row, dtype=np.uint8)
        speeds: dict[str, list[float]] = {"ggml": [], "portable": []}
        for _ in range(options.rounds):
            for kernels, values in speeds.items():
                values.append(speed(kernels, kind, weights))
        ggml, portable = (statistics.median(values) for values in speeds.values())
        print(f"| {name} | {ggml:.1f} | {portable:.1f} | {portable / ggml:.2f} |", flush=True)


if __name__ == "__main__":
    main()
