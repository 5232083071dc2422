"""The device layer against a double of libamdhip64: by dlopen alone, and once more through hip-python.

hip-python looks for its library once a process, so its turn is a second pytest of this file (the last test)."""

from __future__ import annotations

import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import _hip
from fomoe_io._hip import Buffer, Launch, Stream
from fomoe_io.errors import DeviceError, UsageError
from fomoe_io.gpu import compiler, device, kernels
from fomoe_io.gpu.device import Gpu, Step
from tests.fake_hip.build import KINDS, Fake, installed_fake
from tests.gpu_shim import cases, router_cases
from tests.gpu_shim.device_runner import DeviceRunner

PROVIDER = os.environ.get("FOMOE_TEST_PROVIDER", "hip")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    if "FOMOE_TEST_PROVIDER" in os.environ:
        yield Fake(Path(os.environ["ROCM_PATH"]))
        return
    with installed_fake(tmp_path_factory.mktemp("rocm"), delay_us=300) as found:
        yield found


@pytest.fixture
def provider(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(device.PROVIDERS, "hip", (PROVIDER,))
    return PROVIDER


@pytest.fixture
def gpu(provider: str) -> Iterator[Gpu]:
    yield Gpu("hip")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(sum(request.node.name.encode()))


def test_description(gpu: Gpu, provider: str) -> None:
    assert gpu.info.provider == provider
    assert gpu.info.architecture == "gfx90a:sramecc+:xnack-"
    assert (gpu.info.multiprocessors, gpu.info.l2_bytes, gpu.info.memory_bytes) == (4, 4 << 20, 1 << 30)
    assert gpu.driver() == "HIP 7.0"


def test_memory_is_counted_and_given_back(gpu: Gpu, fake: Fake) -> None:
    before, free = fake.live(), gpu.free_bytes()
    buffers = [gpu.allocate(1 << 20) for _ in range(3)]
    assert free - gpu.free_bytes() == 3 << 20
    buffers[0].free()
    buffers[0].free()
    del buffers
    assert fake.live() == before
    assert gpu.free_bytes() == free


def test_a_library_is_bound_once_and_replaced_only_when_nothing_is_open(
    provider: str, fake: Fake, tmp_path: Path
) -> None:
    gpu = Gpu("hip")
    copy = shutil.copy(fake.rocm / "lib" / "libamdhip64.so", tmp_path / "other.so")
    other = _hip.open_library([str(copy)])
    fake.fail("hipInit", 1)  # whoever starts the driver again would hear of it
    try:
        assert device.list_devices("hip")[0].provider == provider
        second = Gpu("hip")
        with pytest.raises(DeviceError, match=f"this process computes with {provider}"):
            _hip.use_device_library("other", other)
        x = np.arange(64, dtype=np.float32)
        np.testing.assert_array_equal(gpu.download(gpu.upload(x), x.shape, np.float32), x)
    finally:
        fake.fail("hipInit", 0)
    del gpu, second
    _hip.use_device_library("other", other)
    assert _hip.provider == "other" and _hip.device_count() == 1
    assert device.list_devices("hip")[0].provider == provider


def test_a_library_that_does_not_fit_leaves_the_bound_one(provider: str) -> None:
    device.list_devices("hip")
    with pytest.raises(DeviceError, match="has no hipInit"):
        _hip.use_device_library("other", _hip.open_library(["libm.so.6"]))
    assert _hip.provider == provider and device.list_devices("hip")


def test_everything_is_given_back(provider: str, fake: Fake, rng: np.random.Generator) -> None:
    before = fake.live()
    gpu = Gpu("hip")
    memory = np.frombuffer(mmap.mmap(-1, 8192), np.uint8)
    registration, event, stream = gpu.register(memory), gpu.event(), gpu.new_stream()
    launch = gpu.prepare("silu_mul", (1, 1, 1), *(gpu.upload(cases.normal(rng, 256)) for _ in range(2)), None,
                         gpu.allocate(320), 256)  # fmt: skip
    graph = gpu.capture([launch])
    alive = fake.live()
    assert all(alive[kind] > before[kind] for kind in KINDS if kind != "blas")
    registration.close()
    del gpu, memory, registration, event, stream, launch, graph
    assert fake.live() == before


def test_kernels_through_the_device(gpu: Gpu, rng: np.random.Generator) -> None:
    runner = DeviceRunner(gpu)
    cases.check_quantize(runner, rng, 320, 2)
    cases.check_experts(runner, rng, "q4_k", "q6_k", 256, 256, 3, 1)
    router_cases.check_resolve(runner, rng, 64, 4)


def test_a_graph_replays_with_new_input(gpu: Gpu, rng: np.random.Generator) -> None:
    x, row, y = gpu.allocate(4 * 512), gpu.allocate(kernels.q8_row_bytes(512)), gpu.allocate(4 * 8)
    data, weights = cases.ref.random_weights(rng, "q4_k", 8, 512)
    steps = [
        gpu.prepare("quantize_q8", (2, 1, 1), x, row, 512),
        gpu.prepare("mat_vec_q4_k", kernels.mat_vec_grid("q4_k", 8, 1), gpu.upload(data), row, y, 8, 512, 1),
    ]
    graph = gpu.capture(steps)
    before = device.counts()
    for _ in range(3):
        values = cases.normal(rng, 1, 512)
        gpu.stream.copy_in(x.pointer, values.ctypes.data, values.nbytes)
        gpu.stream.synchronize()  # a graph's kernels may not see a copy that nobody has waited for
        graph.launch(gpu.stream)
        got = gpu.download(y, (8,), np.float32)
        assert cases.ref.error(got, weights @ cases.ref.q8(values)[1][0]) < cases.CLOSE
    after = device.counts()
    assert after["graph_launches"] - before["graph_launches"] == 3
    assert after["launches"] == before["launches"]
    assert after["host_syncs"] - before["host_syncs"] == 6


def test_streams_run_beside_each_other_and_events_order_them(gpu: Gpu) -> None:
    """The double sleeps before each piece of work, so that a copy not waited for is not there."""
    host = np.arange(1 << 16, dtype=np.uint8)
    first, second, back = gpu.allocate(host.nbytes), gpu.allocate(host.nbytes), np.zeros_like(host)
    copier, event = gpu.new_stream(), gpu.event()
    copier.copy_in(first.pointer, host.ctypes.data, host.nbytes)
    assert not copier.is_done()
    copier.record(event)
    gpu.stream.wait(event)
    gpu.stream.copy(second.pointer, first.pointer, host.nbytes)
    gpu.stream.copy_out(back.ctypes.data, second.pointer, host.nbytes)
    assert not back.any()
    gpu.stream.synchronize()
    assert event.is_done()
    np.testing.assert_array_equal(back, host)


def test_timed_events(gpu: Gpu) -> None:
    begin, end = gpu.event(is_timed=True), gpu.event(is_timed=True)
    gpu.stream.record(begin)
    gpu.stream.record(end)
    end.synchronize()
    assert end.milliseconds_since(begin) > 0


def prepare_wait(gpu: Gpu, words: int, late: Buffer) -> Launch:
    """A wait of run 3 for one missing record; words: the answer, and far behind it the word that stops the wait."""
    misses, run = (gpu.upload(np.array([value], np.uint32)) for value in (1, 3))
    here = gpu.upload(np.zeros(1, np.uint64))
    return gpu.prepare("wait_for_misses", (1, 1, 1), misses, here, words, run, words + 2048, late, 1)


def test_registered_memory_is_shared(gpu: Gpu) -> None:
    """The host serves a miss while the device waits for it: no synchronisation, only words both can see."""
    words = np.frombuffer(mmap.mmap(-1, 4096), np.uint64)
    registration = gpu.register(words)
    late = gpu.upload(np.zeros(1, np.uint64))
    done = gpu.event()
    wait = prepare_wait(gpu, registration.pointer, late)  # kept: freeing its buffers would wait for the stream
    wait.run(gpu.stream)
    gpu.stream.record(done)
    assert not done.is_done()
    words[0] = 1234
    words[1] = 3 << 32
    done.synchronize()
    assert gpu.download(late, (1,), np.uint64)[0] == 1234
    registration.close()


@pytest.mark.parametrize(
    ("call", "code", "act", "text"),
    [
        ("hipMalloc", 2, lambda gpu: gpu.allocate(64), r"hipMalloc failed: hipErrorOutOfMemory \(2\): out of memory"),
        ("hipStreamSynchronize", 719, lambda gpu: gpu.stream.synchronize(), r"hipStreamSynchronize failed: .*\(719\)"),
        ("hipModuleLaunchKernel", 719,
         lambda gpu: gpu.prepare("quantize_q8", (1, 1, 1), None, None, 0).run(gpu.stream),
         r"hipModuleLaunchKernel failed: hipErrorLaunchFailure \(719\)"),
        ("hipHostRegister", 1, lambda gpu: gpu.register(np.zeros(64)), "hipHostRegister failed"),
        ("hipEventCreateWithFlags", 2, lambda gpu: gpu.event(), "hipEventCreateWithFlags failed"),
        ("hipSetDevice", 101, lambda gpu: gpu.allocate(64), r"failed: hipErrorFake \(101\)"),
    ],
)  # fmt: skip
def test_an_error_names_the_call(gpu: Gpu, fake: Fake, call: str, code: int, act, text: str) -> None:
    before = fake.live()
    fake.fail(call, code)
    with pytest.raises(DeviceError, match=text) as caught:
        act(gpu)
    assert "\n" not in caught.value.message
    assert ("--vram" in (caught.value.hint or "")) == (code == 2)
    del caught
    assert fake.live() == before
    gpu.stream.synchronize()  # and the device is usable again


def test_too_much_memory(gpu: Gpu) -> None:
    with pytest.raises(DeviceError, match="out of memory"):
        gpu.allocate(2 << 30)


def test_a_failed_capture_leaves_the_stream_usable(gpu: Gpu, fake: Fake) -> None:
    launch = gpu.prepare("quantize_q8", (0, 1, 1), None, None, 0)  # an empty grid is refused
    with pytest.raises(DeviceError, match=r"hipModuleLaunchKernel failed: .*\(1\)"):
        gpu.capture([launch])
    gpu.stream.synchronize()


def test_wrong_arguments(gpu: Gpu) -> None:
    with pytest.raises(TypeError, match="quantize_q8 takes 3 arguments, got 1"):
        gpu.prepare("quantize_q8", (1, 1, 1), None)
    with pytest.raises(DeviceError, match="there is no kernel quantise"):
        gpu.prepare("quantise", (1, 1, 1))
    with pytest.raises(DeviceError, match="does not hold"):
        gpu.download(gpu.allocate(4), (2,), np.float32)


def test_no_such_device(provider: str) -> None:
    with pytest.raises(DeviceError, match=r"1 device\(s\), numbered from 0: there is no 1"):
        Gpu("hip:1")


def test_two_devices(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HIP_DEVICES", "2")
    gpus = [Gpu(f"hip:{i}") for i in range(2)]
    assert [g.info.ordinal for g in gpus] == [0, 1]
    assert len(device.list_devices("hip")) == 2


def test_kernels_are_tuned(provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By what shapes no grid: the compiler hears of it."""
    monkeypatch.setenv("FOMOE_CACHE", str(tmp_path))
    asked: list[object] = []
    real = compiler.compile_kernels
    monkeypatch.setattr(compiler, "compile_kernels", lambda *a: asked.append(a[1]) or real(*a))
    device.open_gpus("hip", {"PREFETCH_BYTES": 64})
    device.open_gpus("hip")
    assert asked == [{"PREFETCH_BYTES": 64}, None]
    for name in ("MAT_VEC_ROWS", "PREFETCH"):
        with pytest.raises(UsageError, match=f"'{name}' is nothing of the kernels"):
            device.open_gpus("hip", {name: 4})


def test_waiting_does_not_hold_the_gil(gpu: Gpu) -> None:
    words = np.frombuffer(mmap.mmap(-1, 4096), np.uint32)
    registration = gpu.register(words)
    wait = prepare_wait(gpu, registration.pointer, gpu.upload(np.zeros(1, np.uint64)))
    wait.run(gpu.stream)

    def serve() -> None:
        words[3] = 3  # all of the record is there

    timer = threading.Timer(0.02, serve)  # this thread runs only if synchronize() lets it
    timer.start()
    gpu.stream.synchronize()
    assert words[3] == 3
    timer.join()


def test_compiled_kernels_are_cached(gpu: Gpu, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached,) = compiler.cache_folder().iterdir()
    image = cached.read_bytes()
    monkeypatch.setenv("FAKE_HIP_CODE", "/nowhere")
    Gpu("hip")  # needs no compiler
    cached.write_bytes(image[:-1] + b"?")  # damage is seen, and not computed with
    with pytest.raises(DeviceError):
        Gpu("hip")
    monkeypatch.setenv("FAKE_HIP_CODE", str(fake.path / "libkernels.so"))
    Gpu("hip")
    assert cached.read_bytes() == image


def test_a_refused_source_is_one_line(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "options", lambda architecture, tuning: ["-O3"])
    with pytest.raises(DeviceError, match="the kernels do not compile for gfx1100: no --offload-arch"):
        compiler.compile_kernels("gfx1100")


def test_no_gpu_is_one_error_with_every_reason(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a CUDA device here")
    monkeypatch.setenv("FAKE_HIP_DEVICES", "0")
    with pytest.raises(DeviceError) as caught:
        device.find_provider("auto")
    for name in device.PROVIDERS["auto"]:
        assert f"{name}: " in caught.value.message
    assert caught.value.hint == "--device cpu"


@pytest.mark.skipif(PROVIDER != "hip", reason="this is that run")
def test_all_of_this_through_hip_python(fake: Fake) -> None:
    if importlib.util.find_spec("rocm") is None:
        pytest.skip("hip-python is not installed (pip install hip-python)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    setting = {"FOMOE_TEST_PROVIDER": "hip-python", "FOMOE_CACHE": str(fake.path / "cache-hip-python")}
    child = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


def test_launches_are_chained_where_nothing_else_is_waited_for(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first of a branch, and not the one where the branches meet."""
    seen: list[tuple[str, bool]] = []

    class Spy(Launch):
        def run(self, stream: Stream, is_chained: bool = False) -> None:
            seen.append((self.function.name, is_chained))
            super().run(stream, is_chained)

    x, y = gpu.upload(np.ones(64, np.float32)), gpu.allocate(256)

    def step(name: str, **more: bool) -> Step:
        arguments = (x, y, 64) if name == "quantize_q8" else (x, x, None, y, 64)
        launch = Spy(gpu.function(name), (1, 1, 1), 256, gpu.table[name].signature, *arguments)
        return Step(launch, **more)

    steps = [
        step("quantize_q8"), step("quantize_q8", forks=True), step("silu_mul", beside=True), step("quantize_q8"),
        step("silu_mul", beside=True), step("quantize_q8", joins=True), step("quantize_q8"),
    ]  # fmt: skip
    gpu.capture_steps(steps, is_chained=True)
    assert not any(chained for _, chained in seen)  # this architecture has no such launches
    seen.clear()
    monkeypatch.setattr(Gpu, "can_chain", True)
    gpu.capture_steps(steps, is_chained=True)
    assert [chained for _, chained in seen] == [False, True, False, True, True, False, True]
    seen.clear()
    gpu.capture_steps(steps)
    assert not any(chained for _, chained in seen)
