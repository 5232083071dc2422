"""bench/make_model.py: a model whose next router is guessed as often as was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"


@pytest.mark.parametrize(("law", "recall"), [("normal:0.5", 0.8), ("normal:2.5", 0.85)])
def test_recall_is_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, law: str, recall: float) -> None:
    """Whatever the popularity, at every layer; and once more, byte by byte."""
    monkeypatch.syspath_prepend(str(BENCH))
    make_model = pytest.importorskip("make_model")
    small = make_model.Preset(
        columns=512, heads=4, experts=48, used=4, hidden=256, value_heads=4, layers=9, vocabulary=512, kv_heads=2,
        head_columns=64, key_heads=2, state_columns=128,
    )  # fmt: skip
    path, again = tmp_path / "model.gguf", tmp_path / "again.gguf"
    make_model.make(path, small, small.layers, law, recall, seed=2)
    found = make_model.measured_recall(path)
    assert np.mean(found) == pytest.approx(recall, abs=0.03), found
    assert found == pytest.approx([recall] * 8, abs=0.08)
    make_model.make(again, small, small.layers, law, recall, seed=2)
    assert again.read_bytes() == path.read_bytes()


def test_layers_turn_a_stream_as_far_as_gains_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own angle each, with sublayers of any output; routers' picks then agree as often as was asked for."""
    monkeypatch.syspath_prepend(str(BENCH))
    recall = pytest.importorskip("lookahead_recall")
    random, columns, used = np.random.default_rng(1), 4097, 8
    shares = random.dirichlet(np.ones(256))
    turns = np.array([recall.turn_for(x, shares, used) for x in (0.9, 0.8, 0.85, 0.7, 0.8, 0.9)])
    assert turns[0] < turns[2] < turns[1] < turns[3] and turns[1] == turns[4]

    mixers, experts = np.array([0.6, 0.6, 0.6, 0.2]), np.full(4, 0.3)
    stream = recall.stream_for(turns, recall.Embedding(9.0, 0.0), mixers, experts)
    x, outputs = 9.0 * random.standard_normal((48, columns)), []
    for layer in range(6):
        for gain, output in ((stream.mixers, mixers), (stream.experts, experts)):
            x = x + gain[layer] * output[layer % 4] * random.standard_normal(x.shape)
        outputs.append(x)
    found, _ = recall.turned(np.stack(outputs))
    assert np.sqrt(found) == pytest.approx(turns[1:], rel=0.03)

    router = random.standard_normal((columns, 256)) * recall.ROUTER_NOISE
    logits = [y / np.sqrt((y * y).sum(1, keepdims=True)) @ router + np.log(shares) for y in outputs[2:4]]
    assert recall.common(*logits, used) == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(("preset", "recall"), [("gpt-oss-120b-a5b", 0.85), ("35b-a3b", 0.1)])
def test_what_no_gains_reach_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, recall: float
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    make_model = pytest.importorskip("make_model")
    with pytest.raises(SystemExit, match="recall"):
        make_model.make(tmp_path / "model.gguf", make_model.PRESETS[preset], 40, "normal:0.5", recall, seed=2)
    assert not list(tmp_path.iterdir())


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
