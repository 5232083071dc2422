"""Build the Cython extensions.  Everything else about the package is in pyproject.toml."""

import shutil
import subprocess
import sys
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

# -ffp-contract=off keeps float results the same whichever instruction set a function is cloned for.
COMPILE_FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=default"]


def liburing_flags() -> dict[str, list[str]]:
    """Ask pkg-config for liburing >= 2.3, or stop with the command that installs it."""
    found = shutil.which("pkg-config") and not subprocess.call(["pkg-config", "--atleast-version=2.3", "liburing"])
    if not found:
        sys.exit(
            "fomoe_io: liburing >= 2.3 was not found by pkg-config\n"
            "  fix: sudo apt-get install -y gcc pkg-config python3-dev liburing-dev"
            "      (Fedora: sudo dnf install gcc pkgconf python3-devel liburing-devel)"
        )

    def ask(flag: str) -> list[str]:
        return subprocess.check_output(["pkg-config", flag, "liburing"], text=True).split()

    return {
        "define_macros": [("FOMOE_LIBURING_VERSION", f'"{ask("--modversion")[0]}"')],
        "extra_compile_args": COMPILE_FLAGS + ask("--cflags"),
        "extra_link_args": ask("--libs"),
    }


HEADERS = [*glob("fomoe_io/csrc/*.h"), "fomoe_io/kernels/car_rule.h"]

EXTENSIONS = [
    Extension(
        "fomoe_io._uring",
        ["fomoe_io/_uring.pyx", "fomoe_io/csrc/ring.c", "fomoe_io/csrc/read_table.c"],
        depends=HEADERS,
        **liburing_flags(),
    ),
    Extension(
        "fomoe_io._pread",
        ["fomoe_io/_pread.pyx", "fomoe_io/csrc/pread_pool.c", "fomoe_io/csrc/read_table.c"],
        depends=HEADERS,
        extra_compile_args=[*COMPILE_FLAGS, "-pthread"],
        extra_link_args=["-pthread"],
    ),
    Extension(
        "fomoe_io._io_load",
        ["fomoe_io/_io_load.pyx", "fomoe_io/csrc/io_load.c", "fomoe_io/csrc/mmap_reader.c"],
        depends=HEADERS,
        extra_compile_args=COMPILE_FLAGS,
    ),
    # No HIP or CUDA header: the driver is found when the program runs.
    Extension("fomoe_io._hip", ["fomoe_io/_hip.pyx"], extra_compile_args=COMPILE_FLAGS, extra_link_args=["-ldl"]),
    Extension("fomoe_io._blaslt", ["fomoe_io/_blaslt.pyx"], extra_compile_args=COMPILE_FLAGS),
    Extension(
        "fomoe_io._gpu",
        [
            "fomoe_io/_gpu.pyx",
            "fomoe_io/csrc/device_batch.c",
            "fomoe_io/csrc/device_copies.c",
            "fomoe_io/csrc/device_experts.c",
            "fomoe_io/csrc/device_fetch.c",
            "fomoe_io/csrc/residency.c",
        ],
        depends=HEADERS,
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=["-lm"],
    ),
    Extension(
        "fomoe_io._cpu",
        [
            "fomoe_io/_cpu.pyx",
            "fomoe_io/csrc/dot.c",
            "fomoe_io/csrc/instructions.c",
            "fomoe_io/csrc/instructions_baseline.c",
            "fomoe_io/csrc/instructions_avx2.c",
            "fomoe_io/csrc/instructions_avx512.c",
            "fomoe_io/csrc/vector_ops.c",
            "fomoe_io/csrc/attention.c",
            "fomoe_io/csrc/residency.c",
            "fomoe_io/csrc/replay.c",
            "fomoe_io/csrc/routing.c",
            "fomoe_io/csrc/threads.c",
            "fomoe_io/csrc/trace.c",
            "fomoe_io/csrc/program.c",
            "fomoe_io/csrc/experts.c",
            "fomoe_io/csrc/experts_compute.c",
            "fomoe_io/csrc/car.c",
            "fomoe_io/csrc/decision.c",
            "fomoe_io/csrc/offers.c",
        ],
        depends=HEADERS,
        extra_compile_args=[*COMPILE_FLAGS, "-pthread"],
        extra_link_args=["-pthread", "-lm", "-ldl"],
    ),
]

setup(ext_modules=cythonize(EXTENSIONS, compiler_directives={"language_level": 3, "embedsignature": True}))
