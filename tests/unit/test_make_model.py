"""bench/make_model.py: a model whose next router is guessed about as often as was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"


@pytest.mark.parametrize("recall", [0.8])
def test_recall_is_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recall: float) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    make_model = pytest.importorskip("make_model")
    small = make_model.Preset(
        columns=512, heads=4, experts=48, used=4, hidden=256, value_heads=4, layers=6, vocabulary=512, kv_heads=2,
        head_columns=64, key_heads=2, state_columns=128,
    )  # fmt: skip
    path = tmp_path / "model.gguf"
    make_model.make(path, small, small.layers, "normal:0.5", recall, seed=2)
    found = make_model.measured_recall(path)
    assert np.mean(found) == pytest.approx(recall, abs=0.06), found
