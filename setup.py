"""Build the native side: the C core, each file compiled once and only when it or a header it names has changed, and
the Cython extensions over it.  Everything else about the package is in pyproject.toml.

FOMOE_BUILD=debug compiles with asserts and without optimisation; FOMOE_BUILD=address or thread with that sanitizer.
FOMOE_STATIC_LIBURING=1 links liburing's archive, for wheels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))  # who runs this file need not be the backend
from build_backend import SHARED_UTILITIES, brings_c

CORE = Path("fomoe_io/csrc")
ARITHMETIC = ("math", "cpu")  # the folders whose loops are worth the compiler's time
# -ffp-contract=off keeps float results the same whichever instruction set a function is cloned for.
COMMON = ["-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=default", "-fPIC", "-pthread"]
COMMON += ["-Ifomoe_io", f"-I{CORE}"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]  # steps share one signature
BUILDS = {
    "release": ["-O3", "-DNDEBUG"],
    "debug": ["-O0", "-g"],
    "address": [
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
BUILD = os.environ.get("FOMOE_BUILD", "release")

SOURCES = {
    "_gate": [],
    "_uring": ["read/ring.c", "read/read_table.c"],
    "_pread": ["read/pread_pool.c", "read/read_table.c"],
    "_io_load": ["read/io_load.c", "read/mmap_reader.c", "read/paced_reader.c", "read/read_table.c"],
    "_hip": ["gpu/patience.c"],  # no HIP or CUDA header: the driver is found when the program runs
    "_blaslt": [],
    "_gpu": ["gpu/*.c", "experts/residency.c", "experts/expert_plan.c", "experts/offers.c", "experts/trace.c"],
    "_cpu": ["math/*.c", "cpu/*.c", "experts/*.c"],
}


def sources_of(extension: str) -> list[Path]:
    """The files of the core that an extension is linked with."""
    return [path for pattern in SOURCES.get(extension, []) for path in sorted(CORE.glob(pattern))]


def ask_pkg_config(*flags: str) -> list[str]:
    """What pkg-config says of liburing >= 2.3, or stop with the command that installs it."""
    found = shutil.which("pkg-config") and not subprocess.call(["pkg-config", "--atleast-version=2.3", "liburing"])
    if not found:
        sys.exit(
            "fomoe_io: liburing >= 2.3 was not found by pkg-config\n"
            "  fix: sudo apt-get install -y gcc pkg-config python3-dev liburing-dev"
            "      (Fedora: sudo dnf install gcc pkgconf python3-devel liburing-devel)"
        )
    return subprocess.check_output(["pkg-config", *flags, "liburing"], text=True).split()


class BuildNative(build_ext):
    """Compiles the core's files that are out of date, in parallel, and links each extension with its own."""

    def finalize_options(self) -> None:
        """As many compilers as processors, unless the command line says otherwise."""
        super().finalize_options()
        self.build_temp = f"build/glue-{BUILD}"
        self.parallel = self.parallel or len(os.sched_getaffinity(0))

    def build_extensions(self) -> None:
        """Every file that is out of date, in parallel; then the extensions are only linked."""
        self.objects = Path("build") / f"objects-{BUILD}"
        core = [path for name in SOURCES for path in sources_of(name)]
        glue = [Path(source) for extension in self.extensions for source in extension.sources]
        stale = sorted({path for path in core + glue if self.is_stale(path)}, key=self.cost, reverse=True)
        with ThreadPoolExecutor(self.parallel) as pool:
            list(pool.map(self.compile_one, stale))
        for extension in self.extensions:
            name = extension.name.removeprefix("fomoe_io.")
            parts = [*map(Path, extension.sources), *sources_of(name)]
            extension.extra_objects = extension.depends = [str(self.object_of(path)) for path in parts]
            extension.sources = []
        super().build_extensions()

    @staticmethod
    def cost(path: Path) -> tuple[bool, int]:
        """What takes longest is started first: the dot products, then the large files."""
        return path.name.startswith("instructions_"), path.stat().st_size

    def object_of(self, path: Path) -> Path:
        """Where a file's object lies."""
        return self.objects / path.with_suffix(".o")

    def is_stale(self, path: Path) -> bool:
        """Whether its object is older than the file, a header that it named, or this recipe."""
        target = self.object_of(path)
        recipe = target.with_suffix(".d")
        if not target.exists() or not recipe.exists():
            return True
        named = [Path(name) for name in recipe.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
        built = target.stat().st_mtime
        return any(not path.exists() or path.stat().st_mtime > built for path in [*named, Path("setup.py")])

    def compile_one(self, path: Path) -> None:
        """One file, with the list of the headers that it named."""
        target = self.object_of(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_relative_to(CORE):
            flags = [*GLUE_FLAGS, *(f"-I{d}" for d in self.include_dirs)]
        else:
            flags = ["-O2" if flag == "-O3" and path.parent.name not in ARITHMETIC else flag for flag in CORE_FLAGS]
        command = [*os.environ.get("CC", "gcc").split(), *COMMON, *flags, *LIBURING, "-MMD", "-c", str(path)]
        if subprocess.call([*command, "-o", str(target)]):
            sys.exit(f"fomoe_io: {path} could not be compiled")


def extension(name: str) -> Extension:
    """One of Cython's, and what it is linked with."""
    result = Extension(f"fomoe_io.{name}", [f"fomoe_io/{name}.pyx"], extra_link_args=["-pthread", "-lm", "-ldl"])
    result.extra_link_args += SANITIZERS
    if name == "_uring":
        is_static = os.environ.get("FOMOE_STATIC_LIBURING") == "1"
        result.extra_link_args += ["-l:liburing.a"] if is_static else ask_pkg_config("--libs")
    return result


SANITIZERS = [flag for flag in BUILDS[BUILD] if flag.startswith("-fsanitize")]
CORE_FLAGS = [*BUILDS[BUILD], *WARNINGS]
# Cython's glue is on no hot path: unoptimised, it is compiled in a quarter of the time, and a token takes no longer.
GLUE_FLAGS = [*(["-O0", "-g"] if BUILD == "debug" else ["-O1"] if SANITIZERS else ["-O0"]), *SANITIZERS]
LIBURING = [f'-DFOMOE_LIBURING_VERSION="{ask_pkg_config("--modversion")[0]}"', *ask_pkg_config("--cflags")]


def translated(extensions: list[Extension]) -> list[Extension]:
    """Cython's C, and one module of what several of them need of Cython; of an sdist that which it brings.

    cythonize() would make it anew, for what it includes of Cython's own is as young as Cython's installation.
    """
    shared = extension(SHARED_UTILITIES.stem)
    shared.sources = [str(SHARED_UTILITIES)]
    if brings_c():
        for each in extensions:
            each.sources = [str(Path(each.sources[0]).with_suffix(".c"))]
        return [*extensions, shared]
    import Cython  # not there where nothing is to be translated
    from Cython.Build import cythonize

    of_cython, target = Path(Cython.__file__).stat().st_mtime, SHARED_UTILITIES
    is_new = not target.exists() or target.stat().st_mtime < max(of_cython, Path("setup.py").stat().st_mtime)
    if is_new:
        subprocess.run([sys.executable, "-m", "cython", "--generate-shared", str(target)], check=True)
    directives = {"language_level": 3, "embedsignature": True, "show_performance_hints": False}
    directives["emit_code_comments"] = False  # a fifth of the lines
    made: list[Extension] = cythonize(
        extensions, compiler_directives=directives, force=is_new, shared_utility_qualified_name=shared.name
    )
    return [*made, shared]


setup(
    ext_modules=translated([extension(name) for name in SOURCES]),
    cmdclass={"build_ext": BuildNative},
)
