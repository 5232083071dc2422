"""The kernels' double alone: signatures, and kernels that wait for the host while the test plays it."""

from __future__ import annotations

import ctypes
import re
import threading
import time

import numpy as np
import pytest

from fomoe_io.gpu import kernels
from tests.gpu_shim import cases
from tests.gpu_shim.cpu_kernels import CpuRunner, build

NOWHERE = 2
"""kernels/experts.h"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> CpuRunner:
    return CpuRunner(build(tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(sum(request.node.name.encode()))


def test_signatures_are_what_the_compiler_sees(runner: CpuRunner) -> None:
    for name, kernel in runner.table.items():
        signature = getattr(runner.library, f"{name}__signature")
        signature.restype = ctypes.c_char_p
        assert signature().decode() == kernel.signature, name
        assert getattr(runner.library, f"{name}__block_threads")() == kernel.threads, name


def answer_words(records: list[int], number: int) -> np.ndarray:
    """struct answer of kernels/experts.h: records, then the run that has brought gate and up, then the whole."""
    pairs = len(records)
    words = np.zeros(2 * pairs, np.uint64)
    words[:pairs] = records
    words.view(np.uint32)[2 * pairs :] = number
    return words


@pytest.mark.parametrize("word", ["answer", "stop"])
def test_wait_for_misses(runner: CpuRunner, word: str) -> None:
    misses, run, stop = (runner.put(np.array([value], np.uint32)) for value in (2, 7, 0))
    here = runner.put(np.array([0, 600, 0], np.uint64))
    reply = runner.put(answer_words([500, 0, 700], 6))  # the words of the run before
    late = runner.put(np.array([500, 0, 0], np.uint64))
    arguments = (misses, here, reply, run, stop, late, 3)
    waiter = threading.Thread(target=runner.launch, args=("wait_for_misses", (1, 1, 1), *arguments))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    if word == "stop":  # what has come by then is computed all the same
        ctypes.c_uint32.from_address(stop.pointer).value = 1
    for pair in (0, 2) if word == "answer" else ():
        ctypes.c_uint32.from_address(reply.pointer + 3 * 8 + 4 * (3 + pair)).value = 7
    waiter.join(10)
    assert not waiter.is_alive()
    assert late.get().tolist() == ([500, 0, 700] if word == "answer" else [NOWHERE, 0, NOWHERE])


def test_nobody_waits_when_nothing_is_missing(runner: CpuRunner) -> None:
    misses, run, stop = (runner.put(np.array([value], np.uint32)) for value in (0, 7, 0))
    here, reply, late = (runner.put(words) for words in (np.zeros(1, np.uint64), answer_words([500], 6), np.zeros(1)))
    runner.launch("wait_for_misses", (1, 1, 1), misses, here, reply, run, stop, late, 1)
    assert late.get()[0] == 0


@pytest.mark.parametrize("holds", [0, 1])
@pytest.mark.parametrize("word", ["answer", "stop", "stop before the rest"])
def test_late_experts_are_computed_as_they_come(
    runner: CpuRunner, rng: np.random.Generator, word: str, holds: int
) -> None:
    """The first pair's blocks wait for its inputs, pass on where it is, and may hold the stream until all is there."""
    records, offsets, _ = cases.make_records(runner, rng, 2, "q4_k", "q4_k", 256, 256)
    x = cases.quantized(runner, cases.normal(rng, 1, 256))
    run, stop = runner.put(np.array([7], np.uint32)), runner.put(np.zeros(1, np.uint32))
    reply, late = runner.put(answer_words([0, 0], 6)), runner.put(np.zeros(2, np.uint64))
    has_inputs, is_whole = (ctypes.c_uint32.from_address(reply.pointer + place) for place in (2 * 8, 2 * 8 + 2 * 4))
    results = []
    for here in (np.array([records[0].pointer, records[1].pointer], np.uint64), np.array([0, records[1].pointer])):
        hidden, table = (
            runner.put(np.zeros((2, kernels.q8_row_bytes(256)), np.uint8)),
            runner.put(here.astype(np.uint64)),
        )
        shape = (0, offsets["up"], x, hidden, None, 256, 256, 2, None, 0)
        arguments = (table, late, reply, run, stop, *shape, holds)
        waiter = threading.Thread(
            target=runner.launch, args=("experts_gate_up_q4_k", kernels.gate_up_grid(256, 2), *arguments)
        )
        waiter.start()
        waiter.join(10 if here[0] else 0.05)
        assert waiter.is_alive() == (not here[0])
        if not here[0] and word != "stop":
            ctypes.c_uint64.from_address(reply.pointer).value = records[0].pointer
            has_inputs.value = 7
            until = time.monotonic() + 10
            while late.get()[0] != records[0].pointer and time.monotonic() < until:
                time.sleep(0.01)
            waiter.join(0.2 if holds else 10)
            assert waiter.is_alive() == bool(holds)
            assert late.get()[0] == records[0].pointer
        if not here[0] and word == "answer":
            is_whole.value = 7
        elif not here[0]:
            ctypes.c_uint32.from_address(stop.pointer).value = 1
        waiter.join(10)
        assert not waiter.is_alive()
        results.append(hidden.get())
    is_there = word == "answer" or (word != "stop" and not holds)
    assert late.get().tolist() == [records[0].pointer if is_there else NOWHERE, 0]
    np.testing.assert_array_equal(results[1][1], results[0][1])
    assert (results[1][0] == results[0][0]).all() == is_there  # blocks behind one that was told to stop do nothing


