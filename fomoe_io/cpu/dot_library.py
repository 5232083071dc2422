"""Which dot-product kernels compute: ggml's prebuilt ones, or the portable C ones of this package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fomoe_io import _cpu
from fomoe_io.errors import UsageError

_used: str | None = None


def ggml_libraries() -> tuple[Path, Path] | None:
    """Paths of libggml-base.so and libggml-cpu.so of package libggml-python, None when it is not installed."""
    spec = importlib.util.find_spec("libggml")
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        for name in ("lib64", "lib"):
            base, cpu = (Path(folder, name, f"libggml-{part}.so") for part in ("base", "cpu"))
            if base.is_file() and cpu.is_file():
                return base, cpu
    return None


def use(choice: str) -> str:
    """Bind the kernels for this process.

    Parameters
    ----------
    choice : {"auto", "ggml", "portable"}

    Returns
    -------
    str
        "ggml" or "portable".

    Raises
    ------
    UsageError
        "ggml" was asked for and is not installed or does not load.
    """
    global _used
    libraries = ggml_libraries() if choice != "portable" else None
    if choice == "ggml" and libraries is None:
        raise UsageError("ggml's kernels are not installed", hint="pip install libggml-python")
    wanted = "portable" if libraries is None else "ggml"
    if _used != wanted:
        try:
            if libraries is None:
                _cpu.use_kernels(None, None)
            else:
                _cpu.use_kernels(*(bytes(path) for path in libraries))
        except OSError as error:
            if choice == "ggml":
                raise UsageError(f"ggml's kernels do not load: {error}", hint="pip install -U libggml-python") from None
            _cpu.use_kernels(None, None)
            wanted = "portable"
        _used = wanted
    return wanted
