"""First come, first served; who leaves frees the engine, and who stalls does not hold it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fomoe_io import Engine
from fomoe_io.errors import BudgetError, FormatError, ReadError
from fomoe_io.kept.timeline import Timeline
from fomoe_io.serve.generate import PATIENCE_PIECES, PieceSize
from tests.serve.conftest import CONTEXT, Live

LONG = {"prompt": "It was a dark and", "n_predict": -1, "ignore_eos": True}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of ten tokens a second, prompts of a hundred."""
    decode, read = Timeline.decode, Timeline.read

    def slow_decode(self: Timeline, token: int) -> np.ndarray:
        time.sleep(0.1)
        return decode(self, token)

    def slow_read(self: Timeline, tokens: Any) -> np.ndarray:
        time.sleep(0.01 * len(tokens))
        return read(self, tokens)

    monkeypatch.setattr(Timeline, "decode", slow_decode)
    monkeypatch.setattr(Timeline, "read", slow_read)


@contextlib.contextmanager
def request(live: Live, document: dict[str, Any], path: str = "/completion") -> Iterator[socket.socket]:
    """A request on a socket of its own, which is closed in the end without reading the answer."""
    host, port = live.url.removeprefix("http://").rsplit(":", 1)
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head + body)
        yield connection


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.005)


