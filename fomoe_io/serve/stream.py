"""The way back to a client: server-sent events as they come, or one document at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import Receive, Scope, Send

from fomoe_io.serve.dialect import Dialect, to_json
from fomoe_io.serve.errors import ApiError, bad_request, too_large
from fomoe_io.serve.jobs import Job, JobQueue, Over
from fomoe_io.serve.settings import ServeConfig

PACE_SECONDS = 0.05
"""Between two sends of a stream: tokens that come faster go together, as sending each would hold up the engine."""

KEEP_ALIVE = b": keep-alive\n\n"

CONNECTION = "fomoe.connection"
"""Key of a scope's state where the connection is found that a stalled client is cut off with."""


class Stalled(Exception):
    """A client does not take what it is sent."""


class ClientLeft(Exception):
    """Before it had said what it wanted."""


async def read_body(receive: Receive, headers: MutableMapping[str, str] | Any, most: int, seconds: float) -> bytes:
    """The body of a request.

    Raises
    ------
    ApiError
        413 when it is larger than `most` bytes, 400 when it does not come in time.
    ClientLeft
    """
    declared = headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_large(most)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise bad_request(f"the body did not come within {seconds:g} s") from None


async def send_json(send: Send, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
    """A whole response."""
    body = to_json(document)
    head = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in head.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class JobResponse:
    """An ASGI response that attends to a job until it is over, and ends it when the client leaves or stalls."""

    def __init__(self, job: Job, dialect: Dialect, queue: JobQueue, config: ServeConfig) -> None:
        self._job = job
        self._dialect = dialect
        self._queue = queue
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Attend."""
        watcher = asyncio.create_task(self._watch(receive))
        connection = scope.get("state", {}).get(CONNECTION)
        if connection is not None:
            self._job.on_stalled = connection.cut
        try:
            if self._dialect.is_stream:
                await self._stream(send)
            else:
                await self._whole(send)
        except Stalled:
            if connection is not None:
                connection.cut()
        finally:
            watcher.cancel()
            self._queue.cancel(self._job)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._queue.cancel(self._job)

    async def _whole(self, send: Send) -> None:
        while True:
            for event in await self._job.events():
                if not isinstance(event, Over):
                    self._dialect.frames(event)
                elif event.error is not None:
                    error = event.error
                    await send_json(send, error.status, self._dialect.error_document(error), error.headers)
                    return
                else:
                    if not self._job.is_cancelled:
                        await send_json(send, 200, self._dialect.document())
                    return
            await self._job.pause(PACE_SECONDS)

    async def _stream(self, send: Send) -> None:
        headers = {
            b"content-type": b"text/event-stream; charset=utf-8",
            b"cache-control": b"no-store",
            b"x-accel-buffering": b"no",
        }
        await send({"type": "http.response.start", "status": 200, "headers": list(headers.items())})
        is_over, spoke = False, time.monotonic()
        while not is_over:
            frames, is_over = await self._next_frames()
            if not frames and time.monotonic() - spoke >= self._config.keep_alive_seconds:
                frames = KEEP_ALIVE  # tokens come and say nothing yet
            if frames or is_over:
                await self._deliver(send, {"type": "http.response.body", "body": frames, "more_body": not is_over})
                spoke = time.monotonic()
            if not is_over:
                await self._job.pause(PACE_SECONDS)

    async def _next_frames(self) -> tuple[bytes, bool]:
        """What there is to say, and whether it is the last."""
        try:
            async with asyncio.timeout(self._config.keep_alive_seconds):
                events = await self._job.events()
        except TimeoutError:
            return KEEP_ALIVE, False
        frames = []
        for event in events:
            if isinstance(event, Over):
                frames.append(self._last_frame(event.error))
                return b"".join(frames), True
            frames.append(self._dialect.frames(event))
        return b"".join(frames), False

    def _last_frame(self, error: ApiError | None) -> bytes:
        if error is not None:
            return self._dialect.failed(error)
        return b"" if self._job.is_cancelled else self._dialect.finished()

    async def _deliver(self, send: Send, message: Any) -> None:
        """Send, unless the client keeps too much waiting or takes too long."""
        try:
            async with asyncio.timeout(self._config.stall_seconds):
                await send(message)
        except TimeoutError:
            raise Stalled from None
        if self._job.has_stalled:
            raise Stalled
