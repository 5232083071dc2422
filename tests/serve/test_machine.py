"""/machine: where every expert is, and counters of which a watcher takes differences."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fomoe_io.kept.timeline import Timeline
from fomoe_io.serve import machine
from fomoe_io.serve.expert_map import ExpertMap
from tests.serve.conftest import Live


def test_it_tells_where_experts_are(live: Live) -> None:
    live.post("/completion", {"prompt": "The river", "n_predict": 4})
    live.wait_until_idle()
    found = live.get("/machine").json()
    engine = live.running.service.worker.engine
    assert engine is not None
    assert [layer["layer"] for layer in found["layers"]] == list(engine.shape.expert_layers)
    for layer in found["layers"]:
        assert len(layer["tiers"]) == len(layer["heat"]) == engine.shape.experts
        assert layer["tiers"].count("d") == layer["dram"] <= layer["slots"][1] and set(layer["tiers"]) <= set("vd.")
        assert "9" in layer["heat"]
    assert found["exact"] is True and found["car"] == "off" and found["lookahead"] in (False, True)
    assert found["at_work"] == 0 and found["prompt"] is None
    assert found["expert_requests"] == sum(found["hits"].values()) > 0


def test_counters_grow(live: Live) -> None:
    before = live.get("/machine").json()
    live.post("/completion", {"prompt": "The river was", "n_predict": 6, "cache_prompt": False})
    live.wait_until_idle()
    now = live.get("/machine").json()
    assert now["generated_tokens"] - before["generated_tokens"] == 5  # the last one is not read
    assert now["prompt_tokens"] > before["prompt_tokens"] and now["seconds"] > before["seconds"]


def test_the_map_is_kept_up_to_date_while_somebody_watches(live: Live, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "WATCH_SECONDS", 30.0)
    worker = live.running.service.worker
    live.get("/machine")
    maps = set()
    with live.http.stream("POST", "/completion", json={"prompt": "A", "n_predict": 400, "stream": True,
                                                       "ignore_eos": True}) as response:  # fmt: skip
        for _ in response.iter_lines():
            maps.add(id(worker.experts))
    assert len(maps) > 1
    worker.watched_until = 0.0
    live.wait_until_idle()
    with live.http.stream("POST", "/completion", json={"prompt": "A", "n_predict": 200, "stream": True,
                                                       "ignore_eos": True}) as response:  # fmt: skip
        seen = {id(worker.experts) for _ in response.iter_lines()}
    assert len(seen) <= 2  # before it, and at its end


def test_a_look_never_waits_for_the_engine(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is in the middle of a token, for as long as it takes."""
    is_at_work, may_go_on, decode = threading.Event(), threading.Event(), Timeline.decode

    def held(self: Timeline, token: int) -> np.ndarray:
        is_at_work.set()
        assert may_go_on.wait(60)
        return decode(self, token)

    monkeypatch.setattr(Timeline, "decode", held)
    with ThreadPoolExecutor(1) as other:
        answer = other.submit(live.post, "/completion", {"prompt": "A", "n_predict": 3, "ignore_eos": True})
        try:
            assert is_at_work.wait(60)
            assert [live.get("/machine").json()["at_work"] for _ in range(5)] == [1] * 5
        finally:
            may_go_on.set()
        assert answer.result().status_code == 200
    live.wait_until_idle()


def test_it_can_be_switched_off_and_asks_for_the_key(serve: Any, open_tiny: Any) -> None:
    assert serve(engine=open_tiny, has_metrics=False).get("/machine").status_code == 501
    assert serve(engine=open_tiny, api_keys=("secret",)).get("/machine").status_code == 401


def test_letters_and_digits() -> None:
    tiers = {3: np.array([0, 1, 2, 2], np.int8)}
    picks = {3: np.array([100, 25, 1, 0], np.int64)}
    (layer,) = ExpertMap(tiers, picks, ((0, 0),) * 3 + ((1, 1),)).document()
    assert layer == {"layer": 3, "slots": [1, 1], "vram": 1, "dram": 1, "tiers": "vd..", "heat": "9510"}
    (cold,) = ExpertMap(tiers, {3: np.zeros(4, np.int64)}, ((0, 0),) * 4).document()
    assert cold["heat"] == "0000"
