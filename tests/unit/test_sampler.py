"""The sampler: a model's own wishes, penalties, and a vocabulary that is never sorted as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fomoe_io.errors import FormatError, UsageError
from fomoe_io.text.sampler import Sampler, SamplingConfig, unbuilt_samplers


def test_what_a_model_asks_for() -> None:
    """general.sampling.* as llama.cpp takes it: under what the user chose, over the defaults."""
    metadata = {
        "general.sampling.temp": np.float32(0.6).item(), "general.sampling.top_k": 20, "general.sampling.top_p": 0.9,
        "general.sampling.min_p": 0.0, "general.sampling.penalty_last_n": -1, "general.sampling.penalty_repeat": 1.05,
    }  # fmt: skip
    found = SamplingConfig.of_model(metadata, top_k=7, seed=3)
    assert found == SamplingConfig(0.6, 7, 0.9, 0.0, 1.05, -1, seed=3)
    assert SamplingConfig.of_model({}) == SamplingConfig()
    assert SamplingConfig.of_model({"general.sampling.top_k": -1}).top_k == 0
    with pytest.raises(FormatError, match=r"general\.sampling\.temp"):
        SamplingConfig.of_model({"general.sampling.temp": "hot"})
    asked = {"general.sampling.mirostat": 2, "general.sampling.xtc_probability": 0.0}
    assert unbuilt_samplers(asked) == ["general.sampling.mirostat"]


@pytest.mark.parametrize(
    "bad", [{"seed": -1}, {"seed": 1.5}, {"temperature": "hot"}, {"top_p": 2}, {"repeat_last": -2}]
)
def test_what_is_wrong_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SamplingConfig(**bad)


def test_penalties_are_llama_cpps() -> None:
    logits = np.array([1.0, -1.0, 2.0, 0.5], np.float32)
    sampler = Sampler(
        SamplingConfig(temperature=0, repeat_penalty=2, presence_penalty=0.25, frequency_penalty=0.5, repeat_last=4)
    )
    sampler.accept_prompt([3, 0, 0, 1])
    assert np.allclose(sampler._penalised(logits), [0.5 - 0.25 - 1.0, -2.0 - 0.75, 2.0, 0.25 - 0.75])
    sampler.accept_prompt(list(range(4)) * 3)
    assert list(sampler._recent) == [0, 1, 2, 3]
    whole = Sampler(SamplingConfig(repeat_last=-1))
    whole.accept_prompt(list(range(4)) * 3)
    assert len(whole._recent) == 12
    none = Sampler(SamplingConfig(repeat_last=0))
    none.accept_prompt([1, 2])
    assert not none._recent


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_nothing_is_lost_without_top_k(top_p: float, min_p: float, spread: float) -> None:
    """The tokens that are kept are those of a whole sort."""
    logits = (np.random.default_rng(0).standard_normal(50_000) * spread).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits[order].astype(np.float64) - logits[order[0]])
    keep = len(order) if top_p >= 1 else int(np.searchsorted(np.cumsum(weights / weights.sum()), top_p)) + 1
    if min_p > 0:
        keep = min(keep, int(np.count_nonzero(weights >= min_p)))
    ids, scores = Sampler(SamplingConfig(top_k=0, top_p=top_p, min_p=min_p))._filtered(logits)
    assert set(ids.tolist()) == set(order[:keep].tolist()) and np.array_equal(scores, logits[ids])


def test_a_seed_repeats_and_is_known() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    one = Sampler(SamplingConfig())
    drawn = [one.sample(logits) for _ in range(20)]
    assert drawn == [Sampler(SamplingConfig(seed=one.seed)).sample(logits), *drawn[1:]]
    again = Sampler(SamplingConfig(seed=one.seed))
    assert [again.sample(logits) for _ in range(20)] == drawn
    seed = one.seed
    one.reset()
    assert one.seed != seed
