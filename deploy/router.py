"""One address in front of several fomoe-serve: a conversation goes where its beginning has been read already.

    python deploy/router.py http://127.0.0.1:8081 http://127.0.0.1:8082 --port 8080

Each replica holds what its last requests have read (docs/scale.md), so requests are told apart by how they begin: the
system text and the first message.  Of the same beginning all go to the same replica while it is healthy and its queue
has room, else to the next in an order that is that beginning's own.  deploy/ray_serve.py starts the replicas, too.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

BEGIN_CHARACTERS, BEGIN_TOKENS = 512, 128
"""Of a prompt without messages: two that begin alike have most of a prefix in common."""
BUSY = (429, 503)
"""A replica that says this has not begun: another one may."""
UNHEALTHY_SECONDS = 5.0
"""How long a replica that could not be reached is asked last."""
LARGEST_BODY_BYTES = 64 << 20
_CHANGING = re.compile(r'x-anthropic-billing-header:[^"\\]*')
_OF_A_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}


def beginning(body: bytes) -> bytes | None:
    """What tells a conversation from others for as long as it lasts; None where a request has none."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict):
        return None
    found: list[Any] = [asked.get("system"), asked.get("instructions")]
    messages = asked.get("messages", asked.get("input"))
    if isinstance(messages, list) and messages:
        first = next((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"), 0)
        found += [[m.get("role"), m.get("content")] if isinstance(m, dict) else m for m in messages[: first + 1]]
    else:
        prompt = messages if isinstance(messages, str) else asked.get("prompt")
        if prompt is None:
            return None
        found.append(prompt[:BEGIN_CHARACTERS] if isinstance(prompt, str) else str(prompt)[: 8 * BEGIN_TOKENS])
    return _CHANGING.sub("", json.dumps(found, sort_keys=True, ensure_ascii=False)).encode("utf-8", "replace")


def in_order(key: bytes, names: Sequence[str]) -> list[str]:
    """All replicas, the best for this key first: an order of its own, which keeps when others come or go."""
    return sorted(names, key=lambda name: hashlib.sha256(key + b"\0" + name.encode()).digest())


class Gateway:
    """Passes requests on to the replicas; an ASGI application's one endpoint.

    Parameters
    ----------
    urls : callable
        Name -> address of each replica now; asked again when one is out of reach.
    """

    def __init__(self, urls: Callable[[], Awaitable[dict[str, str]]]) -> None:
        self._ask = urls
        self._urls: dict[str, str] = {}
        self._failed: dict[str, float] = {}
        self._turns = itertools.count()
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(10, read=None), limits=limits, trust_env=False)

    async def __call__(self, request: Request) -> Response:
        """Answer one."""
        if not self._urls:
            self._urls = await self._ask()
        return await (self._health() if request.url.path in ("/health", "/v1/health") else self._forward(request))

    def candidates(self, key: bytes | None) -> list[tuple[str, str]]:
        """(name, address) in the order to try."""
        names = sorted(self._urls)
        order = in_order(key if key is not None else str(next(self._turns)).encode(), names)
        now = time.monotonic()
        order.sort(key=lambda name: now - self._failed.get(name, -1e9) < UNHEALTHY_SECONDS)  # stable
        return [(name, self._urls[name]) for name in order]

    async def _has_failed(self, name: str) -> None:
        """It could not be reached: it may have started again elsewhere."""
        self._failed[name] = time.monotonic()
        self._urls = await self._ask()

    async def _health(self) -> Response:
        """200 while one of them can answer, with what each says."""

        async def one(name: str, url: str) -> tuple[str, int]:
            try:
                answer = await self._client.get(f"{url}/health", timeout=5)
            except httpx.HTTPError:
                await self._has_failed(name)
                return name, 0
            self._failed.pop(name, None)
            return name, answer.status_code

        found = dict(await asyncio.gather(*(one(*pair) for pair in self.candidates(b""))))
        status = 200 if 200 in found.values() else 503
        return JSONResponse({"status": "ok" if status == 200 else "unavailable", "replicas": found}, status)

    async def _forward(self, request: Request) -> Response:
        body = await request.body()
        if len(body) > LARGEST_BODY_BYTES:
            return _refusal(413, "the body is too large")
        headers = {name: value for name, value in request.headers.items() if name not in _OF_A_HOP}
        query = f"?{request.url.query}" if request.url.query else ""
        answer: httpx.Response | None = None
        for name, url in self.candidates(beginning(body)):
            if answer is not None:
                await answer.aclose()
            sent = self._client.build_request(
                request.method, f"{url}{request.url.path}{query}", headers=headers, content=body
            )
            try:
                answer = await self._client.send(sent, stream=True)
            except httpx.HTTPError:
                answer = None
                await self._has_failed(name)
                continue
            self._failed.pop(name, None)
            if answer.status_code not in BUSY:
                break
        return _refusal(503, "no replica can be reached") if answer is None else _passed_on(answer, name)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": {"code": status, "message": message, "type": "server_error"}}, status)


def application(urls: Callable[[], Awaitable[dict[str, str]]]) -> Starlette:
    """An ASGI application of a :class:`Gateway`."""
    gateway = Gateway(urls)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.close()

    every = ["GET", "HEAD", "POST", "OPTIONS", "DELETE"]
    return Starlette(routes=[Route("/{path:path}", gateway.__call__, methods=every)], lifespan=lifespan)


def _passed_on(answer: httpx.Response, name: str) -> Response:
    """As it comes; when the client leaves, the replica is told by the closing of its connection."""

    async def pieces() -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

    headers = {key: value for key, value in answer.headers.items() if key not in _OF_A_HOP}
    return StreamingResponse(pieces(), answer.status_code, {**headers, "x-fomoe-replica": name})


def main() -> None:
    """Command line."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", metavar="URL", help="of each fomoe-serve")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    found = {url.rstrip("/"): url.rstrip("/") for url in options.urls}

    async def urls() -> dict[str, str]:
        return found

    uvicorn.run(application(urls), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
