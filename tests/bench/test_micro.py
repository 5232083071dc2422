"""Routing, residency, dot products, tokenizer, sampler and readers, each alone and small: a table in half a minute.

Nothing is asserted about times.  Compare two trees with ``--benchmark-save`` and ``--benchmark-compare``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io._cpu import Matrix, Program, Rows, Team
from fomoe_io.cpu import dot_library
from fomoe_io.experts.car import CarRule
from fomoe_io.experts.residency import LIBRARY, Residency, address
from fomoe_io.storage.gguf import GGUFFile
from fomoe_io.storage.reader import aligned_memory, open_reader
from fomoe_io.text.sampler import Sampler, SamplingConfig
from fomoe_io.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]

EXPERTS, USED = 512, 10
SLOTS = np.array([[102, 77]], np.int32)
"""20 and 15 % of the experts."""

DECISIONS = 256
COLUMNS, WEIGHT_BYTES = 2048, 4 << 20
READ_BYTES, READS = 1 << 20, 16
TEXT = (
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. 3.14, naïve café!\n"
    * 20
)

Benchmark = Any  # pytest_benchmark.fixture.BenchmarkFixture


@pytest.mark.parametrize("rule", ["exact", "ratio:0.65", "regret:0.034"])
def test_decisions(benchmark: Benchmark, rule: str) -> None:
    """256 tokens' routing of one layer: top 10 of 512, perhaps a substitution, and the bookkeeping of slots."""
    random = np.random.default_rng(1)
    logits = (random.standard_normal((DECISIONS, EXPERTS)) + random.standard_normal(EXPERTS)).astype(np.float32)
    residency = Residency([EXPERTS], SLOTS)
    car = None if rule == "exact" else ctypes.byref(CarRule.parse(rule).native())
    LIBRARY.fomoe_decide_many.restype = ctypes.c_int64
    count = ctypes.c_int64(DECISIONS)
    benchmark(
        LIBRARY.fomoe_decide_many, residency.handle, car, count, DECISIONS, EXPERTS, USED, address(logits)
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["lru", "decayed"])
def test_resolve(benchmark: Benchmark, policy: str) -> None:
    """One token's experts through Python's face: mostly the face."""
    random = np.random.default_rng(2)
    picks = [random.choice(EXPERTS, USED, replace=False).tolist() for _ in range(64)]
    residency = Residency([EXPERTS], SLOTS, policy=policy)

    def tokens() -> None:
        for ids in picks:
            residency.tick()
            residency.touch(0, ids)
            residency.resolve(0, ids)
            residency.release(0, ids)

    benchmark(tokens)


@pytest.mark.parametrize("kernels", ["ggml", "portable"])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "F16"])
def test_dot_products(benchmark: Benchmark, kernels: str, name: str) -> None:
    """4 MiB of weights times one row of activations, on one thread."""
    if kernels == "ggml" and dot_library.ggml_libraries() is None:
        pytest.skip("libggml-python is not installed")
    library, kind = dot_library.open_kernels(kernels), gguf.GGMLQuantizationType[name]
    row_bytes = library.row_bytes(int(kind), COLUMNS)
    # bytes below 64: no float pattern among them is infinite or not a number
    weights = np.random.default_rng(3).integers(0, 64, WEIGHT_BYTES // row_bytes * row_bytes, np.uint8)
    rows = len(weights) // row_bytes
    matrix = Matrix(library, weights.ctypes.data, int(kind), rows, COLUMNS, False, weights)
    program = Program(Team(1), library, COLUMNS)
    x, converted = Rows(library, COLUMNS, 1), Rows(library, COLUMNS, 1, matrix.activation_type)
    program.norm(x, np.ones(COLUMNS, np.float32), 1e-6, [converted], False)
    program.mat_mul([(matrix, converted, Rows(library, rows, 1), False)])
    ids, logits = np.zeros(1, np.int32), np.zeros((1, 1), np.float32)
    benchmark(program.run, ids, 0, 0, 0, logits)


def test_tokenizer(benchmark: Benchmark, demo_model: Path) -> None:
    """2 kB of text to ids and back."""
    tokenizer = Tokenizer.from_metadata(GGUFFile.open(demo_model).metadata)
    assert benchmark(lambda: tokenizer.decode(tokenizer.encode(TEXT))) == TEXT


@pytest.mark.parametrize("vocabulary", [8192, 248_320])
def test_sampler(benchmark: Benchmark, vocabulary: int) -> None:
    """One token with the default filters and a repeat penalty."""
    logits = np.random.default_rng(4).standard_normal(vocabulary).astype(np.float32) * 4
    sampler = Sampler(SamplingConfig(seed=1, repeat_penalty=1.1))
    for token in range(64):
        sampler.accept(token)
    benchmark(sampler.sample, logits)


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_reader(benchmark: Benchmark, engine: str, tmp_path: Path) -> None:
    """16 reads of 1 MiB at once: what the drive or the page cache gives, and what asking for it costs."""
    path = tmp_path / "data"
    path.write_bytes(np.random.default_rng(5).bytes(READ_BYTES * READS))
    memory = aligned_memory(READ_BYTES * READS)
    with open_reader([path], engine=engine, depth=READS) as reader:
        requests = [(0, i * READ_BYTES, memory.address + i * READ_BYTES, READ_BYTES) for i in range(READS)]
        benchmark(reader.read_into, requests)
