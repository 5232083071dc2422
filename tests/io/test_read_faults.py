"""Short, interrupted and failing reads: right bytes or a clear error, never wrong text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

READS = """
import json, sys, numpy as np
from fomoe_io.errors import ReadError
from fomoe_io.storage.reader import aligned_memory, open_reader
path, engine = sys.argv[1:]
data = np.fromfile(path, np.uint8)
random = np.random.default_rng(2)
memory = aligned_memory(200 * 65536)
with open_reader([path], engine=engine, depth=16) as reader:
    requests, places = [], random.integers(0, len(data) // 4096 - 16, 200)
    for i, place in enumerate(places):
        requests.append((0, int(place) * 4096, memory.address + i * 65536, 65536))
    message, wrong = "", 0
    try:
        reader.read_into(requests)
        found = np.frombuffer(memory.view, np.uint8)
        for i, p in enumerate(places):
            wrong += not np.array_equal(found[i * 65536 :][:65536], data[p * 4096 :][:65536])
    except ReadError as error:
        message = str(error)
    counters = {k: v for k, v in reader.counters.items() if k != "depths"}
    print(json.dumps({"message": message, "wrong": wrong, "in_flight_after": len(reader.reap()), **counters}))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the package was built with a compiler"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", str(ROOT / "tests/fault_shim.c"), "-o", str(library), "-ldl"], check=True
    )
    return library


def with_fault(shim: Path, fault: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_PRELOAD": str(shim), "FAULT": fault, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("engine", ["uring", "pread"])
@pytest.mark.parametrize(("fault", "counter"), [("short", "short_reads"), ("eintr", "retries"), ("eagain", "retries")])
def test_survived(shim: Path, demo_model: Path, engine: str, fault: str, counter: str) -> None:
    result = with_fault(shim, fault, "-c", READS, str(demo_model), engine)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["message"], values["wrong"], values["in_flight_after"]) == ("", 0, 0)
    assert values[counter] > 0 and values["errors"] == 0


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_reported(shim: Path, demo_model: Path, engine: str) -> None:
    result = with_fault(shim, "eio", "-c", READS, str(demo_model), engine)
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert f"{demo_model} at offset " in values["message"] and "Input/output error" in values["message"]
    assert values["in_flight_after"] == 0 and values["errors"] > 0


GENERATE = ("-m", "fomoe_io.cli.run", "-n", "30", "--temp", "0", "-c", "128", "--tiers", "vram=0%,dram=20%", "-p", "A")


@pytest.mark.parametrize("engine", ["uring", "pread"])
def test_text_under_faults(shim: Path, demo_model: Path, engine: str) -> None:
    """The whole program: the same text, or one line that names the expert and the file."""
    command = (*GENERATE, str(demo_model), "--reader", engine)
    sane = with_fault(shim, "none", *command)
    assert sane.returncode == 0 and len(sane.stdout) > 40
    for fault in ("short", "eintr", "eagain"):
        assert with_fault(shim, fault, *command).stdout == sane.stdout
    broken = with_fault(shim, "eio", *command)
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
    assert "Input/output error" in broken.stderr and str(demo_model) in broken.stderr
