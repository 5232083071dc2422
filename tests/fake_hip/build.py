"""Build the doubles of libamdhip64, libhiprtc and libhipblaslt, and put them where the package finds them."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fomoe_io import _hip
from tests.gpu_shim.cpu_kernels import KEPT, kept
from tests.gpu_shim.cpu_kernels import build as build_kernels

KINDS = ("buffers", "registrations", "streams", "events", "modules", "graphs", "blas")

_BUILT: list[Path] = []
"""The ROCM_PATH of this process: a device's library is bound once, as long as anything of it is alive."""


class Fake:
    """The double's own knobs."""

    def __init__(self, path: Path, rocm: Path | None = None) -> None:
        self.path, self.rocm = path, rocm or path
        self.library = ctypes.CDLL(str(self.rocm / "lib" / "libamdhip64.so"))
        self.library.fake_hip_live.restype = self.library.fake_hip_misuses.restype = ctypes.c_long

    def fail(self, call: str, code: int, after: int = 0) -> None:
        """The call after the next `after` ones returns code; code 0: none."""
        self.library.fake_hip_fail(call.encode(), after, code)

    def hang(self, call: str, after: int = 0) -> None:
        """The work of the call after the next `after` ones never ends; after < 0: none."""
        self.library.fake_hip_hang(call.encode(), after)

    def release(self) -> None:
        """End what hangs."""
        self.library.fake_hip_release()

    def lose(self, code: int = 719) -> None:
        """From now on every call fails; code 0: none."""
        self.library.fake_hip_lose(code)

    def new_queues(self) -> None:
        """Streams from now on share no hardware queue with those of before."""
        self.library.fake_hip_new_queues()

    def misuses(self) -> int:
        """How often something was done that a real driver may crash on."""
        return self.library.fake_hip_misuses()

    def live(self) -> dict[str, int]:
        """What has not been given back."""
        gc.collect()
        return {name: self.library.fake_hip_live(i) for i, name in enumerate(KINDS)}


PATIENCE_SECONDS = 60
"""A processor that plays the device beside a dozen busy processes is slow, and yet it does not hang."""


def begin_test() -> None:
    """What earlier tests have given up is not in the way of the next one."""
    if _BUILT and _BUILT[0].exists():
        Fake(_BUILT[0]).new_queues()


@contextmanager
def installed_fake(folder: Path, *, delay_us: int) -> Iterator[Fake]:
    """The double built in a folder, and the environment that makes it the ROCm of this process."""
    if not _BUILT or not _BUILT[0].exists():
        _BUILT[:] = [build(folder)]
    values = {
        "ROCM_PATH": str(_BUILT[0]),
        "FAKE_HIP_CODE": str(build_kernels(folder)),
        "FAKE_HIP_DELAY": str(delay_us),
        "FOMOE_CACHE": str(folder / "cache"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        _hip.set_patience(PATIENCE_SECONDS)
        yield Fake(folder, _BUILT[0])
        _hip.set_patience()


def build(folder: Path) -> Path:
    """A ROCM_PATH with all of them in its lib/; skips where there is no C compiler."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    command = ["gcc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"]
    sources = [Path(__file__).with_name(name) for name in ("fake_hip.c", "fake_hipblaslt.c")]
    hip = [*command, str(sources[0]), "-lpthread", "-ldl"]
    blas = [*command, "-mf16c", str(sources[1])]  # names the other by its whole path: it is built where it stays
    with kept("rocm", repr([hip, blas, KEPT]), sources) as (place, _):
        library, last = (place / "lib" / name for name in ("libamdhip64.so", "libhipblaslt.so"))
        if not last.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*hip, "-o", str(library)], check=True)
            shutil.copy(library, library.with_name("libhiprtc.so"))
            subprocess.run([*blas, str(library), "-o", str(folder / "blas.so")], check=True)
            shutil.move(folder / "blas.so", last)
    return place
