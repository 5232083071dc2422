"""Several requests at once: answers are those of a lonely client, and an expert is read once for all of them."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fomoe_io import Engine, EngineConfig, Tiers
from fomoe_io.kept.timeline import read_all
from fomoe_io.serve import worker
from fomoe_io.serve.seats import Seat, rounds
from tests.serve.conftest import Live
from tests.serve.test_queue import request, slot, wait_for
from tests.tiny_model import Tiny, write_tiny

PROMPTS = ("It was a dark and", "The river", "She said that", "There was never a house of")
COUNT = 32
STREAMS = 4
CONFIG = EngineConfig(
    context_tokens=512, batch_tokens=32, threads=2, tiers=Tiers(0, 0.125), cache_bytes=None, sessions=STREAMS,
    lookahead="off",
)  # fmt: skip


def body(prompt: Any, **how: Any) -> dict[str, Any]:
    return {"prompt": prompt, "n_predict": COUNT, "ignore_eos": True, **how}


def expert_bytes(live: Live, prompts: Sequence[str], at_once: int) -> tuple[list[str], float]:
    """(answers, bytes of experts from the drive a token), of answers whose prompts cost next to nothing."""
    before = live.metric("fomoe_nvme_read_bytes_total")
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda prompt: live.post("/completion", body(prompt)).json(), prompts))
    live.wait_until_idle()
    read = live.metric("fomoe_nvme_read_bytes_total") - before
    return [answer["content"] for answer in found], read / (COUNT * len(prompts))


@pytest.fixture(scope="module")
def open_limited(demo_model: Path) -> Callable[..., Engine]:
    """An eighth of the experts in memory: less than four tokens need of a layer."""
    return lambda **how: Engine.open(demo_model, dataclasses.replace(CONFIG, **how))


def test_four_streams_against_one(serve: Any, open_limited: Callable[..., Engine]) -> None:
    live = serve(engine=open_limited, parallel=STREAMS)
    assert len(live.get("/slots").json()) == STREAMS and live.get("/props").json()["total_slots"] == STREAMS
    want, alone = expert_bytes(live, PROMPTS, 1)
    found, together = expert_bytes(live, PROMPTS, STREAMS)
    assert found == want
    assert together < 0.92 * alone, (together, alone)


def test_prompts_that_are_read_together(open_limited: Callable[..., Engine]) -> None:
    """As alone, checkpoints in their places among it; in a third of the bytes."""
    prompts = [[(seed * 37 + i * 11) % 900 + 50 for i in range(48)] for seed in range(STREAMS)]
    with open_limited(cache_bytes="64M", batch_tokens=256) as engine:
        first = engine.timeline()
        timelines = [first, *(engine.timeline(beside=first) for _ in prompts[1:])]
        found, read = {}, {}
        for how in ("alone", "together"):
            engine.reset_statistics()
            for timeline, prompt in zip(timelines, prompts, strict=True):
                timeline.begin(prompt, turn=20, reuse=False)
            parts = list(zip(timelines, prompts, strict=True))
            rows = read_all(parts) if how == "together" else [timeline.read(prompt) for timeline, prompt in parts]
            found[how] = [row.tobytes() for row in rows]
            read[how] = engine.statistics()["tiers"]["nvme"]["bytes"]
            assert [timeline.tokens.tolist() for timeline in timelines] == prompts
            for timeline, prompt in parts:
                assert timeline.kept.find(array("i", prompt), 47).position == 44  # type: ignore[union-attr]
                timeline.erase()
    assert found["together"] == found["alone"]
    assert read["together"] < 0.5 * read["alone"], read


def test_conversations_in_turn_keep_a_session_each(serve: Any, open_limited: Callable[..., Engine]) -> None:
    """Nothing is kept beside the sessions."""
    live = serve(engine=lambda: open_limited(cache_bytes=0), parallel=2)
    histories = [[50 + i for i in range(60)], [90 - i for i in range(80)]]
    for turn in range(3):
        for history in histories:
            answer = live.post("/completion", body(history, n_predict=4, return_tokens=True)).json()
            known = answer["timings"]["cache_n"]
            assert known == 0 if turn == 0 else known >= len(history) - 5
            history += [*answer["tokens"], 60 + turn]


@pytest.mark.parametrize("architecture", ["qwen35moe", "qwen3moe"])
def test_a_beginning_that_another_session_has(serve: Any, tmp_path: Path, architecture: str) -> None:
    """A system text that is read in one session is not read in the next, also while the first is at work."""
    shape = Tiny(architecture=architecture, shared_hidden=32 if architecture == "qwen35moe" else 0)
    path = write_tiny(tmp_path / "tiny.gguf", shape, 3)
    config = EngineConfig(context_tokens=4096, batch_tokens=64, threads=1, sessions=2, cache_bytes="16M")
    live = serve(engine=lambda: Engine.open(path, config), parallel=2)
    common = [50 + i % 190 for i in range(1024)]
    want = live.post("/completion", body([*common, 7, 8, 9], cache_prompt=False)).json()["content"]
    live.post("/slots/0?action=erase")
    with request(live, body(common, n_predict=-1, stream=True)):
        wait_for(lambda: slot(live)["n_decoded"] >= 2 or live.get("/slots").json()[1]["n_decoded"] >= 2)
        answer = live.post("/completion", body([*common, 7, 8, 9])).json()
        assert answer["timings"]["cache_n"] >= 1020
        assert any(found["is_processing"] for found in live.get("/slots").json())
    assert answer["content"] == want


def test_one_that_leaves_does_not_end_the_others(
    serve: Any, open_limited: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.0)
    live = serve(engine=open_limited, parallel=2)
    want = live.post("/completion", body(PROMPTS[0], n_predict=100)).json()["content"]
    with ThreadPoolExecutor(1) as pool:
        with request(live, body(PROMPTS[1], n_predict=-1, stream=True)):
            wait_for(lambda: max(found["n_decoded"] for found in live.get("/slots").json()) >= 2)
            staying = pool.submit(lambda: live.post("/completion", body(PROMPTS[0], n_predict=100)).json())
            wait_for(lambda: all(found["is_processing"] for found in live.get("/slots").json()))
        assert staying.result(60)["content"] == want
    assert live.metric('fomoe_requests_total{outcome="cancelled"}') == 1
    assert live.post("/completion", body(PROMPTS[1])).status_code == 200


def test_a_slot_that_is_at_work_is_left_alone(serve: Any, open_limited: Callable[..., Engine], tmp_path: Path) -> None:
    live = serve(engine=open_limited, parallel=2, slot_folder=tmp_path)
    assert live.post("/slots/2?action=erase").json()["error"]["message"] == "there is no slot 2: there are 0 to 1"
    with request(live, body(PROMPTS[1], n_predict=-1, stream=True)):
        wait_for(lambda: any(found["n_decoded"] >= 2 for found in live.get("/slots").json()))
        busy = next(i for i, found in enumerate(live.get("/slots").json()) if found["is_processing"])
        response = live.post(f"/slots/{busy}?action=erase")
        assert response.status_code == 503 and "is at work" in response.text
        assert live.post(f"/slots/{1 - busy}?action=erase").json() == {"id_slot": 1 - busy, "n_erased": 0}
        assert live.get("/slots").json()[busy]["is_processing"]


def test_who_is_read_with_whom() -> None:
    def seat(step: Any) -> Seat:
        found = object.__new__(Seat)
        found.step = step
        return found

    long, short, first, second = seat([1, 2]), seat([3]), seat(7), seat(8)
    assert rounds([long, first, short, second]) == [[long, short], [first, second]]
    assert rounds([first]) == [[first]] and rounds([long]) == [[long]]


def test_more_than_the_engine_has_sessions_for(open_limited: Callable[..., Engine]) -> None:
    from fomoe_io.errors import BudgetError
    from fomoe_io.serve.server import Running
    from fomoe_io.serve.settings import ServeConfig

    with pytest.raises(BudgetError, match="memory for 1 session"):
        Running(ServeConfig(port=0, parallel=2), lambda: open_limited(sessions=1)).run()
