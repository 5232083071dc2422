"""A live server on the demo model, and clients that talk to it over real sockets."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("msgspec")
httpx = pytest.importorskip("httpx")

from fomoe_io import Engine, EngineConfig  # noqa: E402
from fomoe_io.serve.server import Running  # noqa: E402
from fomoe_io.serve.settings import ServeConfig  # noqa: E402
from fomoe_io.text.sampler import SamplingConfig  # noqa: E402
from tests.serve.tool_requests import TEMPLATE  # noqa: E402
from tests.tiny_model import Tiny, write_tiny  # noqa: E402

GREEDY = SamplingConfig(temperature=0)
CONTEXT = 512
DIALOGUE = '{% for m in messages %}{{ m.content }}"{% endfor %}'
"""A template at whose seams no token spans text of the model and of the template."""


class Imported:
    """A package that is imported when a test uses it: who collects the tests need not wait for the large ones."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(pytest.importorskip(self._name), attribute)


class Live:
    """A server and a client of it."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.url = running.url
        self.http = httpx.Client(base_url=running.url, timeout=60, trust_env=False)

    def post(self, path: str, document: Any = None, **more: Any) -> Any:
        """The response to a document."""
        return self.http.post(path, json=document, **more)

    def get(self, path: str, **more: Any) -> Any:
        """The response."""
        return self.http.get(path, **more)

    def stream(self, path: str, document: dict[str, Any]) -> list[dict[str, Any]]:
        """The data of all events; [DONE] is left out."""
        with self.http.stream("POST", path, json={**document, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def metric(self, name: str) -> float:
        """One value of /metrics."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").text.splitlines() if line[0] != "#")
        return float(lines[name])

    def wait_until_idle(self, seconds: float = 10) -> float:
        """How long the engine was still busy."""
        started = time.monotonic()
        while self.running.service.queue.at_work or len(self.running.service.queue):
            assert time.monotonic() - started < seconds, "the engine is held"
            time.sleep(0.005)
        return time.monotonic() - started


@contextlib.contextmanager
def serving(open_engine: Callable[[], Engine], config: ServeConfig, *, wait: bool = True) -> Iterator[Live]:
    """Serve in this process, on a free port."""
    running = Running(config, open_engine)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            running.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    live = Live(running)
    try:
        while wait and live.get("/health").status_code == 503:
            assert thread.is_alive(), failures
            time.sleep(0.01)
        yield live
    finally:
        live.http.close()
        running.server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
    assert not failures, failures


@pytest.fixture(scope="session")
def open_demo(demo_model: Path) -> Callable[[], Engine]:
    """Opens the demo model with a small context."""
    config = EngineConfig(context_tokens=CONTEXT, batch_tokens=32, threads=2, sessions=2)
    return lambda: Engine.open(demo_model, config)


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Engine]:
    """Opens a model of random weights, whose tokens are bytes and cost next to nothing."""
    shape = Tiny(layers=2, experts=4, used=2, vocabulary=300)
    path = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", shape, 1)
    config = EngineConfig(context_tokens=4096, batch_tokens=64, threads=1, sessions=2)
    return lambda: Engine.open(path, config)


@pytest.fixture(scope="session")
def live(open_demo: Callable[[], Engine]) -> Iterator[Live]:
    """The server that most tests share: greedy where a request says nothing."""
    config = ServeConfig(port=0, alias="demo", sampling=GREEDY, keep_alive_seconds=0.2)
    with serving(open_demo, config) as server:
        yield server


@pytest.fixture(scope="session")
def tooled(open_tiny: Callable[[], Engine]) -> Iterator[Live]:
    """A server whose template knows tools and thoughts; its model writes whatever a grammar lets it."""
    config = ServeConfig(port=0, alias="demo", sampling=GREEDY, chat_template=TEMPLATE, keep_alive_seconds=0.2)
    with serving(open_tiny, config) as server:
        yield server


@pytest.fixture
def serve(open_demo: Callable[[], Engine]) -> Iterator[Callable[..., Live]]:
    """Starts servers of other kinds."""
    with contextlib.ExitStack() as stack:

        def start(*, wait: bool = True, engine: Callable[[], Engine] = open_demo, **values: Any) -> Live:
            config = ServeConfig(**{"port": 0, "alias": "demo", "sampling": GREEDY, **values})
            return stack.enter_context(serving(engine, config, wait=wait))

        yield start
