"""deploy/: a router that sends a conversation where it has been read, two replicas behind it, and the other files."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
import httpx
import uvicorn

from fomoe_io import Engine, EngineConfig
from fomoe_io.cli import serve as serve_command
from fomoe_io.serve.settings import ServeConfig
from tests.serve.conftest import GREEDY, Live, serving

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"


def loaded(name: str) -> Any:
    """A script of deploy/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


router = loaded("router")


# ---- which replica ----


def chat(*texts: str, **more: Any) -> bytes:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return json.dumps({"messages": messages, **more}).encode()


def test_a_conversation_keeps_its_beginning() -> None:
    first = router.beginning(chat("Hello", temperature=0.3))
    assert first == router.beginning(chat("Hello", "Hi!", "How are you?", temperature=0.9, stream=True))
    assert first != router.beginning(chat("Good day"))
    assert router.beginning(chat("Hello", system="Be brief")) != first
    changing = [f"x-anthropic-billing-header: {n}\nBe brief" for n in (1, 2)]
    assert len({router.beginning(chat("Hello", system=text)) for text in changing}) == 1
    long = "Once upon a time " * 100
    prompts = [json.dumps({"prompt": long + end}).encode() for end in ("a", "b")]
    assert router.beginning(prompts[0]) == router.beginning(prompts[1])
    assert router.beginning(json.dumps({"input": "Hello"}).encode()) is not None
    assert router.beginning(json.dumps({"prompt": [1, 2, 3]}).encode()) is not None
    for none in (b"", b"{", b"[1]", b"{}", b"[" * 100_000):
        assert router.beginning(none) is None


def test_keys_are_spread_and_stay_when_others_go() -> None:
    names = [f"replica-{i}" for i in range(4)]
    keys = [str(i).encode() for i in range(2000)]
    best = {key: router.in_order(key, names)[0] for key in keys}
    assert all(400 < count < 600 for count in Counter(best.values()).values())
    left = [name for name in names if name != "replica-2"]
    assert all(router.in_order(key, left)[0] == name for key, name in best.items() if name != "replica-2")


# ---- in front of servers ----


