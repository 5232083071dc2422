"""The whole engine on a real device, against llama.cpp's vectors and itself.  Run with -m gpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine, EngineConfig, device
from fomoe_io.config import Tiers
from fomoe_io.errors import DeviceError
from tests.test_oracle import MODELS, divergence, log_sum_exp, nmse

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    try:
        device.find_provider("auto")
    except DeviceError as problem:
        pytest.skip(problem.message)


def open_engine(path: Path, **settings: Any) -> Engine:
    return Engine.open(path, EngineConfig(**({"device": "auto", "context_tokens": 1024} | settings)))


@pytest.mark.parametrize("name", ["nano-f32.gguf", "nano-fused-f32.gguf", "nano-00001-of-00003.gguf"])
def test_float_models_equal_llama_cpp(shared: Path, name: str) -> None:
    reference = np.load(shared / "reference/fixtures/nano-f32-ref.npz")
    with open_engine(shared / "reference/fixtures" / name, context_tokens=64) as engine:
        session = engine.session()
        batch = session.evaluate(reference["tokens"])
        session.reset()
        steps = np.stack([session.decode(int(token)).copy() for token in reference["tokens"]])
    assert nmse(batch, reference["logits_batch"]) < 1e-9
    np.testing.assert_array_equal(batch, steps)


@pytest.mark.parametrize("name", list(MODELS))
def test_trained_models_within_the_rounding_of_activations(shared: Path, name: str) -> None:
    """Activations are rounded to 8 bits in blocks of 32 (llama.cpp's CPU: 256), so the distance from its float
    activations must not exceed its own quantized run's; summed over three texts as tests/test_oracle.py does."""
    model = next((p for p in (shared / "models" / MODELS[name], ROOT / "models" / MODELS[name]) if p.exists()), None)
    if model is None:
        pytest.skip(f"{MODELS[name]} is not here")
    v = np.load(shared / f"reference/{name}-vectors.npz")
    noise = json.loads((shared / "reference/noise.json").read_text())[name]
    measured = {"median": 0.0, "kl": 0.0}
    allowed = dict(measured)
    with open_engine(model) as engine:
        session = engine.session()
        for i in (1, 2, 3):
            session.reset()
            logits = session.evaluate(v[f"t{i}_ids"])
            ids = v[f"t{i}_f32act_top20_ids"].astype(np.int64)
            found = np.take_along_axis(logits, ids, 1)
            measured["median"] += float(np.median(np.abs(found - v[f"t{i}_f32act_top20_logits"])))
            top, lse = v[f"t{i}_f32act_top20_logits"], v[f"t{i}_f32act_lse"]
            measured["kl"] += float(divergence(logits, ids, top, lse).mean())
            own = noise[f"text{i}"]["f32_activations_prefill"]
            allowed["median"] += own["abs_diff_median"]
            allowed["kl"] += own["kl_mean"]
    assert np.isfinite(log_sum_exp(logits)).all()
    for key, value in measured.items():
        assert value <= allowed[key], (measured, allowed)


def test_bits_do_not_depend_on_memory() -> None:
    model = ROOT / "models" / MODELS["S"]
    tokens = np.random.default_rng(4).integers(0, 8192, 48)
    results = []
    for settings in ({}, {"tiers": Tiers(0.4, 0.3)}, {"tiers": Tiers(0.13, 0.0)}, {"tiers": Tiers(0.13, 0.2)},
                     {"tiers": Tiers(0.3, 0.3), "reader": "pread"}, {"batch_tokens": 1}):  # fmt: skip
        with open_engine(model, **settings) as engine:
            results.append(engine.session().evaluate(tokens))
            s = engine.statistics()
            assert s["device"] != "cpu"
            assert s["device_calls"]["host_syncs"] == s["device_calls"]["graph_launches"]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_an_all_hit_layer_never_meets_the_host() -> None:
    with open_engine(ROOT / "models" / MODELS["S"]) as engine:
        session = engine.session()
        for token in range(5, 25):
            session.decode(token)
        s = engine.statistics()
    assert s["layers_served"] == {"all": 20 * 8, "with_misses": 0}
    assert s["device_calls"]["host_syncs"] == 20
    assert s["link"]["up_bytes"] == 0
