"""Who may call, how much may be sent, and what a request can not do."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from fomoe_io.errors import UsageError
from fomoe_io.serve.security import host_of, is_loopback
from fomoe_io.serve.server import listen
from fomoe_io.serve.settings import ServeConfig
from tests.serve.conftest import Live

BODY = {"prompt": "a", "n_predict": 1}


def raw(live: Live, request: bytes) -> bytes:
    """What the server says to these bytes."""
    host, port = live.url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        found = b""
        while more := connection.recv(65536):
            found += more
    return found


@pytest.fixture(scope="module")
def guarded(open_demo: Any) -> Any:
    from tests.serve.conftest import serving

    with serving(open_demo, ServeConfig(port=0, api_keys=("secret", "other"))) as live:
        yield live


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic secret"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer"},
        {"X-Api-Key": "secre"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "sécret"},
    ],
)
def test_without_the_key(guarded: Live, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("utf-8") for name, value in headers.items()}
    for method, path in (("POST", "/completion"), ("GET", "/metrics"), ("GET", "/slots"), ("GET", "/props")):
        response = guarded.http.request(method, path, json=BODY, headers=encoded)
        assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
    response = guarded.post("/v1/messages", {}, headers=encoded)
    assert response.json() == {"type": "error", "error": {"type": "authentication_error", "message": "Invalid API Key"}}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer secret"},
        {"Authorization": "bearer other"},
        {"X-Api-Key": "secret"},
        {"X-Api-Key": "other", "Authorization": "Bearer wrong"},
    ],
)
def test_with_the_key(guarded: Live, headers: dict[str, str]) -> None:
    assert guarded.post("/completion", BODY, headers=headers).status_code == 200
    assert guarded.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/v1/models", "/", "/page.js"])
def test_what_needs_no_key(guarded: Live, path: str) -> None:
    assert guarded.get(path).status_code == 200


def test_the_key_of_the_real_clients(guarded: Live) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret", max_retries=0) as client:
        assert client.completions.create(model="any", prompt="a", max_tokens=1).choices
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.completions.create(model="any", prompt="a", max_tokens=1)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "evil.example:8080", "", "[", "a b"])
def test_a_name_that_was_made_to_point_here(live: Live, host: str) -> None:
    for path in ("/health", "/", "/slots"):
        found = raw(live, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert found.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400")), found


def test_no_host_and_two_hosts(live: Live) -> None:
    assert raw(live, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403")
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert raw(live, two).startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8080", "192.168.1.9", "ai.localhost"]
)
def test_names_of_this_machine(live: Live, host: str) -> None:
    assert live.get("/health", headers={"Host": host}).status_code == 200


def test_a_name_that_was_allowed(serve: Any) -> None:
    live = serve(allowed_hosts=("My.Proxy",))
    assert live.get("/health", headers={"Host": "my.proxy"}).status_code == 200
    assert live.get("/health", headers={"Host": "not.my.proxy"}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "file://", "http://["]
)
def test_pages_of_other_sites(live: Live, origin: str) -> None:
    response = live.post("/completion", BODY, headers={"Origin": origin})
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    assert live.http.options("/completion", headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1:1", "http://[::1]:5", "https://app.localhost"]
)
def test_pages_of_this_machine(live: Live, origin: str) -> None:
    response = live.post("/completion", BODY, headers={"Origin": origin})
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == origin
    preflight = live.http.options(
        "/v1/chat/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 204 and "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"]


def test_a_site_that_was_allowed(serve: Any) -> None:
    live = serve(allowed_origins=("https://chat.example",), api_keys=("secret",))
    headers = {"Origin": "https://chat.example"}
    assert live.http.options("/completion", headers=headers).status_code == 204  # browsers send no key with it
    refused = live.post("/completion", BODY, headers=headers)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == headers["Origin"]
    assert live.post("/completion", BODY, headers={"Origin": "https://chat.example.evil"}).status_code == 403


def test_bodies_are_bounded(serve: Any) -> None:
    live = serve(body_bytes=2000)
    large = json.dumps({"prompt": "x" * 3000, "n_predict": 1}).encode()
    response = live.http.post("/completion", content=large)
    assert response.status_code == 413 and response.json()["error"]["code"] == 413
    chunked = live.http.post("/completion", content=iter([large[:1500], large[1500:]]))
    assert chunked.status_code == 413
    assert live.http.post("/v1/messages", content=large).json()["error"]["type"] == "request_too_large"
    assert live.post("/completion", BODY).status_code == 200


def test_a_body_that_does_not_come(serve: Any) -> None:
    live = serve(stall_seconds=0.3)
    started = time.monotonic()
    head = b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{"
    assert raw(live, head).startswith(b"HTTP/1.1 400")
    assert time.monotonic() - started < 5


def test_many_values_and_deep_ones(live: Live) -> None:
    for body in (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", b'{"a": {"b": "' + b"[" * 200 + b'"}, "prompt": 1}'):
        assert live.http.post("/completion", content=body).status_code == 400
    text = "[[[{{{" * 50  # brackets in a text are no depth
    assert live.post("/completion", {"prompt": text, "n_predict": 1}).status_code == 200


def test_too_many_messages(live: Live) -> None:
    messages = [{"role": "user", "content": "a"}] * 5000
    response = live.post("/v1/chat/completions", {"messages": messages})
    assert response.status_code == 400 and "5000 messages" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/page.html", "/../page.js", "/%2e%2e/errors.py", "/page.js/..%2ferrors.py", "//etc/passwd"]
)
def test_no_request_names_a_file(live: Live, path: str) -> None:
    found = raw(live, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.1 404")


def test_the_page_runs_nothing_but_its_script(live: Live) -> None:
    policy = live.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy


def test_loopback() -> None:
    assert ServeConfig().host == "127.0.0.1"
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.0.1") and not is_loopback("example.org")
    assert host_of("[::1]:80") == "::1" and host_of("A.b:1") == "a.b" and host_of("") is None and host_of("[") is None


def test_an_address_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="can't listen") as caught:
        listen("127.0.0.1", taken.getsockname()[1])
    assert caught.value.hint == "--host or --port"


def test_keys_and_limits_are_checked_at_the_start() -> None:
    with pytest.raises(UsageError, match="key is empty"):
        ServeConfig(api_keys=("",))
    with pytest.raises(UsageError, match="port"):
        ServeConfig(port=70000)
