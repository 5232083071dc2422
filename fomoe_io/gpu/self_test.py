"""What the engine takes for granted of a GPU and its driver, tried out: fomoe-doctor --gpu.

Every check ends: a device that does not answer for LIMIT_SECONDS fails it, and what still hangs is left alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from fomoe_io import _hip
from fomoe_io._hip import Event, Registration, Stream
from fomoe_io.errors import DeviceError
from fomoe_io.gpu import device, kernels
from fomoe_io.gpu.device import Gpu, Step
from fomoe_io.gpu.hop_test import COLUMNS as HOP_COLUMNS
from fomoe_io.gpu.hop_test import hop_us, partner_of
from fomoe_io.storage.reader import aligned_memory
from fomoe_io.units import format_bytes

OK, WARN, FAIL = "OK", "WARN", "FAIL"
LIMIT_SECONDS = 2.0
NODES, REPLAYS = 1000, 1000
REPLAYS_SECONDS = 30.0
"""A slow device replays less often."""
REWRITES, REWRITTEN_BYTES = 50, 1 << 20
COPIES, COPIED_BYTES = 200, 64 << 10
ROUND_TRIPS = 1000
PEER_BYTES = 8 << 20
END_ECHO = 0xFFFFFFFF
SHARED_QUEUES_FIX = "GPU_MAX_HW_QUEUES=8 in the environment; please report this card and driver"
REPORT_FIX = "another driver version; please report this card and driver"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check: its name, OK, WARN or FAIL, what was found, and what may mend it."""

    name: str
    status: str
    found: str
    fix: str = ""


class SharedWords:
    """A page of uint32 words that host and device both see; each may be given its own cache line."""

    def __init__(self, gpu: Gpu) -> None:
        self._memory = aligned_memory(4096, huge_pages=False)
        self.words = np.frombuffer(self._memory.view, np.uint32)
        self.words[:] = 0
        self._registration: Registration = gpu.register(self.words)

    def pointer(self, line: int) -> int:
        """Where the device sees the first word of a cache line."""
        return self._registration.pointer + 64 * line

    def __getitem__(self, line: int) -> int:
        return int(self.words[16 * line])

    def __setitem__(self, line: int, value: int) -> None:
        self.words[16 * line] = value

    def close(self) -> None:
        """Give it back."""
        self._registration.close()
        del self.words
        self._memory.close()


def run(name: str = "auto") -> Iterator[Finding]:
    """All checks of a device, each as soon as it is done.

    Parameters
    ----------
    name : str
        ``auto``, ``hip``, ``cuda`` or ``hip:1``.

    Raises
    ------
    DeviceError
        There is no such device, or its kernels do not compile.
    """
    gpu = Gpu(name)
    d = gpu.info
    yield Finding(
        "device", OK,
        f"{d.option} {d.name}, {d.architecture}, {format_bytes(d.memory_bytes)}, {d.multiprocessors} multiprocessors, "
        f"{'integrated, ' if d.is_integrated else ''}by {d.provider}, driver {gpu.driver()}",
    )  # fmt: skip
    checks: list[tuple[str, Callable[[Gpu], Finding]]] = [
        ("queues", check_queues),
        ("replays", check_replays),
        ("copied under", check_rewritten),
        ("copies", check_copies),
        ("round trip", check_round_trip),
        ("hops", check_hops),
        ("peers", check_peers),
    ]
    is_usable = True
    _hip.set_patience(LIMIT_SECONDS)
    try:
        for title, check in checks:
            if not is_usable:
                yield Finding(title, WARN, "not tried: the device fails or hangs", "restart, then try again")
                continue
            try:
                yield check(gpu)
            except DeviceError as error:
                is_usable = False  # freeing anything may wait for what hangs
                yield Finding(title, FAIL, error.message, REPORT_FIX)
    finally:
        _hip.set_patience()
        if not is_usable:
            _hip.abandon(gpu)


