"""setuptools' build backend, which asks for Cython only where the C that Cython makes is missing.

An sdist brings that C, and an installation from it would spend a tenth of its processor's time on fetching and
unpacking Cython for nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

CYTHON = "Cython>=3.1,<4"
SHARED_UTILITIES = Path("fomoe_io/_cyutility.c")
"""Cython's memory views and the like, which would be compiled once for each extension otherwise."""


def brings_c() -> bool:
    """Whether this is an sdist with the C of its .pyx files, none older than what it was made of."""
    folder = Path("fomoe_io")
    made = [path.with_suffix(".c") for path in folder.glob("*.pyx")]
    youngest = max(path.stat().st_mtime for kind in ("pyx", "pxd", "pxi") for path in folder.glob(f"*.{kind}"))
    made.append(SHARED_UTILITIES)
    return Path("PKG-INFO").exists() and all(c.exists() and c.stat().st_mtime >= youngest for c in made)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Beside `build-system.requires`."""
    return [] if brings_c() else [CYTHON]


get_requires_for_build_sdist = get_requires_for_build_editable = get_requires_for_build_wheel
