"""What can go wrong between a host and its GPU, on the double: shared queues, stale words, work that never ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, _hip
from fomoe_io.config import Tiers, Tuning
from fomoe_io.errors import BudgetError, DeviceError, UsageError
from fomoe_io.experts import learned_profile
from fomoe_io.experts.profile import Profile
from fomoe_io.gpu import kernels
from fomoe_io.gpu.backend import GpuBackend
from fomoe_io.gpu.device import Gpu, Step
from fomoe_io.gpu.recordings import Addresses
from fomoe_io.session import Session
from tests.fake_hip.build import PATIENCE_SECONDS, Fake
from tests.tiny_model import Tiny, Type, write_tiny

MODEL = Tiny(
    layers=3, columns=256, heads=4, kv_heads=2, head_columns=64, rotated=32, key_heads=2, value_heads=4,
    state_columns=64, experts=16, used=3, hidden=256, shared_hidden=256, weights=Type.Q4_K,
)  # fmt: skip
TOKENS = (3, 141, 59, 26, 5, 35)


@pytest.fixture(autouse=True)
def provider(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    misuses = fake.misuses()
    abandoned: list[object] = []
    monkeypatch.setattr(_hip, "abandon", lambda *things: abandoned.extend(things))
    yield
    _hip.set_patience(PATIENCE_SECONDS)
    fake.fail("", 0)
    fake.lose(0)
    fake.hang("", -1)
    fake.release()
    if abandoned:  # here what hung goes on, and is given back after all
        _hip.synchronize(0)
        abandoned.clear()
    assert fake.misuses() == misuses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "model.gguf", MODEL, seed=3)


def settings(**more: Any) -> EngineConfig:
    return EngineConfig(**({"context_tokens": 64, "device": "hip", "batch_tokens": 4} | more))


def opened(model: Path, **more: Any) -> Engine:
    return Engine.open(model, settings(**({"tiers": Tiers(0.19, 0.2)} | more)))


def decoded(session: Session) -> np.ndarray:
    return np.stack([session.decode(token).copy() for token in TOKENS])


LAUNCHES = {"a token": "hipGraphLaunch", "a prompt": "hipModuleLaunchKernel"}


def read(session: Session, what: str) -> None:
    """Something whose launch is of LAUNCHES."""
    if what == "a token":
        session.decode(8)
    else:
        session.prefill([8, 9, 10])


@pytest.fixture(scope="module")
def expected(model: Path, fake: Fake) -> np.ndarray:
    with Engine.open(model, settings()) as engine:
        return decoded(engine.session())


# ---- the double itself ----


def test_streams_of_a_priority_share_queues(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_HIP_QUEUES", "1")
    gpu = Gpu("hip")
    other, urgent = gpu.new_stream(), gpu.new_stream(is_urgent=True)
    memory, host = gpu.allocate(64), np.ones(64, np.uint8)
    events = [gpu.event() for _ in range(2)]
    launch = gpu.prepare("quantize_q8", (1, 1, 1), memory, gpu.allocate(320), 16)  # kept: freeing would wait
    fake.hang("hipModuleLaunchKernel")
    launch.run(gpu.stream)
    for stream, event in zip((other, urgent), events, strict=True):
        stream.copy_in(memory.pointer, host.ctypes.data, 64)
        stream.record(event)
    urgent.synchronize()
    time.sleep(0.05)
    assert [event.is_done() for event in events] == [False, True]
    fake.release()
    other.synchronize()
    gpu.stream.synchronize()


def test_branches_of_a_graph_run_beside_each_other(fake: Fake) -> None:
    """One waits for a word that the other writes behind it."""
    gpu = Gpu("hip")
    words = np.frombuffer(bytearray(4096 * 2), np.uint32)
    registration = gpu.register(words)
    misses, run, late = gpu.upload(np.ones(1, np.uint32)), gpu.upload(np.full(1, 7, np.uint32)), gpu.allocate(8)
    reply, changed = gpu.upload(np.array([500, 0, 7, 7], np.uint32)), gpu.allocate(64)
    here = gpu.upload(np.zeros(1, np.uint64))
    pointer = registration.pointer
    first = gpu.prepare("quantize_q8", (1, 1, 1), changed, gpu.allocate(64), 16)
    wait = gpu.prepare("wait_for_misses", (1, 1, 1), misses, here, reply, run, pointer, late, 1)
    graph = gpu.capture_steps([Step(first, forks=True), Step(wait, beside=True), Step(first), Step(first, joins=True)])
    graph.launch(gpu.stream)
    gpu.stream.synchronize()
    registration.close()


def test_a_graph_reads_past_its_caches_what_was_copied_in(fake: Fake) -> None:
    """Of the header that a copy brings just before a replay, only now() sees the new words."""
    gpu = Gpu("hip")
    host = np.frombuffer(bytearray(4096), np.uint32).copy()
    registration = gpu.register(host)
    words, stale = gpu.upload(np.zeros(64, np.uint32)), gpu.allocate(256)
    begin = gpu.prepare("begin_run", (1, 1, 1), words, stale, None, None, None, 16, 0)
    x, y = gpu.upload(np.zeros(64, np.float32)), gpu.allocate(256)
    copied = gpu.prepare("silu_mul", (1, 1, 1), x, x, y, gpu.allocate(96), 64)
    graph = gpu.capture([begin, copied])
    host[:64] = 5
    gpu.stream.copy_in(words.pointer, host.ctypes.data, 256)
    values = np.full(64, 3, np.float32)
    gpu.stream.copy_in(x.pointer, values.ctypes.data, 256)
    graph.launch(gpu.stream)
    assert gpu.download(stale, (64,), np.uint32).tolist() == [5] * 64
    assert not gpu.download(y, (64,), np.float32).any()
    graph.launch(gpu.stream)
    assert gpu.download(y, (64,), np.float32).all()
    registration.close()


def test_another_thread_makes_the_device_its_own(fake: Fake) -> None:
    gpu = Gpu("hip")
    found: list[bool] = []

    def work() -> None:
        event = gpu.event()
        gpu.stream.record(event)
        gpu.stream.wait(event)
        event.synchronize()
        gpu.stream.synchronize()
        found.append(event.is_done() and gpu.stream.is_done())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


# ---- the engine ----


@pytest.mark.parametrize("queues", [1, 2, 4])
@pytest.mark.parametrize("branches", [1, 2])
def test_copies_pass_a_graph_that_waits_for_them(
    model: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, queues: int, branches: int
) -> None:
    """However few hardware queues there are: the copies' streams have a priority, and so queues, of their own."""
    monkeypatch.setenv("FAKE_HIP_QUEUES", str(queues))
    with opened(model, tuning=Tuning(branches=branches)) as engine:
        np.testing.assert_array_equal(decoded(engine.session()), expected)