@contextmanager
def held(gpu: Gpu, *things: object) -> Iterator[None]:
    """What a device may still use when a check fails because it hangs is never given back: that would wait for it."""
    try:
        yield
    except DeviceError:
        _hip.abandon(*things)
        raise


def _wait_until(is_so: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0)
    return True


# ---- (a) ----


def _lanes_pass(gpu: Gpu, lanes: list[Stream], with_branch: bool) -> bool:
    """Whether copies and events of these streams pass while a graph's kernel waits for the host."""
    shared, host = SharedWords(gpu), aligned_memory(4096)
    places = [gpu.allocate(4096) for _ in lanes]
    events: list[Event] = [gpu.event() for _ in lanes]
    wait = gpu.prepare("probe_wait", (1, 1, 1), shared.pointer(0), shared.pointer(1))
    other = gpu.prepare("probe_wait", (1, 1, 1), shared.pointer(0), shared.pointer(2))
    steps = (
        [Step(wait, forks=True), Step(other, beside=True), Step(wait), Step(wait, joins=True)]
        if with_branch
        else [Step(wait)]
    )
    graph = gpu.capture_steps(steps)
    with held(gpu, shared, host, places, events, graph, lanes):
        graph.launch(gpu.stream)
        try:
            if not _wait_until(lambda: shared[1] == 1):
                raise DeviceError("a kernel was not started, or its word in host memory is not seen")
            for lane, place, event in zip(lanes, places, events, strict=True):
                lane.copy_in(place.pointer, host.address, 4096)
                lane.copy_out(host.address, place.pointer, 4096)
                lane.record(event)
            passed = _wait_until(lambda: all(event.is_done() for event in events))
        finally:
            shared[0] = 1
        gpu.stream.synchronize()
        for lane in lanes:
            lane.synchronize()
    shared.close()
    host.close()
    return passed


def check_queues(gpu: Gpu) -> Finding:
    """Copies on the engine's lanes pass a graph that waits for them; and whether ordinary streams' would."""
    ordinary = [gpu.new_stream() for _ in range(4)]
    by_ordinary = _lanes_pass(gpu, ordinary, with_branch=True)
    lanes = [gpu.new_stream(is_urgent=True) for _ in range(2)]
    passed = _lanes_pass(gpu, lanes, with_branch=gpu.info.provider == "cuda")
    note = f"those of ordinary streams beside two branches {'too' if by_ordinary else 'do not'}"
    if passed:
        return Finding("queues", OK, f"copies pass a kernel that waits for them; {note}")
    found = f"copies do not pass a kernel that waits for them within {LIMIT_SECONDS:g} s; {note}"
    return Finding("queues", FAIL, found, SHARED_QUEUES_FIX)


# ---- (b) ----


def check_replays(gpu: Gpu) -> Finding:
    """What the host writes before each replay of a long graph is what its kernels read."""
    shared, wrong = SharedWords(gpu), gpu.upload(np.zeros(4, np.uint32))
    fetched, copied = gpu.upload(np.zeros(16, np.uint32)), gpu.upload(np.zeros(16, np.uint32))
    begin = gpu.prepare(
        "begin_run", kernels.begin_run_grid(64, 0), shared.pointer(0), fetched, shared.pointer(1), None, None, 4, 0
    )
    probe = gpu.prepare("probe_header", (1, 1, 1), fetched, copied, shared.pointer(0), wrong)
    graph = gpu.capture([begin] + [probe] * (NODES - 1))
    started, done = time.monotonic(), 0
    with held(gpu, shared, wrong, fetched, copied, graph):
        while done < REPLAYS and time.monotonic() - started < REPLAYS_SECONDS:
            done += 1
            shared[0] = done
            gpu.stream.copy_in(copied.pointer, shared.words.ctypes.data, 64)
            graph.launch(gpu.stream)
            gpu.stream.synchronize()
        counts = gpu.download(wrong, (4,), np.uint32)
    microseconds = 1e6 * (time.monotonic() - started) / (done * NODES)
    shared.close()
    return judge_replays([int(n) for n in counts], done, microseconds)


