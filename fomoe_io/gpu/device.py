"""A GPU: found, opened, its kernels loaded.

The API is HIP.  Three providers stand behind it, tried in this order: hip-python (its C entry points), libamdhip64
itself, the CUDA driver (the same calls under other names).  Importing this module needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fomoe_io import _gpu, _hip
from fomoe_io._blaslt import Product
from fomoe_io._hip import Buffer, Event, Graph, Launch, Registration, Stream
from fomoe_io.errors import DeviceError, UsageError
from fomoe_io.gpu import compiler, kernels

T = TypeVar("T")

PROVIDERS = {"hip": ("hip-python", "hip"), "cuda": ("cuda",), "auto": ("hip-python", "hip", "cuda")}

# HIP 6 and 7: hipDeviceAttribute{MultiprocessorCount,L2CacheSize,Integrated}; CUDA's
# numbers for the same.
_MULTIPROCESSORS = {"cuda": 16, "hip": 63, "hip-python": 63}
_L2_BYTES = {"cuda": 38, "hip": 19, "hip-python": 19}
_INTEGRATED = {"cuda": 18, "hip": 16, "hip-python": 16}
# hipFunction_attribute and CUfunction_attribute agree.
_LOCAL_BYTES, _REGISTERS = 3, 4


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device is.

    Attributes
    ----------
    provider : {"hip-python", "hip", "cuda"}
    ordinal : its number with that provider
    architecture : ``gfx...`` or ``sm_...``
    memory_bytes : all of its memory
    multiprocessors : compute units, or streaming multiprocessors
    l2_bytes : size of its last cache
    is_integrated : it is a part of the processor and has no memory of its own
    """

    provider: str
    ordinal: int
    name: str
    architecture: str
    memory_bytes: int
    multiprocessors: int
    l2_bytes: int
    is_integrated: bool = False

    @property
    def option(self) -> str:
        """What ``--device`` calls it."""
        return f"{'cuda' if self.provider == 'cuda' else 'hip'}:{self.ordinal}"


def use_provider(provider: str) -> int:
    """Make one provider the process's device API.

    Returns
    -------
    The number of its devices, at least 1.

    Raises
    ------
    DeviceError
        Its library is not there, its driver does not start, or it sees no device.
    """
    if provider == "hip-python":
        library = _hip.open_capsules(["rocm.bindings.cyhip", "hip.chip"])
    elif provider == "hip":
        library = _hip.open_library(compiler.rocm_libraries("libamdhip64"))
    else:
        library = _hip.open_library(["libcuda.so.1"])
    _hip.use_device_library(provider, library)
    count = _hip.device_count()
    if count < 1:
        raise DeviceError(f"{provider} sees no device")
    return count


def find_provider(kind: str = "auto") -> str:
    """The first provider of ``hip``, ``cuda`` or ``auto`` that has a device; it is in use afterwards.

    Raises
    ------
    DeviceError
        None has; the message says why of each.
    """
    return _first_provider(kind, lambda provider: provider)


def find_device(name: str = "auto") -> tuple[str, int]:
    """Provider and ordinal of the device that ``hip``, ``cuda``, ``auto`` or ``hip:1`` means; the provider is in use.

    Raises
    ------
    DeviceError
        There is none; the message says why of each provider.
    """
    kind, _, number = name.partition(":")
    if not number:
        return _first_provider(kind, lambda provider: (provider, best_device()))
    provider, count = find_provider(kind), _hip.device_count()
    if int(number) >= count:
        raise DeviceError(
            f"{provider} has {count} device(s), numbered from 0: there is no {number}", hint="fomoe-doctor lists them"
        )
    return provider, int(number)


def best_device() -> int:
    """The device of the provider in use with the most memory of its own, the first of equals.

    Raises
    ------
    DeviceError
        All are integrated: they would take the memory that experts are kept in.
    """
    found = [describe(i) for i in range(_hip.device_count())]
    own = [d for d in found if not d.is_integrated]
    if not own:
        raise DeviceError(
            f"only a part of the processor, {found[0].name}: --device {found[0].option} takes it all the same"
        )
    return max(own, key=lambda d: (d.memory_bytes, -d.ordinal)).ordinal


def _first_provider(kind: str, look: Callable[[str], T]) -> T:
    problems = []
    for provider in PROVIDERS[kind]:
        try:
            use_provider(provider)
            return look(provider)
        except DeviceError as problem:
            problems.append(f"{provider}: {problem.message}")
    raise DeviceError("no GPU can be used (" + "; ".join(problems) + ")", hint="--device cpu")


