"""Which dot-product kernels compute: ggml's prebuilt ones, or the portable C ones of this package."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from fomoe_io._cpu import Kernels
from fomoe_io.errors import UsageError


def ggml_libraries() -> tuple[Path, Path] | None:
    """Paths of libggml-base.so and libggml-cpu.so of package libggml-python, None when it is not installed."""
    spec = importlib.util.find_spec("libggml")
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        for name in ("lib64", "lib"):
            base, cpu = (Path(folder, name, f"libggml-{part}.so") for part in ("base", "cpu"))
            if base.is_file() and cpu.is_file():
                return base, cpu
    return None


@cache
def _ggml(base: Path, cpu: Path) -> Kernels:
    return Kernels(bytes(base), bytes(cpu))


def open_kernels(choice: str) -> Kernels:
    """The kernels of an engine; another's of the same process may be others.

    Parameters
    ----------
    choice : {"auto", "ggml", "portable"}

    Returns
    -------
    Kernels
        Their `name` is "ggml" or "portable".

    Raises
    ------
    UsageError
        "ggml" was asked for and is not installed or does not load.
    """
    libraries = ggml_libraries() if choice != "portable" else None
    if choice == "ggml" and libraries is None:
        raise UsageError("ggml's kernels are not installed", hint="pip install libggml-python")
    if libraries is None:
        return Kernels()
    try:
        return _ggml(*libraries)
    except OSError as error:
        if choice == "ggml":
            raise UsageError(f"ggml's kernels do not load: {error}", hint="pip install -U libggml-python") from None
        return Kernels()
