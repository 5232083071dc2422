"""Typed reading of metadata: a value of another type is refused in one line, whatever it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fomoe_io.errors import FormatError
from fomoe_io.storage.gguf import read_metadata
from fomoe_io.storage.metadata import Metadata

VALUES: dict[str, Any] = {
    "integer": 5,
    "negative": -1,
    "number": 0.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "text": "line\x1b[31m\nline",
    "flag": True,
    "integers": [1, 2, 3],
    "numbers": [0.5, 1.5],
    "not finite": [0.5, float("nan")],
    "flags": [True, False],
    "texts": ["a", "b"],
    "huge": [1 << 70],
    "empty": [],
    "long text": "x" * 1000,
}

ACCESSORS: dict[str, tuple[Callable[[Metadata, str], Any], set[str]]] = {
    "integer": (lambda m, key: m.integer(key), {"integer"}),
    "number": (lambda m, key: m.number(key), {"integer", "negative", "number"}),
    "text": (lambda m, key: m.text(key), {"text", "long text"}),
    "flag": (lambda m, key: m.flag(key), {"flag"}),
    "integers": (lambda m, key: m.integers(key), {"integers", "empty"}),
    "numbers": (lambda m, key: m.numbers(key), {"integers", "numbers", "empty"}),
    "flags": (lambda m, key: m.flags(key), {"flags", "empty"}),
    "texts": (lambda m, key: m.texts(key), {"texts", "empty"}),
    "length": (
        lambda m, key: m.length(key),
        {"integers", "numbers", "not finite", "flags", "texts", "huge", "empty", "absent"},
    ),
}


@pytest.mark.parametrize("accessor", ACCESSORS)
def test_each_accessor_takes_its_type_alone(accessor: str) -> None:
    metadata = Metadata(VALUES)
    read, taken = ACCESSORS[accessor]
    for key in [*VALUES, "absent"]:
        if key in taken:
            read(metadata, key)
            continue
        with pytest.raises(FormatError) as caught:
            read(metadata, key)
        assert key in caught.value.message and len(caught.value.message) < 200
        assert caught.value.message.isprintable()


def test_no_module_reads_a_value_without_its_type() -> None:
    """keys.py and sampler.py compare values of any type with those that they know."""
    bare = re.compile(r"metadata(\.get\(|\[)")
    root = Path(__file__).resolve().parents[2]
    found = [path for folder in ("fomoe_io", "layout_tool") for path in (root / folder).rglob("*.py")]
    offenders = {path.name for path in found if bare.search(path.read_text())}
    assert offenders <= {"keys.py", "sampler.py"}


def test_bounds_defaults_and_lengths() -> None:
    metadata = Metadata(VALUES)
    assert metadata.integer("absent", 7) == 7 and metadata.text("absent", None) is None
    assert metadata.integers("integers", length=3).tolist() == [1, 2, 3]
    for refused in (
        lambda: metadata.integer("integer", least=6),
        lambda: metadata.integer("integer", most=4),
        lambda: metadata.number("number", least=1),
        lambda: metadata.number("number", most=0.25),
        lambda: metadata.texts("texts", length=3),
        lambda: metadata.flags("flags", None, length=1),
    ):
        with pytest.raises(FormatError, match="expected"):
            refused()


def test_large_arrays_are_typed_too(tmp_path: Path) -> None:
    """They stay in the file until somebody asks; a wrong type is refused without reading them."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_array("words", [f"word {i}" for i in range(2000)])
    writer.add_array("counts", list(range(2000)))
    writer.add_array("flags", [i % 2 == 0 for i in range(2000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_metadata(tmp_path / "m.gguf")
    assert metadata.texts("words")[1999] == "word 1999"
    assert metadata.integers("counts", length=2000).dtype == np.int64
    assert metadata.flags("flags").sum() == 1000
    for accessor, key in ((metadata.integers, "words"), (metadata.texts, "counts"), (metadata.text, "words")):
        with pytest.raises(FormatError, match=r"array of 2,000|list of"):
            accessor(key)