@pytest.mark.parametrize("queues", [1, 4])
def test_the_stream_of_the_copies_may_tell_the_kernel_that_waits(
    model: Path, fake: Fake, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, queues: int
) -> None:
    """Then the host waits for no copy; what fails or hangs on the way ends as any other call does."""
    monkeypatch.setenv("FAKE_HIP_QUEUES", str(queues))
    tuning = Tuning(signals_by_stream=True)
    with opened(model, tuning=tuning) as engine:
        session = engine.session()
        np.testing.assert_array_equal(decoded(session), expected)
        s = engine.statistics()
        assert s["layers_served"]["with_misses"] > 0 and s["stall_seconds"]["h2d"] < s["stall_seconds"]["device"]
        fake.fail("hipStreamWriteValue32", 719, 3)
        with pytest.raises(DeviceError, match="hipStreamWriteValue32"):
            decoded(session)
    engine = opened(model, tuning=tuning)
    session = engine.session()
    _hip.set_patience(0.4)
    fake.hang("hipStreamWriteValue32", 2)
    with pytest.raises(DeviceError, match=r"has not answered for 0\.4 s"):
        decoded(session)
    engine.close()
    fake.release()


def test_on_ordinary_streams_they_would_not(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer waits for is copied by a stream whose queue the layer holds up: it ends as an error, not never."""
    monkeypatch.setenv("FAKE_HIP_QUEUES", "1")
    monkeypatch.setattr(Gpu, "new_stream", lambda gpu, is_urgent=False: _hip.Stream(gpu.info.ordinal))
    with opened(model) as engine:
        session = engine.session()
        _hip.set_patience(0.5)
        with pytest.raises(DeviceError, match="has not answered"):
            for token in TOKENS:
                session.decode(token)
        _hip.set_patience(PATIENCE_SECONDS)


@pytest.mark.parametrize("name", ["gpu", "hip:", "hip:x", "hip:-1", "cpu:0", "auto:1", "cuda:1,"])
def test_what_names_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="names no device"):
        EngineConfig(device=name)


def test_hip_gets_one_branch(model: Path) -> None:
    with opened(model) as engine:
        assert isinstance(engine.backend, GpuBackend)
        assert engine.backend.tokens.branches == 1


@pytest.mark.parametrize(
    ("call", "after"), [("hipGraphLaunch", 1), ("hipMemcpyDtoHAsync", 1), ("hipStreamSynchronize", 2)]
)
def test_what_a_failed_run_has_not_brought_is_brought_again(
    model: Path, fake: Fake, expected: np.ndarray, call: str, after: int
) -> None:
    """Tables count as sent when the run that fetches them succeeds, and no run begins before the last has ended.

    hipGraphLaunch fails where they count as sent before, hipMemcpyDtoHAsync where an error leaves a graph behind.
    """
    with opened(model, tiers=Tiers(0.5, 0.0)) as engine:
        session = engine.session()
        fake.fail(call, 719, after)
        with pytest.raises(DeviceError, match=call):
            for token in (*TOKENS, *TOKENS):
                session.decode(token)
        session.reset()
        np.testing.assert_array_equal(decoded(session), expected)


@pytest.mark.parametrize("call", ["hipMemcpyHtoDAsync", "hipMemcpyDtoHAsync", "hipEventRecord", "hipGraphLaunch"])
@pytest.mark.parametrize("reads", ["tokens", "a prompt"])
def test_work_that_never_ends_is_an_error_in_one_line(model: Path, fake: Fake, call: str, reads: str) -> None:
    if (call, reads) == ("hipGraphLaunch", "a prompt"):
        pytest.skip("prompts launch no graph")
    engine = opened(model)
    session = engine.session()
    session.prefill([7, 8])
    _hip.set_patience(0.4)
    fake.hang(call, 2)
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"has not answered for 0\.4 s") as caught:
        if reads == "tokens":
            for token in (*TOKENS, *TOKENS):
                session.decode(token)
        else:
            session.prefill(np.arange(40))
    assert time.monotonic() - started < 20
    assert "fomoe-doctor --gpu" in (caught.value.hint or "") and "\n" not in caught.value.message
    with pytest.raises(UsageError, match="stopped in the middle"):
        session.decode(1)
    engine.close()  # what the device may still use stays where it is
    fake.release()


@pytest.mark.parametrize("reads", ["a token", "a prompt"])
def test_an_interrupt_ends_a_wait(model: Path, fake: Fake, expected: np.ndarray, reads: str) -> None:
    """Within a second; the session must be reset, and the engine goes on."""
    with opened(model) as engine:
        session = engine.session()
        session.decode(7)
        fake.hang(LAUNCHES[reads])
        began: list[float] = []

        def interrupt() -> None:
            began.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
            fake.release()

        timer = threading.Timer(0.3, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            read(session, reads)
        assert time.monotonic() - began[0] < 2  # one, and a loaded machine
        timer.join()
        assert session.is_broken
        session.reset()
        np.testing.assert_array_equal(decoded(session), expected)


@pytest.mark.parametrize("reads", ["a token", "a prompt"])
@pytest.mark.parametrize("goes_on_with", ["tokens", "a prompt"])
def test_what_was_given_up_ends_before_the_next_is_written(
    model: Path, fake: Fake, expected: np.ndarray, reads: str, goes_on_with: str
) -> None:
    """A graph that begins late would find the next token's number in its header, and wait for answers to it."""
    with opened(model) as engine:
        session = engine.session()
        session.decode(7)
        fake.hang(LAUNCHES[reads])
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            read(session, reads)
        timer.join()
        session.reset()
        threading.Timer(0.2, fake.release).start()
        if goes_on_with == "a prompt":
            session.prefill([1, 2, 3])
            session.reset()
        np.testing.assert_array_equal(decoded(session), expected)


@pytest.mark.parametrize("reads", ["a token", "a prompt"])
def test_closing_ends_a_wait_of_another_thread(model: Path, fake: Fake, reads: str) -> None:
    """Long before the device's time is up, and between no two batches."""
    engine = opened(model)
    session = engine.session()
    session.decode(7)
    fake.hang(LAUNCHES[reads])
    errors: list[str] = []

    def work() -> None:
        try:
            read(session, reads)
        except UsageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    threading.Timer(1.5, fake.release).start()
    engine.close()
    thread.join(10)
    assert errors == ["the engine was closed while it ran"] and time.monotonic() - began < 6


def test_how_far_a_batch_is_comes_while_it_runs(model: Path, fake: Fake) -> None:
    with opened(model) as engine:
        session = engine.session()
        told: list[float] = []
        engine.gate.on_progress = told.append
        session.prefill(np.arange(40))
        fake.hang("hipModuleLaunchKernel")
        threading.Timer(0.4, fake.release).start()
        session.prefill([8, 9, 10])
        assert told and all(0 <= share <= 1 for share in told)


def test_a_lost_device_is_closed_without_an_error(model: Path, fake: Fake) -> None:
    engine = opened(model)
    session = engine.session()
    session.decode(7)
    fake.lose()
    with pytest.raises(DeviceError, match="719"):
        session.decode(8)
    engine.close()
    engine.close()


def test_a_failed_query_is_not_a_finished_copy(model: Path, fake: Fake) -> None:
    with opened(model) as engine:
        session = engine.session()
        session.decode(7)
        fake.fail("hipEventQuery", 719)
        with pytest.raises(DeviceError, match="hipEventQuery"):
            for token in (*TOKENS, *TOKENS):
                session.decode(token)


def test_a_context_that_no_device_holds_names_one_that_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("hip")
    used = gpu.info.memory_bytes - gpu.free_bytes()  # left behind by what hung
    monkeypatch.setenv("FAKE_HIP_MEMORY", str(used + (160 << 20)))
    with pytest.raises(BudgetError, match="a context of 1000000") as caught:
        Engine.open(model, settings(context_tokens=1_000_000))
    hint = caught.value.hint or ""
    assert hint.startswith("-c ")
    with Engine.open(model, settings(context_tokens=int(hint.removeprefix("-c ")))) as engine:
        assert engine.context_tokens > 1024


def test_attention_of_a_long_context_takes_the_room_of_one_token(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", replace(MODEL, layers=4), seed=3)  # the fourth has attention
    with opened(model) as engine:
        assert isinstance(engine.backend, GpuBackend)
        sizes = [
            engine.backend.sharing.recordings(Addresses(), context_tokens=n).fixed_bytes[1] for n in (1 << 20, 2 << 20)
        ]
    rope = 4 * MODEL.rotated * (1 << 20)
    parts = 4 * MODEL.heads * kernels.attention_splits(1 << 20) * (MODEL.head_columns + 2)
    assert sizes[1] - sizes[0] == rope + parts


def test_what_the_router_picked_is_kept_once(model: Path, tmp_path: Path) -> None:
    """A profile may be saved after each answer: a device that is lost later may take the process with it."""
    kept = tmp_path / "kept.json"
    with opened(model) as engine:
        session = engine.session()
        for token in TOKENS:
            session.decode(token)
            learned_profile.save(engine, kept)
        counts = engine.expert_counts()
        found = Profile.load(kept)
    assert found.tokens == len(TOKENS)
    for layer, picks in counts.items():
        np.testing.assert_array_equal(found.counts[layer], picks)


def test_an_engine_serves_any_thread(model: Path, expected: np.ndarray) -> None:
    with opened(model) as engine:
        session, found = engine.session(), []
        thread = threading.Thread(
            target=lambda: found.extend([session.prefill([1, 2]), session.reset(), decoded(session)])
        )
        thread.start()
        thread.join()
        np.testing.assert_array_equal(found[-1], expected)