@contextlib.contextmanager
def routed(urls: dict[str, str]) -> Iterator[httpx.Client]:
    async def ask() -> dict[str, str]:
        return urls

    config = uvicorn.Config(router.application(ask), port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def open_demo(demo_model: Path) -> Callable[[], Engine]:
    return lambda: Engine.open(demo_model, EngineConfig(context_tokens=256, batch_tokens=32, threads=1))


def test_two_replicas(open_demo: Callable[[], Engine]) -> None:
    """A second turn finds its first one read; other conversations go elsewhere, too; one that ends is replaced."""
    with contextlib.ExitStack() as stack:
        config = ServeConfig(port=0, sampling=GREEDY)
        servers = [contextlib.ExitStack() for _ in range(2)]
        lives: list[Live] = []
        for server in servers:
            stack.push(server)
            lives.append(server.enter_context(serving(open_demo, config)))
        client = stack.enter_context(routed({f"r{i}": live.url for i, live in enumerate(lives)}))
        assert client.get("/health").json() == {"status": "ok", "replicas": {"r0": 200, "r1": 200}}
        begins = [f"{word} was a dark and stormy night" for word in ("It", "There", "That", "This", "Once", "Her")]
        where, said = {}, {}
        for text in begins:
            answer = client.post("/completion", json={"prompt": text, "n_predict": 4})
            assert answer.status_code == 200
            where[text], said[text] = answer.headers["x-fomoe-replica"], answer.json()["content"]
        assert set(where.values()) == {"r0", "r1"}
        text = begins[-1]
        more = {"prompt": f"{text}{said[text]} and", "n_predict": 4}
        direct = lives[int(where[text][1])].post("/completion", more).json()
        assert direct["timings"]["cache_n"] > 0
        more = {"prompt": text, "n_predict": 4}
        with client.stream("POST", "/completion", json={**more, "stream": True}) as stream:
            pieces = [json.loads(line[6:])["content"] for line in stream.iter_lines() if line.startswith("data: {")]
        assert "".join(pieces) == said[text]
        gone = int(where[text][1])
        servers[gone].close()
        moved = client.post("/completion", json={"prompt": text, "n_predict": 4})
        assert moved.status_code == 200 and moved.headers["x-fomoe-replica"] == f"r{1 - gone}"
        assert moved.json()["content"] == said[text]
        health = client.get("/health")
        assert health.status_code == 200 and health.json()["replicas"] == {f"r{gone}": 0, f"r{1 - gone}": 200}
        servers[1 - gone].close()
        assert client.get("/health").status_code == 503
        assert client.post("/completion", json={"prompt": text}).status_code == 503


class _Busy(BaseHTTPRequestHandler):
    """Answers with its server's status."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")


def test_a_full_queue_sends_to_the_next() -> None:
    servers = {name: ThreadingHTTPServer(("127.0.0.1", 0), _Busy) for name in ("a", "b")}
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers.values()]
    for thread in threads:
        thread.start()
    try:
        urls = {name: f"http://127.0.0.1:{server.server_address[1]}" for name, server in servers.items()}
        body = chat("Hello")
        best, second = router.in_order(router.beginning(body), sorted(urls))
        with routed(urls) as client:
            for busy, status, expected in (
                (429, 200, (200, second)),
                (400, 200, (400, best)),
                (503, 429, (429, second)),
            ):
                servers[best].status, servers[second].status = busy, status  # type: ignore[attr-defined]
                answer = client.post("/v1/chat/completions", content=body)
                assert (answer.status_code, answer.headers["x-fomoe-replica"]) == expected
    finally:
        for server in servers.values():
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_starts_looks_after_and_ends_replicas(demo_model: Path, tmp_path: Path) -> None:
    """Two replicas on this machine; one is killed, and another takes its place."""
    pytest.importorskip("ray.serve")
    options = [
        "--ram",
        "150M",
        "-c",
        "256",
        "-t",
        "1",
        "--device",
        "cpu",
        "--no-profile",
        "--temp",
        "0",
        "--chat-template",
        "chatml",
    ]
    replica = {"store": str(demo_model), "options": options, "cpus": 0.5}
    (tmp_path / "replicas.json").write_text(json.dumps({"replicas": [replica, replica]}))
    command = [sys.executable, str(DEPLOY / "ray_serve.py"), str(tmp_path / "replicas.json"), "--port", "8123"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        with httpx.Client(base_url="http://127.0.0.1:8123", timeout=60, trust_env=False) as client:
            wait_for(lambda: client.get("/health").json()["replicas"] == {"replica-0": 200, "replica-1": 200}, 240)
            where = defaultdict(set)
            for n in range(6):
                messages = [{"role": "user", "content": f"{n} was a dark and"}]
                for _ in range(2):
                    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3})
                    assert answer.status_code == 200, answer.text
                    messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "and"}]
                    where[n].add(answer.headers["x-fomoe-replica"])
            assert all(len(replicas) == 1 for replicas in where.values())
            assert set.union(*where.values()) == {"replica-0", "replica-1"}
            found = subprocess.run(["pgrep", "-f", f"fomoe_io serve {demo_model}"], capture_output=True, text=True)
            victim = int(found.stdout.split()[0])
            subprocess.run(["kill", "-9", str(victim)], check=True)
            assert client.post("/completion", json={"prompt": "It was", "n_predict": 3}).status_code == 200
            wait_for(lambda: set(client.get("/health").json()["replicas"].values()) == {200}, 120)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    left = subprocess.run(["pgrep", "-f", f"fomoe_io serve {demo_model}"], capture_output=True, text=True).stdout
    assert not left.strip()


def wait_for(is_so: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Exception):
            if is_so():
                return
        assert time.monotonic() < ends
        time.sleep(0.5)


# ---- the files beside it ----


def test_the_unit_starts_what_there_is(tmp_path: Path) -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "fomoe-serve.service")
    start = unit["Service"]["ExecStart"].split()
    options = serve_command.parser().parse_args(start[1:])
    assert (options.model, options.host, options.port) == ("/nvme0/model", "127.0.0.1", 8080)
    assert unit["Service"]["KillSignal"] == "SIGTERM"
    if shutil.which("systemd-analyze"):
        text = (DEPLOY / "fomoe-serve.service").read_text().replace("/opt/fomoe/bin/fomoe-serve", "/bin/true")
        (tmp_path / "fomoe-serve.service").write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / "fomoe-serve.service")], capture_output=True, text=True
        )
        assert "fomoe-serve.service:" not in done.stderr, done.stderr


def test_the_container_installs_what_the_build_asks_for() -> None:
    text = (ROOT / "Containerfile").read_text()
    asked = (ROOT / "tools" / "system-packages").read_text()
    for package in re.findall(r"apt-get install .*?recommends (.*)", text)[0].split():
        assert package in asked, package
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\)\[(\w+)\]", text)) <= set(extras)
    command = re.search(r"fomoe serve (\S+.*)", text)
    assert command is not None
    assert serve_command.parser().parse_args(command[1].split()).host == "0.0.0.0"
    assert (ROOT / ".containerignore").exists()