def slot(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = live.get("/slots").json()[0]
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(slow: None, serve: Any, stream: bool) -> None:
    live = serve()
    with request(live, {**LONG, "stream": stream}):
        wait_for(lambda: slot(live)["n_decoded"] >= 2)
    assert live.wait_until_idle() < 2
    assert live.metric('fomoe_requests_total{outcome="cancelled"}') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_during_its_prompt(slow: None, serve: Any, stream: bool) -> None:
    live = serve()
    with request(live, {"prompt": [50] * (CONTEXT - 1), "n_predict": 1, "stream": stream}):
        wait_for(lambda: slot(live)["n_prompt_tokens_processed"] >= 32)
    assert live.wait_until_idle() < 2
    assert slot(live)["n_prompt_tokens_processed"] < CONTEXT - 1


def test_a_client_that_leaves_the_queue(slow: None, serve: Any) -> None:
    live = serve()
    with request(live, LONG):
        wait_for(lambda: slot(live)["is_processing"])
        with request(live, LONG), request(live, {**LONG, "stream": True}):
            wait_for(lambda: slot(live)["n_waiting"] == 2)
        wait_for(lambda: slot(live)["n_waiting"] == 0, 2)
        assert slot(live)["is_processing"]
    live.wait_until_idle()
    assert live.metric('fomoe_requests_total{outcome="cancelled"}') == 3


def test_first_come_first_served(slow: None, serve: Any) -> None:
    live = serve()
    order: list[int] = []

    def ask(number: int) -> None:
        assert live.post("/completion", {"prompt": f"a {number}", "n_predict": 2}).status_code == 200
        order.append(number)

    with ThreadPoolExecutor(4) as pool, request(live, LONG):
        wait_for(lambda: slot(live)["is_processing"])
        for number in range(4):
            pool.submit(ask, number)
            wait_for(lambda: len(live.running.service.queue) == number + 1)  # noqa: B023
    assert order == [0, 1, 2, 3]


def test_a_full_queue(slow: None, serve: Any) -> None:
    live = serve(queue_requests=1)
    with request(live, LONG):
        wait_for(lambda: slot(live)["is_processing"])
        with request(live, LONG):
            wait_for(lambda: slot(live)["n_waiting"] == 1)
            for path, body in {
                "/completion": {**LONG, "stream": True},
                "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "stream": True},
            }.items():
                response = live.post(path, body)
                assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["type"] == "rate_limit_error"
            assert live.get("/health").status_code == 200
    live.wait_until_idle()
    assert live.metric('fomoe_requests_total{outcome="refused"}') == 2
    assert live.post("/completion", {"prompt": "a", "n_predict": 1}).status_code == 200


def test_no_queue(slow: None, serve: Any) -> None:
    live = serve(queue_requests=0)
    with request(live, LONG):
        wait_for(lambda: slot(live)["is_processing"])
        assert live.post("/completion", LONG).status_code == 429


def test_comments_keep_a_stream_alive(slow: None, serve: Any) -> None:
    live = serve(keep_alive_seconds=0.05)
    with live.http.stream(
        "POST", "/completion", json={"prompt": [50] * 60, "n_predict": 1, "stream": True}
    ) as response:
        lines = list(response.iter_lines())
    first = next(i for i, line in enumerate(lines) if line.startswith("data: "))
    assert lines[:first].count(": keep-alive") >= 3


def test_a_client_that_does_not_read_is_dropped(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine never waits for a client, and what is kept for it is bounded."""
    live = serve(pending_events=20, stall_seconds=1)
    host, port = live.url.removeprefix("http://").rsplit(":", 1)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    body = json.dumps({**LONG, "stream": True, "n_probs": 100}).encode()
    connection.sendall(f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    connection.sendall(body)
    wait_for(lambda: live.running.service.worker.outcomes["cancelled"], 60)
    assert live.wait_until_idle() < 2
    assert slot(live)["n_decoded"] < CONTEXT - 10
    connection.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 20):
            pass
    connection.close()
    assert live.post("/completion", {"prompt": "a", "n_predict": 1}).status_code == 200


def test_others_are_served_while_it_loads(open_demo: Callable[[], Engine], serve: Any) -> None:
    gate = threading.Event()

    def late() -> Engine:
        gate.wait(30)
        return open_demo()

    live = serve(engine=late, wait=False)
    want = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
    for path in ("/health", "/v1/models", "/props", "/slots", "/metrics"):
        response = live.get(path)
        assert response.status_code == 503 and response.json() == want
    assert live.post("/completion", LONG).json() == want
    assert live.get("/").status_code == 200
    gate.set()
    wait_for(lambda: live.get("/health").status_code == 200)


@pytest.mark.parametrize("error", [BudgetError("too small", hint="--ram 1G"), FormatError("damaged")])
def test_a_model_that_can_not_be_opened_ends_the_server(error: Exception) -> None:
    from fomoe_io.serve.server import Running
    from fomoe_io.serve.settings import ServeConfig

    def fail() -> Engine:
        raise error

    with pytest.raises(type(error)) as caught:
        Running(ServeConfig(port=0), fail).run()
    assert caught.value is error


def test_a_damaged_template_ends_the_server(open_demo: Callable[[], Engine]) -> None:
    from fomoe_io.serve.server import Running
    from fomoe_io.serve.settings import ServeConfig

    with pytest.raises(FormatError, match="template"):
        Running(ServeConfig(port=0, chat_template="{% for %}"), open_demo).run()


@pytest.mark.parametrize("stream", [True, False])
def test_a_read_error_is_told_and_survived(
    serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    live = serve()
    want = live.post("/completion", {"prompt": "It was", "n_predict": 6}).json()["content"]
    decode = Timeline.decode
    calls = []

    def broken(self: Timeline, token: int) -> np.ndarray:
        calls.append(token)
        if len(calls) == 3:
            self.session.decode(token)  # the session stands elsewhere than is known
            raise ReadError("reading expert 3 of layer 1 failed: EIO")
        return decode(self, token)

    monkeypatch.setattr(Timeline, "decode", broken)
    if stream:
        last = live.stream("/completion", {"prompt": "It was", "n_predict": 6})[-1]["error"]
    else:
        last = live.post("/completion", {"prompt": "It was", "n_predict": 6}).json()["error"]
    assert last == {"code": 500, "message": "reading expert 3 of layer 1 failed: EIO", "type": "server_error"}
    assert "Traceback" not in capsys.readouterr().err
    assert live.post("/completion", {"prompt": "It was", "n_predict": 6}).json()["content"] == want
    assert live.metric('fomoe_requests_total{outcome="failed"}') == 1


def test_a_fault_of_ours_is_survived(
    serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = serve()
    with monkeypatch.context() as patch:
        patch.setattr(Timeline, "read", lambda self, tokens: 1 / 0)
        response = live.post("/completion", {"prompt": "a", "n_predict": 1})
        assert response.status_code == 500 and "Zero" not in response.text
    with monkeypatch.context() as patch:
        patch.setattr(live.running.service.prompts, "of_parts", lambda prompt: 1 / 0)
        assert live.post("/completion", {"prompt": "a", "n_predict": 1}).status_code == 500
    assert capsys.readouterr().err.count("ZeroDivisionError") == 2
    assert live.post("/completion", {"prompt": "a", "n_predict": 1}).status_code == 200


def test_an_error_in_each_dialects_stream(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Timeline, token: int) -> np.ndarray:
        raise ReadError("EIO")

    live = serve()
    monkeypatch.setattr(Timeline, "decode", broken)
    hello = [{"role": "user", "content": "a"}]
    chat = live.stream("/v1/chat/completions", {"messages": hello})[-1]
    assert chat["error"]["message"] == "EIO"
    message = live.stream("/v1/messages", {"messages": hello, "max_tokens": 5})[-1]
    assert message == {"type": "error", "error": {"type": "api_error", "message": "EIO"}}
    response = live.stream("/v1/responses", {"input": "a"})[-1]
    assert response["type"] == "response.failed" and response["response"]["error"]["message"] == "EIO"


def test_pieces_become_smaller_while_that_costs_little() -> None:
    compute = PieceSize(512)
    for _ in range(10):
        compute.measured(compute.tokens, compute.tokens / 60)  # 60 tokens a second, whatever the piece
    assert compute.tokens == 32
    compute.measured(20, 10)  # the end of a prompt says nothing
    assert compute.tokens == 32
    drive = PieceSize(512)
    drive.measured(512, 15.0)
    assert drive.tokens == 256
    for _ in range(PATIENCE_PIECES + 1):
        drive.measured(drive.tokens, 14.5)  # nearly as many experts for half the tokens
        assert drive.tokens == 512
    drive.measured(512, 14.5)
    assert drive.tokens == 256  # by now they may lie in memory
    slow = PieceSize(512)
    slow.measured(512, 10.0)
    slow.measured(256, 6.0)
    slow.measured(128, 3.6)  # 0.85 and 0.82 a step, and less than 0.75 in all
    assert slow.tokens == 256
    fixed = PieceSize(64, is_fixed=True)
    fixed.measured(64, 100)
    assert fixed.tokens == 64
