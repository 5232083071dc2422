"""Mutated files and templates by the hundred: each is refused in one printable line or runs; nothing crashes or hangs.

`make sanitize` runs them under AddressSanitizer and UBSan.  FOMOE_FUZZ_FIRST and FOMOE_FUZZ_SCALE choose other
seeds and more of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.driver import explore
from tests.fuzz.gguf_image import Image
from tests.fuzz.mutate_gguf import bases

INPUTS = {"gguf": 1000, "manifest": 500, "profile": 250, "trace": 300, "template": 250}
"""Of each kind; `ran` and `refused` must both occur, or the mutators are too tame or too wild."""


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", INPUTS)
def test_mutated(kind: str) -> None:
    first, scale = int(os.environ.get("FOMOE_FUZZ_FIRST", "0")), float(os.environ.get("FOMOE_FUZZ_SCALE", "1"))
    found = explore(kind, first, round(INPUTS[kind] * scale))
    print(f"{kind}: {found}")
    assert not found.faults, f"{kind}: {found}"
    assert found.outcomes["ran"] and found.outcomes["refused"], str(found)


def test_an_image_is_written_as_it_was_read(tmp_path: Path) -> None:
    """Or the mutators would test something else."""
    for image in bases(tmp_path):
        raw = image.write()
        (tmp_path / "again.gguf").write_bytes(raw)
        again = Image.read(tmp_path / "again.gguf")
        assert again == image
        image.lay_out()
        assert image.write() == raw