def judge_replays(counts: list[int], replays: int, microseconds: float) -> Finding:
    """The finding for what probe_header has counted."""
    note = f"{replays} replays of {NODES} kernels, {microseconds:.1f} us each; stale words in other ways of reading: "
    note += f"plain {counts[1]}, copied {counts[2]}, copied and plain {counts[3]}"
    if counts[0]:
        return Finding("replays", FAIL, f"{counts[0]} kernels read words of another replay ({note})", REPORT_FIX)
    return Finding("replays", OK, f"every kernel reads this replay's words ({note})")


# ---- (c) ----


def _folded(words: np.ndarray) -> int:
    return int(np.bitwise_xor.reduce(words))


def check_rewritten(gpu: Gpu) -> Finding:
    """What a copy writes under a running graph is what the graph's next kernel reads."""
    blocks, wrong = 64, 0
    shared, host = SharedWords(gpu), aligned_memory(REWRITTEN_BYTES)
    contents = np.frombuffer(host.view, np.uint32)
    registration, lane, event = gpu.register(contents), gpu.new_stream(is_urgent=True), gpu.event()
    buffer, before, after = gpu.allocate(REWRITTEN_BYTES), gpu.allocate(32 * blocks), gpu.allocate(32 * blocks)
    read = [gpu.prepare("read_memory", (blocks, 1, 1), buffer, REWRITTEN_BYTES, out, blocks) for out in (before, after)]
    wait = gpu.prepare("probe_wait", (1, 1, 1), shared.pointer(0), shared.pointer(1))
    graph, random = gpu.capture([read[0], wait, read[1]]), np.random.default_rng(1)
    gpu.stream.fill(buffer.pointer, 0, REWRITTEN_BYTES)
    with held(gpu, shared, host, registration, lane, event, buffer, before, after, graph):
        for _ in range(REWRITES):
            shared[0] = shared[1] = 0
            contents[:] = random.integers(0, 1 << 32, len(contents), dtype=np.uint32)
            graph.launch(gpu.stream)
            is_here = _wait_until(lambda: shared[1] == 1)
            lane.copy_in(buffer.pointer, host.address, REWRITTEN_BYTES)
            lane.record(event)
            is_copied = is_here and _wait_until(event.is_done)
            shared[0] = 1
            gpu.stream.synchronize()
            if not is_copied:
                raise DeviceError(f"a copy under a running graph did not end within {LIMIT_SECONDS:g} s")
            wrong += _folded(gpu.download(after, (8 * blocks,), np.uint32)) != _folded(contents)
    registration.close()
    shared.close()
    del contents
    host.close()
    if wrong:
        found = (
            f"{wrong} of {REWRITES} times a kernel read what was there before the copy: experts would be computed wrong"
        )
        return Finding("copied under", FAIL, found, REPORT_FIX)
    return Finding(
        "copied under", OK, f"{REWRITES} copies of {format_bytes(REWRITTEN_BYTES)} under a running graph are seen"
    )


# ---- (d), (e): how long ----


def check_copies(gpu: Gpu) -> Finding:
    """What a copy and its event cost the host, and how soon the host knows of its end."""
    host = aligned_memory(COPIED_BYTES)
    registration = gpu.register(np.frombuffer(host.view, np.uint8))
    lane, event, place = gpu.new_stream(is_urgent=True), gpu.event(), gpu.allocate(COPIED_BYTES)
    submitted, known = [], []
    with held(gpu, host, registration, lane, event, place):
        for _ in range(COPIES):
            started = time.perf_counter()
            lane.copy_in(place.pointer, host.address, COPIED_BYTES)
            lane.record(event)
            submitted.append(time.perf_counter() - started)
            event.synchronize()
            known.append(time.perf_counter() - started)
    registration.close()
    host.close()
    found = f"a copy and its event take the host {1e6 * statistics.median(submitted):.1f} us; "
    found += f"{format_bytes(COPIED_BYTES)} are known to be there after {1e6 * statistics.median(known):.1f} us"
    return Finding("copies", OK, found)