def describe(ordinal: int) -> DeviceInfo:
    """What a device of the provider in use is."""
    provider = _hip.provider
    assert provider is not None
    return DeviceInfo(
        provider=provider,
        ordinal=ordinal,
        name=_hip.device_name(ordinal),
        architecture=_hip.device_architecture(ordinal),
        memory_bytes=_hip.device_bytes(ordinal),
        multiprocessors=_hip.device_attribute(ordinal, _MULTIPROCESSORS[provider]),
        l2_bytes=_hip.device_attribute(ordinal, _L2_BYTES[provider]),
        is_integrated=bool(_hip.device_attribute(ordinal, _INTEGRATED[provider])),
    )


def list_devices(kind: str = "auto") -> list[DeviceInfo]:
    """All devices of the first provider that has one (see ``find_provider``)."""
    find_provider(kind)
    return [describe(i) for i in range(_hip.device_count())]


def all_devices() -> list[DeviceInfo]:
    """The devices of HIP and of CUDA; afterwards the provider of the last ones is in use.

    Raises
    ------
    DeviceError
        There are none.
    """
    found = []
    for kind in ("hip", "cuda"):
        with suppress(DeviceError):
            found += list_devices(kind)
    return found or list_devices("auto")  # whose error says why


def open_gpus(name: str, tuning: Mapping[str, int] | None = None) -> list[Gpu]:
    """The devices that ``hip``, ``cuda``, ``auto``, ``hip:1`` or ``hip:0,1`` means; none when ``auto`` finds none, and
    all that equal the best one when it finds some.

    `tuning` overrides ``gpu/kernels/tuning.h`` as far as that shapes no grid.

    Raises
    ------
    DeviceError
        A device was asked for by its API and there is none, or the one found does not work.
    UsageError
        Overrides of what is not there, or shapes grids, which recordings take from ``tuning.h``.
    """
    if wrong := set(tuning or {}) - kernels.FREE_TUNING:
        raise UsageError(
            f"{sorted(wrong)[0]!r} is nothing of the kernels that can be tuned here",
            hint=", ".join(sorted(kernels.FREE_TUNING)),
        )
    kind, _, numbers = name.partition(":")
    if numbers:
        return [Gpu(f"{kind}:{number}", tuning) for number in numbers.split(",")]
    if name != "auto":
        return [Gpu(name, tuning)]
    try:
        _, best = find_device(name)
    except DeviceError:
        return []
    found = [describe(i) for i in range(_hip.device_count())]
    wanted = (found[best].name, found[best].memory_bytes, False)
    equal = [d for d in found if (d.name, d.memory_bytes, d.is_integrated) == wanted]
    return [Gpu(d.option, tuning) for d in equal[: _gpu.MOST_DEVICES]]


@dataclass(frozen=True, slots=True)
class Step:
    """A launch of a graph with two branches.

    Attributes
    ----------
    launch : Launch or Product
    beside : it runs on the second branch
    forks : the second branch may go on from here
    joins : what the second branch has done must be done before this
    """

    launch: Launch | Product
    beside: bool = False
    forks: bool = False
    joins: bool = False


