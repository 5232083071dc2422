"""What is published: an sdist that builds, a wheel that brings liburing, an installation that starts.  Minutes."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(command: list[str], where: Path, **variables: str) -> str:
    """Its stdout; the tree that is tested is not on the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FOMOE_BUILD")} | variables
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel): the sdist from the tracked files alone, the wheel from the sdist, as `make dist` builds them."""
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("package")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.endswith(".gguf"):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(folder / "dist"), str(folder / "tree")]
    run(command, folder, FOMOE_STATIC_LIBURING="1")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def test_sdist_holds_what_it_is_built_from(published: tuple[Path, Path]) -> None:
    with tarfile.open(published[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    command = ["git", "ls-files", "fomoe_io", "layout_tool", "tools"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) <= names
    assert {"Makefile", "tests/conftest.py", "tests/fakes/fake_ring.c", "tests/gpu_shim/fibers.h"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_what_runs_and_no_more(published: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(published[1]) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert "fomoe_io/gpu/kernels/fomoe.hip" in names and "fomoe_io/py.typed" in names
    assert not [name for name in names if name.endswith((".c", ".pyx")) or name.startswith(("tests", "fomoe_io/csrc"))]
    (uring,) = (tmp_path / "fomoe_io").glob("_uring.*.so")
    needed = run(["readelf", "-d", str(uring)], tmp_path)
    assert "NEEDED" in needed and "liburing" not in needed


def test_wheel_installs_and_starts(published: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own, which borrows only the dependencies of this one."""
    run([sys.executable, "-m", "venv", "clean"], tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    run([str(python), "-m", "pip", "install", "-q", "--no-index", "--no-deps", str(published[1])], tmp_path)
    library = Path(run([str(python), "-c", "import site; print(site.getsitepackages()[0])"], tmp_path).strip())
    (library / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    shown = run([str(tmp_path / "clean" / "bin" / "fomoe-run"), "--version"], tmp_path)
    assert shown.startswith("fomoe-run ")
    modules = "_uring, _pread, _cpu, _gpu, _hip, _blaslt, _io_load"
    where = run([str(python), "-c", f"from fomoe_io import {modules}; print(_cpu.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(library)
