"""The kernels built for the CPU (every GPU thread a fiber), and a runner that launches them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fomoe_io.gpu import kernels

SHIM = Path(__file__).resolve().parent
PAGE = mmap.PAGESIZE
KEPT = SHIM.parent.parent / "build" / "tests"
"""What is compiled serves later runs, and the other processes of this one."""


def build(folder: Path) -> Path:
    """Compile the kernels with g++ into ``folder``; skips where that is impossible."""
    if platform.machine() != "x86_64":
        pytest.skip("the fiber switch is written for x86-64")
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    library = folder / "libkernels.so"
    source = Path(kernels.__file__).parent
    command = ["g++", "-x", "c++", "-DFOMOE_GPU_ON_CPU", f"-I{SHIM}", f"-I{source}", "-O2", "-std=c++17", "-mavx2"]
    command += ["-mfma", "-mf16c", "-fvisibility=hidden", "-shared", "-fPIC", str(source / kernels.MAIN_SOURCE)]
    with kept("kernels", repr(command), [*SHIM.glob("*.h"), *source.iterdir()]) as (place, is_built):
        if not is_built:
            subprocess.run([*command, "-o", str(library)], check=True)
            shutil.move(library, place)
    shutil.copy(place, library)
    return library


@contextmanager
def kept(name: str, how: str, sources: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Where what is built so from these sources lies, and whether it does; nobody else builds meanwhile."""
    digest = hashlib.sha256(how.encode())
    for path in sorted(sources):
        digest.update(path.read_bytes() if path.is_file() else b"")
    place = KEPT / f"{name}-{digest.hexdigest()[:16]}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_built = place.exists()
        yield place, is_built
        for old in KEPT.glob(f"{name}-*") if not is_built else ():
            if old != place:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


class Buffer:
    """Memory that ends at a page nobody may touch, so that reading past the end is a crash, not a wrong number."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.ascontiguousarray(array)
        room = -(-self.array.nbytes // PAGE) * PAGE
        self._map = mmap.mmap(-1, room + PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(PAGE), 0) == 0
        self.pointer = base + (room - self.array.nbytes) // 16 * 16
        ctypes.memmove(self.pointer, self.array.ctypes.data, self.array.nbytes)

    def get(self) -> np.ndarray:
        """The present contents."""
        result = np.empty_like(self.array)
        ctypes.memmove(result.ctypes.data, self.pointer, result.nbytes)
        return result


class CpuRunner:
    """Launches kernels of the CPU build; same interface as the runner of the GPU tests."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.table = kernels.kernels()

    def put(self, array: np.ndarray) -> Buffer:
        """Copy an array to where kernels can reach it."""
        return Buffer(array)

    def launch(self, name: str, grid: Sequence[int], *arguments: object) -> None:
        """Run a kernel to its end.  Arguments: Buffer or None for pointers, numbers for the rest."""
        c_types = {"p": ctypes.c_void_p, "q": ctypes.c_uint64, "i": ctypes.c_int32, "f": ctypes.c_float}
        signature = self.table[name].signature
        assert len(signature) == len(arguments), name
        values = [
            c_types[code](a.pointer if isinstance(a, Buffer) else a)
            for code, a in zip(signature, arguments, strict=True)
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        getattr(self.library, f"{name}__launch")(addresses, *(int(g) for g in grid))
