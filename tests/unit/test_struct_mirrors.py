"""Structs of the C core that Python writes by hand: the same fields at the same offsets, as a C compiler sees them.

Cython's declarations need no such test: it takes fields by name from the header itself.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fomoe_io import _io_load
from fomoe_io.experts import car, residency, slots
from fomoe_io.storage import reader
from fomoe_io.trace import simulator
from tests.fakes import ROOT

Fields = dict[str, tuple[int, int]]


def of_ctypes(mirror: type[ctypes.Structure]) -> tuple[Fields, int]:
    """Field -> (offset, size), and the whole size."""
    names = [field[0] for field in mirror._fields_]
    return {n: (getattr(mirror, n).offset, getattr(mirror, n).size) for n in names}, ctypes.sizeof(mirror)


def of_dtype(mirror: np.dtype[np.void]) -> tuple[Fields, int]:
    """The same of a numpy record."""
    assert mirror.fields is not None
    return {str(n): (int(f[1]), int(f[0].itemsize)) for n, f in mirror.fields.items()}, mirror.itemsize


MIRRORS = {
    "fomoe_read": ("read/reader.h", of_ctypes(reader._Read)),
    "fomoe_completion": ("read/reader.h", of_ctypes(reader._Completion)),
    "fomoe_reader": ("read/reader.h", of_ctypes(reader._Table)),
    "fomoe_planned_read": ("read/io_load.h", of_dtype(_io_load.PLAN)),
    "fomoe_extent": ("experts/expert_reads.h", of_dtype(slots.EXTENT)),
    "fomoe_placement": ("experts/residency.h", of_ctypes(residency.Placement)),
    "fomoe_car": ("experts/car.h", of_ctypes(car.NativeCar)),
    "fomoe_replay_layer": ("experts/replay.h", of_ctypes(simulator._Layer)),
}


@pytest.mark.parametrize("name", MIRRORS)
def test_mirror(name: str, tmp_path: Path) -> None:
    header, (fields, size) = MIRRORS[name]
    checks = [f'_Static_assert(sizeof({name}) == {size}, "size");']
    for field, (offset, width) in fields.items():
        checks.append(f'_Static_assert(offsetof({name}, {field}) == {offset}, "offset of {field}");')
        checks.append(f'_Static_assert(sizeof((({name} *)0)->{field}) == {width}, "size of {field}");')
    source = tmp_path / "mirror.c"
    source.write_text(f'#include <stddef.h>\n#include "{header}"\n' + "\n".join(checks) + "\n")
    command = ["gcc", "-std=gnu11", "-fsyntax-only", f"-I{ROOT}/fomoe_io/csrc", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def fields(text: str, pattern: str) -> list[str]:
    """Types and names of a struct's fields, as both languages spell them."""
    found = re.search(pattern, text, re.S)
    assert found is not None
    body = re.sub(r"/\*.*?\*/|//[^\n]*", "", found[1], flags=re.S)
    return re.sub(r"\bu(8|16|32|64)\b", r"uint\1_t", " ".join(body.split())).split(";")


def test_a_kernel_s_mirror() -> None:
    """The kernels' headers are none of C's: structs that the host fills are written twice."""
    kernels = (ROOT / "fomoe_io/gpu/kernels/tile.h").read_text()
    host = (ROOT / "fomoe_io/csrc/gpu/device_experts.h").read_text()
    mine, theirs = fields(kernels, r"struct tile {(.*?)}"), fields(host, r"typedef struct {([^}]*)} fomoe_tile;")
    assert mine == theirs and len(mine) == 3


def test_a_mirror_that_lies_is_found(tmp_path: Path) -> None:
    source = tmp_path / "mirror.c"
    source.write_text(
        '#include <stddef.h>\n#include "read/reader.h"\n_Static_assert(offsetof(fomoe_read, bytes) == 8, "x");\n'
    )
    command = ["gcc", "-std=gnu11", "-fsyntax-only", f"-I{ROOT}/fomoe_io/csrc", str(source)]
    assert subprocess.run(command, capture_output=True).returncode != 0
