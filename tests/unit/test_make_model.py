"""bench/make_model.py: a model whose next router is guessed about as often as was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig

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


@pytest.mark.parametrize("preset", ["next-80b-a3b", "m2-230b-a10b", "glm-air-106b-a12b", "gpt-oss-120b-a5b"])
def test_every_family_is_a_model_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """With rows that K types do not divide, and experts of which some are popular."""
    monkeypatch.syspath_prepend(str(BENCH))
    make_model = pytest.importorskip("make_model")
    p = make_model.PRESETS[preset]
    small = make_model.replace(p, columns=512, hidden=160, experts=24, heads=8, vocabulary=512, dense_hidden=416)
    path = tmp_path / "model.gguf"
    make_model.make(path, small, 5, "normal:1.5", None, seed=2)
    with Engine.open(path, EngineConfig(context_tokens=64)) as engine:
        session = engine.session()
        logits = session.evaluate(np.arange(40) + 100, record=("experts",))
        picks = session.records["experts"][small.dense_layers :]
    assert np.isfinite(logits).all() and logits.std() > 0
    counts = np.sort(np.bincount(picks[0].ravel(), minlength=24))[::-1]
    assert counts[:3].sum() > 1.5 * picks[0].size * 3 / 24 and len(np.unique(picks)) > 12