class Gpu:
    """An opened device with the kernels loaded.

    Parameters
    ----------
    name : str
        ``auto``, ``hip`` or ``cuda``, or one of their devices: ``hip:1``.
    tuning : mapping, optional
        Overrides of ``gpu/kernels/tuning.h``.

    Raises
    ------
    DeviceError
        No device, no compiler, or the driver refused.

    Examples
    --------
    >>> gpu = Gpu("cuda")
    >>> x = gpu.upload(np.ones((1, 4096), np.float32))
    >>> row = gpu.allocate(kernels.q8_row_bytes(4096))
    >>> gpu.prepare("quantize_q8", (16, 1, 1), x, row, 4096).run(gpu.stream)
    """

    def __init__(self, name: str = "auto", tuning: Mapping[str, int] | None = None) -> None:
        provider, ordinal = find_device(name)
        self.info = describe(ordinal)
        self.table = kernels.kernels(tuning)
        compiler.open_compiler(provider)
        self._module = _hip.Module(ordinal, compiler.compile_kernels(self.info.architecture, tuning))
        self._functions: dict[str, _hip.Function] = {}
        self.stream = Stream(ordinal)

    def __repr__(self) -> str:
        return f"<Gpu {self.info.ordinal}: {self.info.name} ({self.info.architecture}, {self.info.provider})>"

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        return _hip.memory_info(self.info.ordinal)[0]

    def allocate(self, nbytes: int) -> Buffer:
        """Device memory, contents undefined; freed with the object or by ``free()``."""
        if nbytes < 1:
            raise DeviceError(f"cannot allocate {nbytes} bytes")
        return Buffer(self.info.ordinal, nbytes)

    def upload(self, array: np.ndarray, stream: Stream | None = None) -> Buffer:
        """A copy of an array in device memory; it is there when this returns."""
        array = np.ascontiguousarray(array)
        stream = stream or self.stream
        buffer = self.allocate(array.nbytes)
        stream.copy_in(buffer.pointer, array.ctypes.data, array.nbytes)
        stream.synchronize()
        return buffer

    def download(
        self, buffer: Buffer, shape: Sequence[int], dtype: np.typing.DTypeLike, stream: Stream | None = None
    ) -> np.ndarray:
        """The first elements of a buffer as an array, after all that the stream had to do before."""
        result = np.empty(shape, dtype)
        if result.nbytes > buffer.nbytes:
            raise DeviceError(f"a buffer of {buffer.nbytes} bytes does not hold {result.nbytes}")
        stream = stream or self.stream
        stream.copy_out(result.ctypes.data, buffer.pointer, result.nbytes)
        stream.synchronize()
        return result

    def register(self, memory: np.ndarray) -> Registration:
        """Let the copy engine and the kernels reach host memory (an array over an anonymous, page-aligned mmap)."""
        return Registration(self.info.ordinal, memory.ctypes.data, memory.nbytes, memory)

    def new_stream(self, *, is_urgent: bool = False) -> Stream:
        """Another stream, which waits for no other; an urgent one is not held up by what the others wait for."""
        return Stream(self.info.ordinal, is_urgent)

    def event(self, *, is_timed: bool = False) -> Event:
        """An event, to order streams or (timed) to measure between two of them."""
        return Event(self.info.ordinal, is_timed)

    def function(self, name: str) -> _hip.Function:
        """A kernel by name."""
        if name not in self.table:
            raise DeviceError(f"there is no kernel {name}")
        if name not in self._functions:
            self._functions[name] = _hip.Function(self._module, name)
        return self._functions[name]

    def prepare(self, name: str, grid: tuple[int, int, int], *arguments: object) -> Launch:
        """A launch with its arguments bound: Buffers, addresses or None for pointers, numbers for the rest.

        The launch keeps the buffers alive.  ``run(stream)`` may be called any number of times, and captured.
        """
        function, kernel = self.function(name), self.table[name]
        return Launch(function, grid, kernel.threads, kernel.signature, *arguments)

    def capture(self, launches: Sequence[Launch | Product], stream: Stream | None = None) -> Graph:
        """The launches, in order, as one graph."""
        return self.capture_steps([Step(launch) for launch in launches], stream)

    @property
    def can_chain(self) -> bool:
        """Whether a launch may be started before the one it follows has finished (NVIDIA from sm_90 on)."""
        architecture = self.info.architecture
        return architecture.startswith("sm_") and int(architecture.removeprefix("sm_")) >= 90

    def capture_steps(self, steps: Sequence[Step], stream: Stream | None = None, *, is_chained: bool = False) -> Graph:
        """Launches of two branches as one graph; every branch keeps its order.

        With `is_chained`, a launch that follows another on its branch, with nothing else to wait for, may be started
        before that one has finished; the kernels themselves wait.  Results are the same.
        """
        stream = stream or self.stream
        # Blocks of the first branch may wait for the host, on every processor of a small device: the second's go first.
        # HIP's urgent streams share queues with copies, which must not wait for a graph.
        beside = self.new_stream(is_urgent=self.info.provider == "cuda")
        forked, joined = self.event(), self.event()
        is_open, last = False, {False: False, True: False}  # last: whether the branch's last step was a launch of ours
        stream.begin_capture()
        try:
            for step in steps:
                if step.joins and is_open:
                    beside.record(joined)
                    stream.wait(joined)
                    is_open = last[False] = False
                if step.beside and not is_open:
                    beside.wait(forked)
                    is_open, last[True] = True, False
                on = beside if step.beside else stream
                if isinstance(step.launch, Launch):
                    step.launch.run(on, is_chained and self.can_chain and last[step.beside])
                else:
                    step.launch.run(on)
                last[step.beside] = isinstance(step.launch, Launch)
                if step.forks:
                    stream.record(forked)
        except DeviceError:
            # An open capture would refuse everything after it.
            with suppress(DeviceError):
                stream.end_capture([])
            raise
        return stream.end_capture([step.launch for step in steps])

    def resources(self, name: str) -> tuple[int, int]:
        """(registers of a thread, bytes of its spills and stack) of a kernel."""
        function = self.function(name)
        return function.attribute(_REGISTERS), function.attribute(_LOCAL_BYTES)

    def driver(self) -> str:
        """The driver's version, as its vendor writes it."""
        version = _hip.driver_version()
        if self.info.provider == "cuda":
            return f"CUDA {version // 1000}.{version % 1000 // 10}"
        return f"HIP {version // 10_000_000}.{version // 100_000 % 100}"


def counts() -> dict[str, int]:
    """Launches, graph launches, host synchronisations and bytes copied by this process so far."""
    return _hip.counts()
