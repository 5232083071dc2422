"""The kernels compile for every target, without a GPU, and nothing spills."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fomoe_io import _hip
from fomoe_io.errors import DeviceError
from fomoe_io.gpu import compiler, kernels

AMD = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1200", "gfx1201")


def clang() -> str:
    found = next((path for v in ("19", "20", "21", "22") if (path := shutil.which(f"clang++-{v}"))), None)
    if found is None:
        pytest.skip("clang 19 is not installed (apt-get install clang-19 lld-19)")
    return found


# one of each kind of wave is compiled every time, of 64 lanes and of 32: each takes 20 s
OTHERS = ("gfx942", "gfx1030", "gfx1100", "gfx1200")


@pytest.mark.parametrize("architecture", [pytest.param(a, marks=pytest.mark.slow) if a in OTHERS else a for a in AMD])
def test_amd_code_object(architecture: str, tmp_path: Path) -> None:
    output = tmp_path / "kernels.co"
    subprocess.run(compiler.clang_command(clang(), architecture, output), check=True)
    reader = shutil.which("llvm-readelf-19") or shutil.which("llvm-readelf")
    if reader is None:
        pytest.skip("compiled; llvm-readelf is not installed, so spills cannot be read")
    notes = subprocess.run([reader, "--notes", str(output)], check=True, capture_output=True, text=True).stdout
    assert set(kernels.kernels()) <= set(re.findall(r"\.name: +(\w+)\n", notes))
    for kind in ("sgpr", "vgpr"):
        spills = re.findall(rf"\.{kind}_spill_count: +(\d+)", notes)
        assert len(spills) == len(kernels.kernels())
        assert set(spills) == {"0"}
    assert set(re.findall(r"\.private_segment_fixed_size: +(\d+)", notes)) == {"0"}


def test_amd_code_object_with_packages_alone(tmp_path: Path) -> None:
    """The ziglang wheel carries a clang with AMD targets: no apt needed."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed (pip install ziglang)")
    source = Path(kernels.__file__).parent / kernels.MAIN_SOURCE
    zig = [sys.executable, "-m", "ziglang"]
    assembly, objects, linked = (tmp_path / name for name in ("k.s", "k.o", "k.co"))
    target = ["-mcode-object-version=5"]
    flags = ["-x", "hip", "--cuda-device-only", "--offload-arch=gfx1100", "-nogpulib", "-nogpuinc", "-O3", "-std=c++17"]
    subprocess.run([*zig, "clang", *flags, *target, "-S", str(source), "-o", str(assembly)], check=True)
    machine = ["-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1100"]
    subprocess.run([*zig, "clang", *machine, *target, "-c", str(assembly), "-o", str(objects)], check=True)
    subprocess.run([*zig, "ld.lld", "-shared", str(objects), "-o", str(linked)], check=True)
    assert linked.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("architecture", "tuning"),
    [("sm_80", {}), ("sm_90", {}), pytest.param("sm_90", {"PREFETCH_BYTES": 8192}, marks=pytest.mark.slow)],
)
def test_cuda_cubin(architecture: str, tuning: dict[str, int]) -> None:
    try:
        compiler.open_compiler("cuda")
    except DeviceError as problem:
        pytest.skip(problem.message)
    files = kernels.sources()
    headers = {name: text for name, text in files.items() if name != kernels.MAIN_SOURCE}
    flags = [*compiler.options(architecture, tuning), "--ptxas-options=-v"]
    image, log = _hip.compile_source(
        files[kernels.MAIN_SOURCE].encode(),
        kernels.MAIN_SOURCE.encode(),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
        [flag.encode() for flag in flags],
    )
    assert image is not None, log
    assert image[:4] == b"\x7fELF"
    assert len(re.findall(r"Compiling entry function", log)) == len(kernels.kernels())
    stores = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(stores) >= len(kernels.kernels())
    assert set(stores) == {("0", "0", "0")}


def test_run_time_compilation_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        compiler.open_compiler("cuda")
    except DeviceError as problem:
        pytest.skip(problem.message)
    monkeypatch.setenv("FOMOE_CACHE", str(tmp_path))
    image = compiler.compile_kernels("sm_90")
    (cached,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(_hip, "compile_source", lambda *a: pytest.fail("compiled again"))
        assert compiler.compile_kernels("sm_90") == image
    cached.write_bytes(b"not what was written")
    assert compiler.compile_kernels("sm_90") == image


def test_a_wrong_architecture_is_one_line() -> None:
    try:
        compiler.open_compiler("cuda")
    except DeviceError as problem:
        pytest.skip(problem.message)
    with pytest.raises(DeviceError, match="the kernels do not compile for sm_12: ") as caught:
        compiler.compile_kernels("sm_12")
    assert "\n" not in caught.value.message