def test_blocks_after_a_stop_do_not_wait(runner: CpuRunner, rng: np.random.Generator) -> None:
    """The first one's word is theirs: each looking for itself takes seconds where processors are few.  What is computed
    from such a record is NaN."""
    _, offsets, _ = cases.make_records(runner, rng, 1, "q4_k", "q4_k", 512, 256)
    x = cases.quantized(runner, cases.normal(rng, 1, 256))
    run, stop = runner.put(np.array([7], np.uint32)), runner.put(np.ones(1, np.uint32))
    here, reply, late = (runner.put(words) for words in (np.zeros(1, np.uint64), answer_words([0], 6), np.zeros(1)))
    hidden = runner.put(np.zeros((1, kernels.q8_row_bytes(512)), np.uint8))
    pauses = ctypes.c_long.in_dll(runner.library, "fibers_pauses")
    before, grid = pauses.value, kernels.gate_up_grid(512, 1)
    assert np.prod(grid) > 10
    shape = (0, offsets["up"], x, hidden, None, 512, 256, 1, None, 0, 1)
    runner.launch("experts_gate_up_q4_k", grid, here, late, reply, run, stop, *shape)
    assert pauses.value - before < 10
    assert late.get().view(np.uint64)[0] == NOWHERE
    y, weights = runner.put(np.zeros(256, np.float32)), runner.put(np.ones(1, np.float32))
    sizes = (offsets["down"], hidden, weights, None, None, y, 256, 512, 1, None, 0, 256)
    runner.launch("experts_down_q4_k", kernels.down_grid(256), here, late, *sizes)
    assert np.isnan(y.get()).all()


@pytest.mark.parametrize("word", ["words", "stop"])
def test_a_gather_waits_for_late_words(runner: CpuRunner, word: str) -> None:
    """Of several blocks; what has come when the host says stop is there, the rest is as it was."""
    count, run, stop = 1100, runner.put(np.array([7], np.uint32)), runner.put(np.zeros(1, np.uint32))
    there = np.full((2, count), np.uint64(6) << np.uint64(32), np.uint64)  # words of the run before
    there[1] |= np.arange(count, dtype=np.float32).view(np.uint32)
    vector, slots = runner.put(np.full((2, count), 5, np.float32)), runner.put(there)
    grid = kernels.gather_grid(count)
    arguments = (vector, None, None, None, count, 0, 0, 0, slots, slots, run, stop, 0, 2, grid[0])
    waiter = threading.Thread(target=runner.launch, args=("gather_floats", grid, *arguments))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    late = [600, *range(600), *range(601, count)]  # not in their order
    for i in late if word == "words" else late[:10]:
        ctypes.c_uint64.from_address(slots.pointer + 8 * (count + i)).value = int(there[1, i]) + (1 << 32)
    if word == "stop":
        ctypes.c_uint32.from_address(stop.pointer).value = 1
    waiter.join(10)
    assert not waiter.is_alive()
    found = vector.get()
    assert (found[0] == 5).all() and found[1, 600] == 600
    assert (found[1] == np.arange(count)).all() or (word == "stop" and (found[1, 610:] == 5).all())


def test_every_kernel_waits_for_the_one_before_it() -> None:
    """A chained launch starts early: whatever its kernel did before start_kernel() could meet unfinished work.

    What some begin with is constant, or was written by kernels further back: weights, where a token stands, what its
    session has kept.
    """
    text = "".join(kernels.sources().values())
    group = r"\((?:[^()]|\([^()]*\))*\)"
    starts = re.findall(rf"\b(?:RESIDENT_)?KERNEL{group}[\s\\]*{group}[\s\\]*{{[\s\\]*(\w+)[<(]", text)
    assert len(starts) == text.count("EXPORT_KERNEL(") - text.count("#define EXPORT_KERNEL(")
    asked = {
        "mat_vec": ["prefetch"],
        "norm_row": ["constant_quad"],
        "norm_heads": ["constant_quad"],
        "convolve_one": [],
        "delta": ["load_rows"],
        "prepare_head": ["now"],
        "attend": ["now"],
    }
    assert set(starts) == {"start_kernel", "mat_vec_many", "conv_one", *asked} - {"convolve_one"}
    for name, calls in asked.items():
        before = text.partition(f"DEVICE void {name}(")[2].partition("start_kernel();")[0]
        assert re.findall(r"\b(\w*(?:load|dot|now|fresh|prefetch|quad)\w*)[(<]", before) == calls
        assert not re.search(r"\b(?:x|q|k|v|row|residual|gate|y)\[|\*\(", before)
    chooses = text.partition("DEVICE void mat_vec_many(")[2].partition("\n}")[0]  # of its arguments, for mat_vec
    assert "mat_vec<T, ROWS>(" in chooses and not re.search(r"\bx\[|load|fresh|now\(|\*\(", chooses)
