"""Test doubles of the storage side, compiled when they are first used."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomoe_io.storage.read_files import ReadFiles

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def compile_library(output: Path, sources: Sequence[Path], *flags: str) -> Path:
    """A shared library of C files."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the package was built with a compiler"
    command = [
        compiler,
        "-O1",
        "-g",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        *map(str, sources),
        "-o",
        str(output),
        *flags,
    ]
    subprocess.run(command, check=True)
    return output


@dataclass(frozen=True)
class Faults:
    """Shares of a drive's answers that are short, interrupted or refused; a range of one file that cannot be read."""

    seed: int = 1
    short: float = 0.0
    interrupted: float = 0.0
    refused: float = 0.0
    bad_file: int = -1
    bad_offset: int = 0
    bad_bytes: int = 1 << 62


class _Faults(ctypes.Structure):
    _fields_ = (
        ("short_share", ctypes.c_double),
        ("interrupted_share", ctypes.c_double),
        ("refused_share", ctypes.c_double),
        ("bad_offset", ctypes.c_uint64),
        ("bad_bytes", ctypes.c_uint64),
        ("bad_file", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
    )


class _Table(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("self", "submit", "reap", "promote", "cancel", "wait"))


class _Counters(ctypes.Structure):
    """csrc/read/read_table.h, fomoe_read_counters."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("reads", "sub_reads", "bytes", "short_reads", "retries", "cancelled",
                                               "errors", "failovers", "error_offset")),
        ("error_file", ctypes.c_int32),
        ("error_code", ctypes.c_int32),
    )  # fmt: skip


class FakeRing:
    """The face of `UringReader` over tests/fakes/fake_ring.c.

    Parameters
    ----------
    library : ctypes.CDLL
    paths : sequence of Path
    drives : sequence of int, optional
        Of each file; all on drive 0 when left out.
    page_time : sequence of float
        Of each drive, on the fake's clock.
    mirrors : mapping of int to int, optional
    """

    name = "fake"
    mode = "fake"
    buffers_registered = False
    registration_error = ""

    def __init__(
        self,
        library: ctypes.CDLL,
        paths: Sequence[Path],
        *,
        faults: Faults,
        depth: int = 8,
        sub_read_bytes: int = 0,
        drives: Sequence[int] | None = None,
        page_time: Sequence[float] = (1.0,),
        mirrors: Mapping[int, int] | None = None,
    ) -> None:
        self.files = ReadFiles(paths, direct=False, mirrors=mirrors)
        count = len(paths)
        self.files.drives = list(drives or [0] * count)
        self.files.drive_count = len(page_time)
        self._library = library
        self._table = _Table()
        self._handle = library.fake_ring_new(
            count,
            (ctypes.c_int * count)(*self.files.descriptors),
            (ctypes.c_uint64 * count)(*self.files.sizes),
            (ctypes.c_int32 * count)(*self.files.drives),
            (ctypes.c_int32 * count)(*self.files.mirrors),
            len(page_time),
            (ctypes.c_double * len(page_time))(*page_time),
            depth,
            sub_read_bytes,
            ctypes.byref(
                _Faults(faults.short, faults.interrupted, faults.refused, faults.bad_offset, faults.bad_bytes,
                        faults.bad_file, faults.seed)
            ),
            ctypes.byref(self._table),
        )  # fmt: skip

    @property
    def address(self) -> int:
        return ctypes.addressof(self._table)

    @property
    def clock(self) -> float:
        return float(self._library.fake_ring_clock(self._handle))

    @property
    def _count(self) -> Any:
        return self._library.fake_ring_count(self._handle).contents

    @property
    def counters(self) -> dict[str, Any]:
        return {name: getattr(self._count, name) for name, _ in _Counters._fields_}

    @property
    def last_error(self) -> str:
        c = self._count
        return self.files.describe_error(c.error_file, c.error_offset, c.error_code) if c.errors else ""

    @property
    def last_fix(self) -> str:
        c = self._count
        return self.files.mend_error(c.error_file, c.error_offset, c.error_code) if c.errors else ""

    def register_buffers(self, address: int, size: int) -> bool:
        return False

    def close(self) -> None:
        if self._handle:
            self._library.fake_ring_free(self._handle)
            self._handle = None


def load_fake_ring(folder: Path) -> ctypes.CDLL:
    """Compile and load the fake."""
    sources = [HERE / "fake_ring.c", ROOT / "fomoe_io/csrc/read/read_table.c"]
    library = ctypes.CDLL(os.fspath(compile_library(folder / "fake_ring.so", sources)))
    library.fake_ring_new.restype = ctypes.c_void_p
    library.fake_ring_new.argtypes = [
        ctypes.c_int, *[ctypes.c_void_p] * 4, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    library.fake_ring_free.argtypes = [ctypes.c_void_p]
    library.fake_ring_free.restype = None
    library.fake_ring_clock.argtypes = [ctypes.c_void_p]
    library.fake_ring_clock.restype = ctypes.c_double
    library.fake_ring_count.argtypes = [ctypes.c_void_p]
    library.fake_ring_count.restype = ctypes.POINTER(_Counters)
    return library