def check_round_trip(gpu: Gpu) -> Finding:
    """From a word of the host's to the answer of a kernel that waits for it."""
    shared, times = SharedWords(gpu), []
    echo = gpu.prepare("probe_echo", (1, 1, 1), shared.pointer(0), shared.pointer(1), ROUND_TRIPS)
    question, reply = shared.words[0:1], shared.words[16:17]
    with held(gpu, shared, echo):
        echo.run(gpu.stream)
        try:
            for number in range(1, ROUND_TRIPS + 1):
                started = time.perf_counter()
                question[0] = number
                if reply[0] != number and not _wait_until(lambda: shared[1] == number):  # noqa: B023
                    raise DeviceError(f"a word in host memory was not answered within {LIMIT_SECONDS:g} s")
                times.append(time.perf_counter() - started)
        finally:
            question[0] = END_ECHO
        gpu.stream.synchronize()
    del question, reply
    shared.close()
    return Finding(
        "round trip", OK, f"a word to a waiting kernel and back takes {1e6 * statistics.median(times):.1f} us"
    )


# ---- (f) ----


def check_hops(gpu: Gpu) -> Finding:
    """Whether rows go from device to device through the host's memory, inside graphs: several devices rely on it."""
    other = partner_of(gpu)
    if other is None:
        return Finding("hops", OK, "skipped: there is no second device")
    microseconds, damaged = hop_us(gpu, other, LIMIT_SECONDS)
    who = other.info.option
    if damaged:
        return Finding("hops", FAIL, f"rows that went to {who} and back arrived damaged", REPORT_FIX)
    return Finding("hops", OK, f"{HOP_COLUMNS * 8 >> 10} KB to {who} take {microseconds:.1f} us, kernels and all")


def check_peers(gpu: Gpu) -> Finding:
    """Whether what goes straight from one device to another arrives whole.  The engine does not rely on it."""
    kind, own = gpu.info.option.split(":")[0], gpu.info.ordinal
    others = [d for d in device.list_devices(kind) if d.ordinal != own and not d.is_integrated]
    if not others:
        return Finding("peers", OK, "skipped: there is no second device")
    notes, is_bad = [], False
    for other in others:
        if not (_hip.can_reach(own, other.ordinal) and _hip.can_reach(other.ordinal, own)):
            notes.append(f"{other.option} cannot be reached")
            continue
        damage = _peer_damage(gpu, Gpu(other.option))
        is_bad |= bool(damage)
        notes.append(f"{other.option} {damage or 'is reached, and contents arrive whole'}")
    fix = "leave peer access off (it is, unless asked for)" if is_bad else ""
    return Finding("peers", WARN if is_bad else OK, ", ".join(notes), fix)


def _peer_damage(gpu: Gpu, other: Gpu) -> str:
    """What arrives damaged; empty: nothing."""
    blocks, data = 64, np.random.default_rng(2).integers(0, 1 << 32, PEER_BYTES // 4, dtype=np.uint32)
    there, back, folded = other.upload(data), gpu.allocate(PEER_BYTES), gpu.allocate(32 * blocks)
    read = gpu.prepare("read_memory", (blocks, 1, 1), there, PEER_BYTES, folded, blocks)
    problems = []
    with held(gpu, there, back, folded, read, other):
        gpu.stream.copy(back.pointer, there.pointer, PEER_BYTES)
        if not np.array_equal(gpu.download(back, data.shape, np.uint32), data):
            problems.append("copies arrive damaged")
        read.run(gpu.stream)
        if _folded(gpu.download(folded, (8 * blocks,), np.uint32)) != _folded(data):
            problems.append("kernels read wrong contents")
    return " and ".join(problems)
