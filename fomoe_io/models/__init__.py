"""One small file an architecture; `shape_of` reads the metadata, `build` records the equations."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fomoe_io.errors import FormatError
from fomoe_io.models import qwen3moe, qwen35moe

ARCHITECTURES: dict[str, ModuleType] = {"qwen35moe": qwen35moe, "qwen3moe": qwen3moe}


def model_of(metadata: Mapping[str, Any]) -> ModuleType:
    """The module of a model's architecture.

    Raises
    ------
    FormatError
        When the architecture is missing or not supported.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise FormatError(
            f"architecture {name!r} is not supported; this version runs {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]
