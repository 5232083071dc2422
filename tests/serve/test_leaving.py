"""Who leaves in the middle of a long batch frees the engine within it, and what was read before it stays read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fomoe_io import Engine, EngineConfig
from fomoe_io.serve import worker
from tests.serve.test_queue import request, slot, wait_for
from tests.tiny_model import Tiny, write_tiny

BATCH = 64
PROMPT = {"prompt": [50 + i % 199 for i in range(2 * BATCH)], "n_predict": 4, "ignore_eos": True}
BATCH_SECONDS = 0.5
"""What one takes at least from a drive of 4 ms a read, one after the other."""


def opens(folder: Path, architecture: str, **how: Any) -> Callable[[], Engine]:
    """Opens a model, most of whose experts are on the drive."""
    shape = Tiny(architecture=architecture, layers=8, experts=16, used=2)
    path = write_tiny(folder / f"{architecture}.gguf", shape, 1)
    config = EngineConfig(context_tokens=512, batch_tokens=BATCH, threads=1, slots=4, cache_bytes=None, **how)
    return lambda: Engine.open(path, config)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.1)


@pytest.mark.parametrize("architecture", ["qwen3moe", "qwen35moe"])
def test_a_long_batch(serve: Any, impatient: None, tmp_path: Path, architecture: str) -> None:
    want = serve(engine=opens(tmp_path, architecture)).post("/completion", PROMPT).json()["content"]
    live = serve(engine=opens(tmp_path, architecture, ring_depth=1, pace="1G,4ms"), piece_tokens=BATCH)
    started = time.monotonic()
    with request(live, PROMPT):
        wait_for(lambda: slot(live)["n_prompt_tokens_processed"] == BATCH)
        assert time.monotonic() - started > BATCH_SECONDS
        time.sleep(0.2)  # well within the second batch
    assert live.wait_until_idle() < 1
    assert slot(live)["n_prompt_tokens_processed"] == BATCH
    assert live.metric('fomoe_requests_total{outcome="cancelled"}') == 1
    again = live.post("/completion", PROMPT).json()
    assert again["timings"]["cache_n"] == BATCH and again["content"] == want


def test_the_end_of_the_server(serve: Any, impatient: None, tmp_path: Path) -> None:
    live = serve(engine=opens(tmp_path, "qwen35moe", ring_depth=1, pace="1G,10ms"))
    answers: list[httpx.Response] = []
    client = threading.Thread(target=lambda: answers.append(live.post("/completion", PROMPT)))
    client.start()
    wait_for(lambda: slot(live)["is_processing"])
    started = time.monotonic()
    live.running.service.close()
    live.running.service.worker.join(10)
    client.join(10)
    assert time.monotonic() - started < 2
    assert answers[0].status_code == 503 and answers[0].json()["error"]["message"] == "the server is shutting down"
