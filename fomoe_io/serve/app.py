"""The application: which path does what."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from fomoe_io.engine import Engine
from fomoe_io.serve import anthropic, llama, machine, metrics, openai, page, responses, slots
from fomoe_io.serve.dialect import Prepared, to_json
from fomoe_io.serve.errors import ApiError, internal_error, not_supported, unavailable
from fomoe_io.serve.jobs import Job, JobQueue
from fomoe_io.serve.prompts import Prompts
from fomoe_io.serve.security import Guard
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.serve.stream import ClientLeft, JobResponse, read_body, send_json
from fomoe_io.serve.worker import EngineWorker

Prepare = Callable[[bytes, Prompts, ServeConfig], Prepared]
Answer = Callable[[Request], Awaitable[Any]]
T = TypeVar("T")

GENERATING: dict[str, Prepare] = {
    "/v1/chat/completions": openai.chat,
    "/chat/completions": openai.chat,
    "/v1/completions": openai.completions,
    "/completion": llama.completion,
    "/completions": llama.completion,
    "/v1/messages": anthropic.messages,
    "/v1/responses": responses.responses,
    "/responses": responses.responses,
}

IMMEDIATE: dict[str, Callable[[bytes, Prompts], dict[str, Any]]] = {
    "/tokenize": llama.tokenize,
    "/detokenize": llama.detokenize,
    "/apply-template": llama.apply_template,
    "/v1/messages/count_tokens": anthropic.count_tokens,
}

ELSEWHERE = {
    "/embedding": "embeddings",
    "/embeddings": "embeddings",
    "/v1/embeddings": "embeddings",
    "/rerank": "reranking",
    "/reranking": "reranking",
    "/v1/rerank": "reranking",
    "/v1/reranking": "reranking",
    "/infill": "infill",
    "/lora-adapters": "LoRA adapters",
    "/models/load": "loading other models",
    "/models/unload": "loading other models",
    "/v1/audio/transcriptions": "audio",
}
"""Of llama-server, and not of this one."""


class Service:
    """The server's parts, and its endpoints.

    Parameters
    ----------
    config : ServeConfig
    open_engine : callable
        Opens the model, on the engine's thread.
    on_end : callable
        Called on the engine's thread when it ends.
    on_loaded : callable, optional
        Called on the engine's thread with the engine once requests can come.
    before_close : callable, optional
        Called on the engine's thread with the engine before it is closed.
    """

    def __init__(
        self,
        config: ServeConfig,
        open_engine: Callable[[], Engine],
        *,
        on_end: Callable[[], None] = lambda: None,
        on_loaded: Callable[[Engine], None] = lambda engine: None,
        before_close: Callable[[Engine], None] | None = None,
    ) -> None:
        self.config = config
        self.created = int(time.time())
        self.queue = JobQueue(config.queue_requests, config.parallel)
        self.prompts: Prompts | None = None
        self._announce = on_loaded
        self._is_closing = False
        self.worker = EngineWorker(
            open_engine,
            self.queue,
            self._loaded,
            on_end,
            before_close=before_close,
            piece_tokens=config.piece_tokens,
            most_at_work=config.parallel,
        )
        # Rendering and encoding a long prompt would hold up the streams of others
        self._preparing = ThreadPoolExecutor(2, "prepare")
        self.app: ASGIApp = Guard(self._router(), config, send_error)

    def start(self) -> None:
        """Begin to load."""
        self.worker.start()

    def close(self) -> None:
        """End the work; returns at once."""
        self._is_closing = True
        self.worker.stop()
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def _loaded(self, engine: Engine) -> None:
        self.prompts = Prompts(engine, self.config)
        self._announce(engine)

    def _ready(self) -> Prompts:
        """What the endpoints need of the model.

        Raises
        ------
        ApiError
            503 while it is loading, or when it is gone.
        """
        if self._is_closing or self.worker.state == "stopped":
            raise unavailable("the server is shutting down")
        if self.worker.state == "loading" or self.prompts is None:
            raise unavailable()
        return self.prompts

    # ---- endpoints ----

    def _router(self) -> Router:
        post = {path: self._generating(prepare) for path, prepare in GENERATING.items()}
        post |= {path: self._immediate(answer) for path, answer in IMMEDIATE.items()}
        get: dict[str, Answer] = {
            "/health": self._health,
            "/v1/health": self._health,
            "/models": self._models,
            "/v1/models": self._models,
            "/props": self._props,
            "/slots": self._slots,
            "/metrics": self._metrics,
            "/machine": self._machine,
        }
        if self.config.has_page:
            get |= dict.fromkeys(page.PATHS, page.answer)
        routes = [Route(path, endpoint(answer, "POST")) for path, answer in post.items()]
        routes += [Route(path, endpoint(answer, "GET")) for path, answer in get.items()]
        routes.append(Route("/slots/{slot}", endpoint(self._slot, "POST")))
        routes += [Route(path, endpoint(_elsewhere(what))) for path, what in ELSEWHERE.items()]
        return Router(routes, redirect_slashes=False, default=endpoint_missing)

    async def _body(self, request: Request, context_tokens: int) -> bytes:
        most = self.config.most_body_bytes(context_tokens)
        return await read_body(request.receive, request.headers, most, self.config.stall_seconds)

    async def _prepared(self, prepare: Callable[[], T]) -> T:
        """What a thread beside the event loop makes of a request."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, prepare)
        except (RuntimeError, asyncio.CancelledError):
            if self._is_closing:  # the threads are gone
                raise unavailable("the server is shutting down") from None
            raise

    def _generating(self, prepare: Prepare) -> Answer:
        async def answer(request: Request) -> JobResponse:
            prompts = self._ready()
            body = await self._body(request, prompts.context_tokens)
            work, dialect = await self._prepared(lambda: prepare(body, prompts, self.config))
            job = Job(work, self.config.pending_events if dialect.is_stream else None)
            self.queue.put(job)
            return JobResponse(job, dialect, self.queue, self.config)

        return answer

    def _immediate(self, answer: Callable[[bytes, Prompts], dict[str, Any]]) -> Answer:
        async def endpoint(request: Request) -> Response:
            prompts = self._ready()
            body = await self._body(request, prompts.context_tokens)
            return json_response(await self._prepared(lambda: answer(body, prompts)))

        return endpoint

    async def _health(self, request: Request) -> Response:
        self._ready()
        return json_response({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return json_response(llama.models(self._ready(), self.created))

    async def _props(self, request: Request) -> Response:
        return json_response(llama.props(self._ready(), self.config))

    async def _slots(self, request: Request) -> Response:
        if not self.config.has_slots:
            raise not_supported("/slots: it was started with --no-slots")
        context_tokens = self._ready().context_tokens
        return json_response(llama.slots([seat.slot for seat in self.worker.seats], context_tokens, len(self.queue)))

    async def _slot(self, request: Request) -> Response:
        if not self.config.has_slots:
            raise not_supported("/slots: it was started with --no-slots")
        prompts = self._ready()
        body = await self._body(request, prompts.context_tokens)
        action = request.query_params.get("action", "")
        work = slots.slot_work(request.path_params["slot"], action, body, self.config)
        return json_response(await slots.told(work, self.queue))

    async def _metrics(self, request: Request) -> Response:
        if not self.config.has_metrics:
            raise not_supported("/metrics: it was started with --no-metrics")
        self._ready()
        return PlainTextResponse(metrics.render(self.worker, self.queue), media_type=metrics.MEDIA_TYPE)

    async def _machine(self, request: Request) -> Response:
        if not self.config.has_metrics:
            raise not_supported("/machine: it was started with --no-metrics")
        self._ready()
        return json_response(machine.document(self.worker, self.queue))


def json_response(document: Any) -> Response:
    """A document."""
    return Response(to_json(document), media_type="application/json")


async def send_error(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """An error in the form that the path's clients know."""
    is_anthropic = scope["path"].startswith("/v1/messages")
    document = anthropic.error_document(error) if is_anthropic else error.document()
    await send_json(send, error.status, document, error.headers)


def endpoint(answer: Answer, method: str | None = None) -> ASGIApp:
    """An application of one endpoint: errors become answers, and none becomes a traceback at the client."""

    class Endpoint:
        """A class, for which starlette leaves methods and responses alone."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                _check_method(scope["method"], method)
                response = await answer(Request(scope, receive))
            except ClientLeft:
                return
            except ApiError as error:
                return await send_error(scope, receive, send, error)
            except Exception:
                traceback.print_exc(file=sys.stderr)
                return await send_error(scope, receive, send, internal_error())
            await response(scope, receive, send)

    return Endpoint()


def _check_method(method: str, wanted: str | None) -> None:
    if wanted is not None and method != wanted and (method, wanted) != ("HEAD", "GET"):
        raise ApiError(405, "invalid_request_error", f"{method} is not allowed here", headers={"allow": wanted})


async def endpoint_missing(scope: Scope, receive: Receive, send: Send) -> None:
    """404."""
    await send_error(scope, receive, send, ApiError(404, "not_found_error", f"there is no {scope['path'][:200]}"))


def _elsewhere(what: str) -> Answer:
    async def answer(request: Request) -> Response:
        raise not_supported(what)

    return answer
