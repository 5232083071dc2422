"""What only a device can show of the kernels.  Run with -m gpu."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from fomoe_io.errors import DeviceError
from fomoe_io.gpu import device, kernels
from fomoe_io.gpu.device import Gpu
from tests.gpu_shim import cases
from tests.gpu_shim.device_runner import DeviceRunner

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    try:
        return Gpu()
    except DeviceError as problem:
        pytest.skip(problem.message)


@pytest.fixture(scope="session")
def runner(gpu: Gpu) -> DeviceRunner:
    return DeviceRunner(gpu)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(sum(request.node.name.encode()))


def test_nothing_spills(gpu: Gpu) -> None:
    assert {name: gpu.resources(name)[1] for name in gpu.table} == dict.fromkeys(gpu.table, 0)


def test_same_input_same_bits(runner: DeviceRunner, rng: np.random.Generator) -> None:
    """No sum depends on which block or stream came first."""
    data, _ = cases.ref.random_weights(rng, "q4_k", 4096, 4096)
    w, x = runner.put(data), cases.quantized(runner, cases.normal(rng, 1, 4096))
    results = set()
    for _ in range(20):
        y = runner.put(cases.poison(4096))
        runner.launch("mat_vec_q4_k", kernels.mat_vec_grid("q4_k", 4096, 2), w, x, y, 4096, 4096, 2)
        results.add(y.get().tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("name", kernels.QUANTIZED_TYPES)
def test_matrix_units_change_no_bit(runner: DeviceRunner, rng: np.random.Generator, name: str) -> None:
    plain = DeviceRunner(Gpu(tuning={"BYTE_MATRICES": 0}))
    rows, columns, tokens = 257, 2048, 77
    data, _ = cases.ref.random_weights(rng, name, rows, columns)
    values, found = cases.normal(rng, tokens, columns), []
    for each in (runner, plain):
        x, y = cases.quantized(each, values), each.put(cases.poison(tokens, rows))
        grid = kernels.mat_mul_grid(rows, tokens)
        each.launch(f"mat_mul_{name}", grid, each.put(data), x, y, rows, columns, tokens)
        found.append(y.get())
    np.testing.assert_array_equal(*found)


def test_a_miss_is_served_without_a_synchronisation(gpu: Gpu, rng: np.random.Generator) -> None:
    """The device posts its picks to host memory and waits; the host sees them, answers, and the stream goes on."""
    words = np.frombuffer(mmap.mmap(-1, 4096), np.uint32)
    registration = gpu.register(words)
    post, reply, stop = (registration.pointer + offset for offset in (0, 1024, 2048))
    experts, picks = 16, 4
    table, run = gpu.upload(np.zeros(experts, np.uint64)), gpu.upload(np.array([9, 0], np.uint32))
    misses, records = gpu.upload(np.zeros(1, np.uint32)), gpu.upload(np.zeros(picks, np.uint64))
    ids, weights, late = gpu.allocate(4 * picks), gpu.allocate(4 * picks), gpu.allocate(8 * picks)
    logits = gpu.upload(cases.normal(rng, experts))
    steps = [
        gpu.prepare("route_and_resolve", (1, 1, 1), logits, ids, weights, table, records, late, post, run, misses,
                    experts, picks, 1, 1.0),
        gpu.prepare("wait_for_misses", (1, 1, 1), misses, records, reply, run, stop, late, picks),
    ]  # fmt: skip
    graph, done = gpu.capture(steps), gpu.event()
    syncs = device.counts()["host_syncs"]
    graph.launch(gpu.stream)
    gpu.stream.record(done)
    posted = words[: 2 * (1 + 2 * picks)].view(np.uint64)
    while any(posted >> 32 != 9):
        pass
    assert not done.is_done()
    assert posted[0] & 0xFFFFFFFF == picks
    seen = (posted[1 : 1 + picks] & 0xFFFF).tolist()
    words[256 : 256 + 2 * picks : 2] = np.arange(100, 100 + picks)
    words[256 + 3 * picks : 256 + 4 * picks] = 9  # all of each is there
    while not done.is_done():
        pass
    assert device.counts()["host_syncs"] == syncs
    assert gpu.download(ids, (picks,), np.int32).tolist() == seen
    assert gpu.download(late, (picks,), np.uint64).tolist() == list(range(100, 100 + picks))
    registration.close()


def test_out_of_memory_is_one_line(gpu: Gpu) -> None:
    with pytest.raises(DeviceError, match=r"out of memory|OUT_OF_MEMORY") as caught:
        gpu.allocate(gpu.info.memory_bytes * 2)
    assert "--vram" in (caught.value.hint or "")
