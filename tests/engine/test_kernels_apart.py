"""Two engines of a process may compute with different kernels: neither sees the other's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io._cpu import Matrix, Program, Rows, Team
from fomoe_io.cpu import dot_library
from tests.tiny_model import Tiny, write_tiny

TOKENS = [7, 3, 250, 18, 42]

pytestmark = pytest.mark.skipif(dot_library.ggml_libraries() is None, reason="libggml-python is not installed")


def config(kernels: str) -> EngineConfig:
    return EngineConfig(kernels=kernels, threads=2, context_tokens=64)


def alone(path: Path, kernels: str) -> np.ndarray:
    with Engine.open(path, config(kernels)) as engine:
        return engine.session().evaluate(TOKENS)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_K])
def test_interleaved_engines_keep_their_bits(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    path = write_tiny(
        tmp_path / "tiny.gguf", Tiny("qwen3moe", head_columns=64, columns=256, hidden=256, weights=kind), 5
    )
    want = {name: alone(path, name) for name in ("ggml", "portable")}
    with Engine.open(path, config("ggml")) as first, Engine.open(path, config("portable")) as second:
        sessions = {"ggml": first.session(), "portable": second.session()}
        assert (first.kernels, second.kernels) == ("ggml", "portable")
        for i, token in enumerate(TOKENS):
            for name, session in sessions.items():
                np.testing.assert_array_equal(session.decode(token), want[name][i])


def test_a_type_that_the_other_kernels_lack_stays_known(tmp_path: Path) -> None:
    """The portable kernels know no Q4_0: opening an engine with them took the other's away."""
    other = write_tiny(tmp_path / "other.gguf", Tiny(columns=256, hidden=256), 1)
    kind = gguf.GGMLQuantizationType.Q4_0
    path = write_tiny(
        tmp_path / "tiny.gguf", Tiny("qwen3moe", head_columns=64, columns=256, hidden=256, weights=kind), 5
    )
    want = alone(path, "ggml")
    with Engine.open(path, config("ggml")) as engine, Engine.open(other, config("portable")):
        np.testing.assert_array_equal(engine.session().evaluate(TOKENS), want)


def test_a_program_refuses_weights_of_other_kernels() -> None:
    mine, others = dot_library.open_kernels("portable"), dot_library.open_kernels("ggml")
    weights = np.zeros((4, 8), np.float32)
    matrix = Matrix(others, weights.ctypes.data, 0, 4, 8, False, weights)
    program = Program(Team(1), mine, 64)
    x, y = Rows(mine, 8, 1), Rows(mine, 4, 1)
    with pytest.raises(ValueError, match="other kernels"):
        program.mat_mul([(matrix, x, y, False)])
    with pytest.raises(ValueError, match="other kernels"):
        program.embed(matrix, x, -1, 0)
