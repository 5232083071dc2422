"""Running it: a listening socket, uvicorn on it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fomoe_io.engine import Engine
from fomoe_io.errors import UsageError
from fomoe_io.serve.app import Service
from fomoe_io.serve.settings import ServeConfig
from fomoe_io.serve.stream import CONNECTION

FIRST_REQUEST_SECONDS = 30.0
"""A connection that has asked for nothing by then is closed."""

MOST_CONNECTIONS = 256
"""Beside those that may wait in the queue."""


class Connection(H11Protocol):
    """A connection that can be cut, and that does not stay without asking for anything."""

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, {**app_state, CONNECTION: self}, _loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self._idle = self.loop.call_later(FIRST_REQUEST_SECONDS, self._check_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._idle.cancel()
        super().connection_lost(exc)

    def _check_idle(self) -> None:
        if self.cycle is None:
            self.cut()

    def cut(self) -> None:
        """Close at once, whatever is still to be sent."""
        self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server; signals end it in order, and its last tasks are told before they are waited for."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work, then the connections."""
        self._service.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn, don't raise them again afterwards: the command has its own end to come to."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for an end, the second insists."""
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises
    ------
    UsageError
        The address is taken, or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(f"can't listen on {host}:{port}: {error.strerror or error}", hint="--host or --port") from None


def url_of(listener: socket.socket) -> str:
    """Where it listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Running:
    """A server and its service, made but not yet begun.

    Parameters
    ----------
    config : ServeConfig
    open_engine : callable
    on_loaded, before_close : callable, optional
        See :class:`Service`.
    """

    def __init__(
        self,
        config: ServeConfig,
        open_engine: Callable[[], Engine],
        *,
        on_loaded: Callable[[Engine], None] = lambda engine: None,
        before_close: Callable[[Engine], None] | None = None,
    ) -> None:
        self.listener = listen(config.host, config.port)
        self.url = url_of(self.listener)
        self.service = Service(
            config, open_engine, on_end=self._engine_ended, on_loaded=on_loaded, before_close=before_close
        )
        settings = uvicorn.Config(
            self.service.app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS + config.queue_requests,
            timeout_graceful_shutdown=10,
        )
        self.server = Server(settings, self.service)

    def _engine_ended(self) -> None:
        self.server.should_exit = True

    def run(self, on_listening: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal, or until the engine can't be opened.

        Parameters
        ----------
        on_listening : callable, optional
            Called once signals end the server in order.

        Raises
        ------
        KeyboardInterrupt
            A second signal did not wait for the end.
        Exception
            What the engine's thread failed with.
        """
        worker = self.service.worker
        with self.server.capture_signals():
            on_listening()
            self.service.start()
            try:
                self.server.run(sockets=[self.listener])
            finally:
                self.listener.close()
                self.service.close()
            while worker.is_alive() and not self.server.force_exit:
                worker.join(0.1)
        if self.server.force_exit:
            raise KeyboardInterrupt
        if worker.error is not None:
            raise worker.error
