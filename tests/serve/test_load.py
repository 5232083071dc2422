"""Many clients, some of which leave at any moment: every answer is that which a lonely one gets, and nothing leaks."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.test_command import Process, command, url_of

TEXTS = ["The river was", "It was a dark and stormy night", "She said that", "In the year 1850", "A house of stone"]


def work_of(number: int) -> dict[str, Any]:
    """The request with this number, always the same."""
    dice = random.Random(number)
    words = " ".join(dice.choice(TEXTS) for _ in range(dice.randint(1, 12)))
    return {"prompt": words, "n_predict": dice.randint(1, 24), "n_probs": dice.choice([0, 0, 3])}


class Crowd:
    """Clients that ask, and leave when the dice say so."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers: dict[int, str] = {}
        self.left = 0
        self._lock = threading.Lock()

    def ask(self, number: int) -> None:
        """A request of its own connection."""
        dice = random.Random(1000 + number)
        leaves_after = dice.choice([None, None, 0.0, 0.05, 0.3])
        body = {**work_of(number), "stream": dice.random() < 0.6}
        timeout = httpx.Timeout(120, read=leaves_after if leaves_after else 120)
        with httpx.Client(base_url=self._url, timeout=timeout, trust_env=False, verify=False) as client:
            try:
                text = self._streamed(client, body, leaves_after) if body["stream"] else self._whole(client, body)
            except httpx.ReadTimeout:
                text = None
        with self._lock:
            if text is None:
                self.left += 1
            else:
                self.answers[number] = text

    def _whole(self, client: httpx.Client, body: dict[str, Any]) -> str:
        response = client.post("/completion", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["content"])

    def _streamed(self, client: httpx.Client, body: dict[str, Any], leaves_after: float | None) -> str | None:
        started, text = time.monotonic(), ""
        with client.stream("POST", "/completion", json=body) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if leaves_after is not None and time.monotonic() - started >= leaves_after:
                    return None
                if line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    text += chunk["content"]
                    if chunk["stop"]:
                        return text
        raise AssertionError("the stream ended without its end")


class Watched:
    """A server in a process of its own, and what it holds."""

    def __init__(self, process: Process, requests: int, clients: int) -> None:
        self._requests, self._clients = requests, clients
        self._folder = Path("/proc") / str(process.process.pid)
        self.http = httpx.Client(base_url=url_of(process), timeout=60, trust_env=False, verify=False)

    def metric(self, name: str) -> float:
        """One value of /metrics."""
        lines = dict(line.rsplit(" ", 1) for line in self.http.get("/metrics").text.splitlines() if line[0] != "#")
        return float(lines[name])

    def wait_until_idle(self) -> None:
        """All requests are over, also those whose clients have left."""
        started = time.monotonic()
        while self.metric("llamacpp:requests_processing") + self.metric("llamacpp:requests_deferred"):
            assert time.monotonic() - started < 30, "the engine is held"
            time.sleep(0.05)
        time.sleep(0.5)  # connections that are closing

    def held(self) -> tuple[int, int]:
        """Descriptors and threads."""
        return len(list((self._folder / "fd").iterdir())), len(list((self._folder / "task").iterdir()))

    def resident_bytes(self) -> int:
        """Memory."""
        return int((self._folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def round(self) -> Crowd:
        """All requests, by the crowd."""
        crowd = Crowd(str(self.http.base_url))
        with ThreadPoolExecutor(self._clients) as pool:
            for done in [pool.submit(crowd.ask, number) for number in range(self._requests)]:
                done.result()
        self.wait_until_idle()
        return crowd


def crowd(model: Path, folder: Path, requests: int, clients: int, rounds: int, *more: str) -> None:
    """Sessions are kept in memory and on the drive meanwhile: neither may change an answer, or leak."""
    kept = ("--cache-ram", "64M", "--cache-disk", "20M")
    flags = ("--temp", "0", "-c", "512", "--queue", str(requests), "--no-profile", *kept, *more)
    with command(str(model), *flags, cache=folder) as process:
        server = Watched(process, requests, clients)
        fresh = [server.http.post("/completion", json={**work_of(n), "cache_prompt": False}) for n in range(requests)]
        want = [response.json()["content"] for response in fresh]
        server.round()  # threads, arenas and caches that stay
        before, memory = server.held(), server.resident_bytes()
        for _ in range(rounds):
            found = server.round()
            assert found.left and len(found.answers) + found.left == requests
            assert {number: want[number] for number in found.answers} == found.answers
        assert server.held() == before
        assert server.resident_bytes() < memory + (4 << 20)
        assert server.metric('fomoe_requests_total{outcome="failed"}') == 0
        assert server.metric("fomoe_prompt_tokens_cached_total") > 0
        server.http.close()
        code, said = process.end(signal.SIGTERM)
        assert code == 0 and "note" not in said


@pytest.mark.slow  # the one at once does all that this does
@pytest.mark.timeout(300)
def test_a_small_crowd(demo_model: Path, tmp_path: Path) -> None:
    crowd(demo_model, tmp_path, 24, 8, 1)


@pytest.mark.timeout(300)
def test_a_small_crowd_at_once(demo_model: Path, tmp_path: Path) -> None:
    crowd(demo_model, tmp_path, 12, 8, 1, "-np", "3")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_crowd(demo_model: Path, tmp_path: Path) -> None:
    crowd(demo_model, tmp_path, 200, 32, 2)
