"""Compile the GPU kernels: at run time with hipRTC or NVRTC into a cache on disk, ahead of time with clang."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from fomoe_io import _hip
from fomoe_io.errors import DeviceError
from fomoe_io.gpu import kernels
from fomoe_io.system.files import cache_folder, write_atomically

DIGEST_BYTES = hashlib.sha256().digest_size


def rocm_libraries(name: str) -> list[str]:
    """Where a ROCm library may lie, most particular first: ``$ROCM_PATH``, ``/opt/rocm``, the system's search path."""
    folders = [os.environ.get("ROCM_PATH"), os.environ.get("ROCM_HOME"), "/opt/rocm"]
    found = [path for folder in folders if folder for path in sorted(glob.glob(f"{folder}/lib/{name}.so*"))[:1]]
    return [*found, f"{name}.so", f"{name}.so.7", f"{name}.so.6", f"{name}.so.5"]


def open_compiler(provider: str) -> tuple[int, int]:
    """Find the run-time compiler of a provider.

    Parameters
    ----------
    provider : {"hip-python", "hip", "cuda"}

    Returns
    -------
    (major, minor) version of the compiler

    Raises
    ------
    DeviceError
        No compiler was found.
    """
    if provider == "hip-python":
        library = _hip.open_capsules(["rocm.bindings.cyhiprtc", "hip.chiprtc"])
    elif provider == "hip":
        # A distribution's runtime may carry hipRTC inside libamdhip64 itself.
        library = _hip.open_library(rocm_libraries("libhiprtc") + rocm_libraries("libamdhip64"))
    else:
        library = _open_nvrtc()
    _hip.use_compiler_library(provider, library)
    return _hip.compiler_version()


def _open_nvrtc() -> _hip.Library:
    """NVRTC from the pip wheel, from ``$CUDA_HOME``, or from the system."""
    site = sysconfig.get_paths()["purelib"]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [*sorted(glob.glob(f"{site}/nvidia/*/lib")), f"{home}/lib64"]
    paths = [path for folder in folders for path in sorted(glob.glob(f"{folder}/libnvrtc.so.*"))]
    if paths:
        # NVRTC opens its second library by bare name, which the loader knows once it has been opened by path.
        builtins = glob.glob(f"{Path(paths[0]).parent}/libnvrtc-builtins.so.*")
        if builtins:
            _hip.open_library(sorted(builtins), is_global=True)
    try:
        return _hip.open_library([*paths, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"])
    except DeviceError as problem:
        raise DeviceError(
            f"NVRTC, which compiles the kernels, was not found ({problem.message})",
            hint="pip install 'fomoe_io[cuda]'",
        ) from None


def options(architecture: str, tuning: Mapping[str, int] | None = None) -> list[str]:
    """Options for the run-time compiler: architecture is ``gfx...`` or ``sm_...``."""
    if architecture.startswith("gfx"):
        flags = [f"--offload-arch={architecture}", "-std=c++17", "-O3"]
    else:
        # 177: an inline function of the prelude that this unit does not use
        flags = [f"--gpu-architecture={architecture}", "--std=c++17", "-diag-suppress=177"]
    return flags + [f"-D{name}={value}" for name, value in sorted((tuning or {}).items())]


def compile_kernels(architecture: str, tuning: Mapping[str, int] | None = None) -> bytes:
    """The kernels' code object for an architecture, from the cache or by the compiler that ``open_compiler`` found.

    Parameters
    ----------
    architecture : str
        ``gfx90a:sramecc+:xnack-`` and the like, or ``sm_90``.
    tuning : mapping, optional
        Overrides of ``gpu/kernels/tuning.h``.

    Raises
    ------
    DeviceError
        The compiler refused the source; the message carries the first line that says why.
    """
    files = kernels.sources()
    flags = options(architecture, tuning)
    major, minor = _hip.compiler_version()
    key = hashlib.sha256(repr((sorted(files.items()), flags, _hip.compiler_provider, major, minor)).encode())
    place = cache_folder() / f"kernels-{architecture.split(':')[0]}-{key.hexdigest()[:32]}.bin"
    if (image := _read_cached(place)) is not None:
        return image
    headers = {name: text for name, text in files.items() if name != kernels.MAIN_SOURCE}
    image, log = _hip.compile_source(
        files[kernels.MAIN_SOURCE].encode(),
        kernels.MAIN_SOURCE.encode(),
        [text.encode() for text in headers.values()],
        [name.encode() for name in headers],
        [flag.encode() for flag in flags],
    )
    if image is None:
        wrong = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines() or ["no log"]
        raise DeviceError(f"the kernels do not compile for {architecture}: {wrong[0].strip()}")
    _write_cached(place, image)
    return image


def _read_cached(place: Path) -> bytes | None:
    """The code object, or None when it is not there or was damaged."""
    try:
        data = place.read_bytes()
    except OSError:
        return None
    digest, image = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return image if hashlib.sha256(image).digest() == digest else None


def _write_cached(place: Path, image: bytes) -> None:
    """Best effort: a cache that cannot be written costs a compilation at every start, nothing else."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, hashlib.sha256(image).digest() + image)
    except OSError:
        return


def clang_command(clang: str, architecture: str, output: Path) -> list[str]:
    """The command that makes an AMD code object without ROCm or a GPU (clang 19 or newer, with lld).

    Code object version 5 is what ROCm 5.7 and newer load; clang 20 and newer would write 6.
    """
    source = Path(kernels.__file__).parent / kernels.MAIN_SOURCE
    flags = ["-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", f"--offload-arch={architecture}"]
    flags += ["-nogpulib", "-nogpuinc", "-mcode-object-version=5", "-O3", "-std=c++17"]
    return [clang, *flags, str(source), "-o", str(output)]
