"""Build the double of libamdhip64 and libhiprtc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def build(folder: Path) -> Path:
    """A ROCM_PATH with both libraries in its lib/; skips where there is no C compiler."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    (folder / "lib").mkdir()
    library = folder / "lib" / "libamdhip64.so"
    source = Path(__file__).parent / "fake_hip.c"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", str(source), "-o", str(library)]
    subprocess.run([*command, "-lpthread", "-ldl"], check=True)
    shutil.copy(library, folder / "lib" / "libhiprtc.so")
    return folder
